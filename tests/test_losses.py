"""The equations: by hand, against float64, and by another road through the network."""
import argparse
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, pair_rows, tiny_checkpoint, write_rows

import data
import stepdpo
from model import Llama
from stepdpo import FusedLogProbs, Policy, dpo_loss, learning_rate, preference_objective, response_logps


def test_dpo_loss_by_hand():
    """Eq. 2 with beta 0.5, worked out on paper.

    pair 0   policy  win -1.0, lose -4.0;  reference  win -2.0, lose -3.0
             log-ratios +1.0 and -1.0;  rewards +0.5 and -0.5;  margin 1.0;  loss = log(1 + e^-1) = 0.313262
    pair 1   policy  win -3.0, lose -1.0;  reference  win -1.0, lose -1.0
             log-ratios -2.0 and 0.0;   rewards -1.0 and 0.0;   margin -1.0; loss = log(1 + e^1) = 1.313262
    """
    losses, chosen, rejected = dpo_loss(*map(torch.tensor, ([-1.0, -3.0], [-4.0, -1.0], [-2.0, -1.0], [-3.0, -1.0])), beta=0.5)
    torch.testing.assert_close(losses, torch.tensor([0.313262, 1.313262]), atol=1e-6, rtol=0)
    assert chosen.tolist() == [0.5, -1.0] and rejected.tolist() == [-0.5, 0.0]


def test_policy_equal_to_reference_gives_log_2():
    """Whatever the log-probs are, the first loss is log 2, and its gradient pushes the two sides apart with weight beta / 2."""
    logps = torch.tensor([-50.0, -3.0], requires_grad=True)
    other = torch.tensor([-70.0, -9.0], requires_grad=True)
    losses, *_ = dpo_loss(logps, other, logps.detach(), other.detach(), beta=0.4)
    assert losses.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-7)
    losses.sum().backward()
    assert logps.grad.tolist() == pytest.approx([-0.2] * 2) and other.grad.tolist() == pytest.approx([0.2] * 2)


def test_metrics_by_hand():
    """Three tokens: chosen "a b" at -0.5 and -1.0, rejected "c" at -2.0; reference -2.0 and -1.5; beta 2.

    chosen_reward 2 * (-1.5 + 2.0) = 1.0;  rejected_reward 2 * (-2.0 + 1.5) = -1.0;  margin 2;  loss log(1 + e^-2) = 0.126928"""
    batch = data.Batch(None, None, [], [], None, None, torch.tensor([0, 0, 1]), torch.tensor([0]))
    losses, metrics = preference_objective(torch.tensor([-0.5, -1.0, -2.0]), batch, torch.tensor([[-2.0, -1.5]]), argparse.Namespace(beta=2.0))
    assert losses.tolist() == pytest.approx([0.126928], abs=1e-6)
    assert {k: v.item() for k, v in metrics.items()} == {"accuracy": 1.0, "margin": 2.0, "chosen_reward": 1.0, "rejected_reward": -1.0,
                                                         "chosen_logps": -1.5, "rejected_logps": -2.0}


def test_a_response_is_the_sum_of_its_tokens():
    """The example in response_logps' docstring."""
    batch = data.Batch(None, None, [], [], None, None, torch.tensor([0, 0, 0, 1, 1]), torch.arange(1))
    assert response_logps(torch.tensor([-0.5, -1.0, -0.5, -0.2, -0.3]), batch).tolist() == pytest.approx([-2.0, -0.5])


