"""The equations: by hand, against float64, and by another road through the network."""
import argparse
import dataclasses
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, pair_rows, tiny_checkpoint, write_rows

import data
import stepdpo
from model import Llama, common_length
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
    batch = SimpleNamespace(response=torch.tensor([0, 0, 1]), responses=2)
    losses, metrics = preference_objective(torch.tensor([-0.5, -1.0, -2.0]), torch.tensor([-1.5, -0.5, -1.5]), batch,
                                           argparse.Namespace(beta=2.0))
    assert losses.tolist() == pytest.approx([0.126928], abs=1e-6)
    assert {k: v.item() for k, v in metrics.items()} == {"accuracy": 1.0, "margin": 2.0, "chosen_reward": 1.0, "rejected_reward": -1.0,
                                                         "chosen_logps": -1.5, "rejected_logps": -2.0}


def test_a_response_is_the_sum_of_its_tokens():
    """The example in response_logps' docstring."""
    batch = SimpleNamespace(response=torch.tensor([0, 0, 0, 1, 1]), responses=2)
    assert response_logps(torch.tensor([-0.5, -1.0, -0.5, -0.2, -0.3]), batch).tolist() == pytest.approx([-2.0, -0.5])


@pytest.mark.parametrize("at_once", [1, 40, 2**24])
@pytest.mark.parametrize("source", [None, [0, 1, 2, 3, 4, 5, 6], [3, 0, 0, 4, 3, 0, 2]], ids=["by default", "each its own", "shared"])
def test_fused_logprobs_equal_the_plain_way_in_float64(monkeypatch, at_once, source):
    """Value, gradient of the hidden states and of lm_head, for uneven token weights, whatever the chunk, where a hidden
    state predicts one token, several (the token before a fork; twice the same one) or none; and torch's own gradcheck."""
    monkeypatch.setattr(stepdpo, "LOGITS_AT_ONCE", at_once)
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(7, 5, generator=g, dtype=torch.float64), torch.randn(11, 5, generator=g, dtype=torch.float64)
    targets, credit = torch.randint(0, 11, (7,), generator=g), torch.randn(7, generator=g, dtype=torch.float64)
    targets[5] = targets[2]
    more = () if source is None else (torch.tensor(source),)
    at = torch.arange(7) if source is None else more[0]
    results = []
    for fused in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logps = FusedLogProbs.apply(h, w, targets, *more) if fused else (h @ w.T).log_softmax(-1)[at, targets]
        (logps * credit).sum().backward()
        results.append((logps.detach(), h.grad, w.grad))
    for fused, plain in zip(*results):
        torch.testing.assert_close(fused, plain, atol=1e-12, rtol=1e-12)
    torch.autograd.gradcheck(lambda h, w: FusedLogProbs.apply(h, w, targets, *more),
                             (hidden.requires_grad_(), weight.requires_grad_()), nondet_tol=1e-14)


def test_fused_logprobs_where_gradients_cancel():
    """A fork at which both branches go on with the same token: the gradients +1 and -1 of one place add up to nothing."""
    h, w = torch.randn(2, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True)
    logps = FusedLogProbs.apply(h, w, torch.tensor([4, 4, 7]), torch.tensor([0, 0, 1]))
    (logps[0] - logps[1]).backward()
    assert not h.grad.any() and not w.grad.any()


def test_fused_logprobs_of_a_frozen_vocabulary():
    """Where lm_head is frozen no gradient of it is computed, and that of the hidden states is the same."""
    h, w = torch.randn(3, 5, requires_grad=True), torch.randn(11, 5)
    FusedLogProbs.apply(h, w, torch.arange(3)).sum().backward()
    plain, = torch.autograd.grad((h @ w.T).log_softmax(-1)[torch.arange(3), torch.arange(3)].sum(), h)
    torch.testing.assert_close(h.grad, plain)


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


def by_separate_rows(model, examples):
    """(n, K) log-probs of whole responses, each text a row of its own with all its logits."""
    return torch.stack([torch.stack([plain_logps(model, side, e.start) for side in e.sides]) for e in examples])


def in_a_tree_and_apart(folder, dtype, examples):
    """[(log-probs (n, K), every parameter's gradient of an uneven sum of them)] from one flat row, and from separate rows."""
    credit = torch.randn(len(examples), len(examples[0].sides), generator=torch.Generator().manual_seed(1), dtype=dtype)
    results = []
    for tree in (True, False):
        model = Llama.from_pretrained(folder, dtype=dtype)
        if tree:
            batch = data.collate(examples, range(len(examples)))
            logps = response_logps(Policy(model)(batch), batch).view(credit.shape)
        else:
            logps = by_separate_rows(model, examples)
        (logps * credit).sum().backward()
        results.append((logps.detach(), [p.grad for p in model.parameters()]))
    return batch, results


def close(results, logps, gradients):
    (tree, of_tree), (apart, of_apart) = results
    torch.testing.assert_close(tree, apart, atol=logps, rtol=0)
    for a, b in zip(of_tree, of_apart):
        torch.testing.assert_close(a, b, atol=gradients, rtol=0)


@pytest.mark.parametrize("method", ["dpo", "stepdpo"])
@pytest.mark.parametrize("dtype, logps, gradients", [(torch.float64, 1e-10, 1e-9), (torch.float32, 1e-3, 1e-3)])
def test_pairs_in_a_tree_equal_separate_rows(encoded, method, dtype, logps, gradients):
    """Pairs of uneven lengths in one flat row: log-probs and every parameter's gradient as from rows of their own.
    (Neighbours in the flat row therefore do not matter either, nor is there padding that could.)"""
    folder, examples = encoded
    batch, results = in_a_tree_and_apart(folder, dtype, examples[method])
    close(results, logps, gradients)
    assert len(batch.input_ids) < sum(len(side) for e in examples[method] for side in e.sides)