@pytest.mark.parametrize("at_once", [1, 40, 2**24])
def test_fused_logprobs_equal_the_plain_way_in_float64(monkeypatch, at_once):
    """Value, gradient of the hidden states and of lm_head, for uneven token weights, whatever the chunk; and torch's own gradcheck."""
    monkeypatch.setattr(stepdpo, "LOGITS_AT_ONCE", at_once)
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(7, 5, generator=g, dtype=torch.float64), torch.randn(11, 5, generator=g, dtype=torch.float64)
    targets, credit = torch.randint(0, 11, (7,), generator=g), torch.randn(7, generator=g, dtype=torch.float64)
    results = []
    for fused in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logps = FusedLogProbs.apply(h, w, targets) if fused else (h @ w.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
        (logps * credit).sum().backward()
        results.append((logps.detach(), h.grad, w.grad))
    for fused, plain in zip(*results):
        torch.testing.assert_close(fused, plain, atol=1e-12, rtol=1e-12)
    torch.autograd.gradcheck(lambda h, w: FusedLogProbs.apply(h, w, targets), (hidden.requires_grad_(), weight.requires_grad_()), nondet_tol=1e-14)


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
def test_fused_logprobs_hold_one_chunk_of_logits():
    """Forward and backward on 1,000 tokens x 100,000 words, whose logits take 400 MB, in a process with the loop's own malloc settings: the peak is one chunk
    (128 MB) and a third more, besides the gradient of the weight (26 MB), also in the third round."""
    script = """
import torch, model, stepdpo
torch.set_num_threads(1)
model.keep_freed_memory()
now = lambda name: next(int(line.split()[1]) / 1000 for line in open("/proc/self/status") if line.startswith(name))
hidden, weight, targets = torch.randn(1000, 64, requires_grad=True), torch.randn(100_000, 64, requires_grad=True), torch.arange(1000)
stepdpo.FusedLogProbs.apply(hidden[:2], weight, targets[:2]).sum().backward()
before = now("VmRSS")
for _ in range(3):
    hidden.grad = weight.grad = None
    stepdpo.FusedLogProbs.apply(hidden, weight, targets).sum().backward()
print(now("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.33 * 134 + 26, done.stdout


def test_fused_logprobs_in_fp32_and_under_bf16_autocast():
    """fp32: relative error below 1e-5 against float64. bf16 autocast: products in bf16, the log-sum-exp in fp32, gradients in the weights' fp32."""
    g = torch.Generator().manual_seed(0)
    h, w = torch.randn(64, 48, generator=g), torch.randn(1000, 48, generator=g)
    targets = torch.randint(0, 1000, (64,), generator=g)
    exact = (h.double() @ w.double().T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(FusedLogProbs.apply(h, w, targets).double(), exact, atol=0, rtol=1e-5)
    h, w = h.requires_grad_(), w.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logps = FusedLogProbs.apply(h, w, targets)
    assert logps.dtype == torch.float32
    logps.sum().backward()
    torch.testing.assert_close(logps.double(), exact, atol=0.3, rtol=0.02)
    grad, = torch.autograd.grad((h.double() @ w.double().T).log_softmax(-1).gather(1, targets[:, None]).sum(), w)
    assert w.grad.dtype == h.grad.dtype == torch.float32
    assert (w.grad - grad).norm() / grad.norm() < 0.02


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    folder = tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    rows = write_rows(folder / "pairs.jsonl", pair_rows(6))
    tokenizer = data.Tokenizer.from_pretrained(folder)
    return folder, {method: data.encode_dataset(rows, tokenizer, method, "alpaca", 1024)[0] for method in ("sft", "dpo", "stepdpo")}


def plain_logps(model, ids, start):
    """The field's usual way: one row, all logits, log_softmax, gather, and the sum over the response."""
    ids = torch.from_numpy(ids).long()
    logps = model(ids[None])[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return logps[start - 1:].sum()


@pytest.mark.parametrize("method, dtype, tolerance", [("dpo", torch.float64, 1e-11), ("stepdpo", torch.float64, 1e-11), ("stepdpo", torch.float32, 1e-5)])
def test_prefix_shared_equals_two_separate_rows(encoded, method, dtype, tolerance):
    """Four pairs of uneven lengths in one flat row: the loss and every parameter's gradient as from eight rows of their own.
    (Neighbours in the flat row therefore do not matter either, nor is there padding that could.)"""
    folder, examples = encoded
    examples = examples[method]
    args, ref = argparse.Namespace(beta=0.4), torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=dtype) * 0.1
    model = Llama.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        ref += torch.stack([torch.stack([plain_logps(model, side, e.start) for side in e.sides]) for e in examples])
    grads = []
    for shared in (True, False):
        model = Llama.from_pretrained(folder, dtype=dtype)
        rows = [4, 0, 5, 2]
        if shared:
            batch = data.collate(examples, rows)
            losses, _ = preference_objective(Policy(model)(batch), batch, ref[rows], args)
        else:
            logps = torch.stack([torch.stack([plain_logps(model, side, examples[r].start) for side in examples[r].sides]) for r in rows])
            losses, *_ = dpo_loss(logps[:, 0], logps[:, 1], ref[rows, 0], ref[rows, 1], args.beta)
        losses.mean().backward()
        grads.append((losses.detach(), [p.grad for p in model.parameters()]))
    torch.testing.assert_close(grads[0][0], grads[1][0], atol=tolerance, rtol=0)
    for a, b in zip(grads[0][1], grads[1][1]):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=10 * tolerance)
    assert sum(map(len, [side for r in [4, 0, 5, 2] for side in examples[r].sides])) > len(batch.input_ids if shared else data.collate(examples, rows).input_ids)


def test_with_a_shared_prefix_the_prefixes_own_loss_cancels(encoded):
    """Whole answers that begin alike (a rectified answer and the wrong one it was cut from) have, to rounding, the same margin as their tails: masking the
    prefix changes nothing in a PAIRED loss of sums. It would in a mean, and it does in chosen_logps."""
    folder, examples = encoded
    model = Llama.from_pretrained(folder)
    for dpo in examples["dpo"]:
        tail = data.Example(dpo.where, dpo.chosen, dpo.rejected, dpo.shared, dpo.shared)
        whole, cut = (response_logps(Policy(model)(b), b) for b in (data.collate([e], [0]) for e in (dpo, tail)))
        assert (whole[0] - whole[1]).item() == pytest.approx((cut[0] - cut[1]).item(), abs=1e-3)
        assert abs(whole[0] - cut[0]) > 1


def test_learning_rate_is_the_schedule_of_the_paper():
    """Rises to the peak, then as transformers' schedules (the authors' trainer) say; theirs begins with an update of exactly 0, ours does not."""
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle of this test")
    rates = {}
    for name, make in (("cosine", transformers.get_cosine_schedule_with_warmup), ("linear", transformers.get_linear_schedule_with_warmup)):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=5e-7)
        schedule = make(optimizer, 10, 100)
        expected = []
        for _ in range(100):
            expected.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        rates[name] = [learning_rate(i, 100, 5e-7, 0.1, name) for i in range(100)]
        assert rates[name][10:] == pytest.approx(expected[10:])
        assert rates[name][:10] == pytest.approx(expected[1:11])
    assert rates["cosine"][9] == 5e-7 and 0 < rates["cosine"][99] < 1e-9