def test_pairs_of_one_problem_in_a_tree_equal_separate_rows(tmp_path):
    """Several pairs of one problem, cut at different steps, with several winners of one error and an error that is the
    beginning of another: far fewer tokens, the same numbers."""
    folder = tiny_checkpoint(tmp_path)
    steps = "Step 1: 3 + 4 = 7.\nStep 2: 7 * 2 = 14.\nStep 3: 14 - 5 = 9."
    rows = [{"prompt": "Ann has 3 apples.", "initial_reason_steps": steps[:cut], "chosen": good, "rejected": bad}
            for cut, good, bad in ((7, " 3 + 4 = 7.", " 3 * 4 = 12."), (26, " 7 * 2 = 14.", " 7 + 2 = 9."),
                                   (26, " 7 * 2 is 14.", " 7 + 2 = 9."), (26, " 2 * 7 = 14.", " 7 + 2 = 9. Then"),
                                   (47, " 14 - 5 = 9.", " 14 - 5 = 8."))]
    rows.append(rows[0] | {"prompt": "Ann has 30 apples."})
    examples, _ = data.encode_dataset([(f"row:{i}", row) for i, row in enumerate(rows)],
                                      data.Tokenizer.from_pretrained(folder), "stepdpo", "alpaca")
    batch, results = in_a_tree_and_apart(folder, torch.float64, examples)
    close(results, 1e-10, 1e-9)
    apart = sum(example.length for example in examples)
    assert len(batch.input_ids) < apart / 2 and len(batch.predict_at) < len(batch.targets)
    assert data.tokens_in_tree([side for e in examples for side in e.sides]) == len(batch.input_ids)


def test_K_responses_in_a_tree_equal_separate_rows(encoded):
    """A row may hold any number of responses: a group of three answers, one of which is the beginning of another."""
    folder, _ = encoded
    tokenizer = data.Tokenizer.from_pretrained(folder)
    row = data.Texts("row:1", {}, "x", "What is 3 + 4?\n", "", ["It is 7.", "It is 7. I think.", "It is 12."])
    examples = data.to_examples([row], tokenizer, None, None, data.Report("rows"))
    assert len(examples[0].sides) == 3 and data.collate(examples, [0]).responses == 3
    _, results = in_a_tree_and_apart(folder, torch.float64, examples)
    close(results, 1e-10, 1e-9)


def test_sibling_pairs_of_a_search_tree_equal_separate_rows(assets, tmp_path):
    """MATH-APS: pairs of siblings from real search trees (children of one node, a better one against a worse one)."""
    tree = next(json.loads(line) for line in open(assets / "prefs" / "openr_samples_math-aps-tree.jsonl"))
    rows = sibling_pairs(tree)[:24]
    folder = tiny_checkpoint(tmp_path, max_position_embeddings=8192)
    examples, _ = data.encode_dataset([(f"row:{i}", row) for i, row in enumerate(rows)],
                                      data.Tokenizer.from_pretrained(folder), "stepdpo", "raw")
    batch, results = in_a_tree_and_apart(folder, torch.float64, examples)
    close(results, 1e-9, 1e-8)
    assert len(batch.input_ids) * 1.5 < sum(example.length for example in examples)


def sibling_pairs(tree: dict) -> list[dict]:
    """Of every node the better of two neighbouring children against the worse."""
    pairs, todo = [], [(tree["reasoning_steps"], "\n")]
    while todo:
        node, prefix = todo.pop()
        for a, b in zip(node["children"], node["children"][1:]):
            better, worse = sorted((a, b), key=lambda child: -child["mc_value"])
            if better["mc_value"] > worse["mc_value"] and better["text"] != worse["text"]:
                pairs.append({"prompt": tree["question"], "initial_reason_steps": prefix, "chosen": better["text"],
                              "rejected": worse["text"]})
        todo += [(child, prefix + child["text"] + "\n") for child in node["children"]]
    return pairs


def test_places_may_be_asked_for_tokens_of_ones_own(encoded):
    """A verifier asks for "+" and "-" behind each step instead of for the response."""
    folder, examples = encoded
    example = dataclasses.replace(examples["sft"][0], asked=[(np.array([9, 9, 20, 20]), np.array([5, 7, 5, 7]))],
                                  steps=[np.array([0, 0, 1, 1])])
    model = Llama.from_pretrained(folder)
    batch = data.collate([example], [0])
    logits = model(torch.from_numpy(example.chosen).long()[None])[0].log_softmax(-1)
    torch.testing.assert_close(Policy(model)(batch), logits[[9, 9, 20, 20], [5, 7, 5, 7]], atol=1e-5, rtol=0)
    assert batch.predict_at.tolist() == [9, 20]


def test_with_a_shared_prefix_the_prefixes_own_loss_cancels(encoded):
    """Whole answers that begin alike (a rectified answer and the wrong one it was cut from) have, to rounding, the same
    margin as their tails: masking the prefix changes nothing in a PAIRED loss of sums. It would in a mean, and it does
    in chosen_logps."""
    folder, examples = encoded
    model = Llama.from_pretrained(folder)
    for dpo in examples["dpo"]:
        fork = common_length(dpo.chosen, dpo.rejected)
        tail = dataclasses.replace(dpo, start=fork, steps=[steps[fork - dpo.start:] for steps in dpo.steps])
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
