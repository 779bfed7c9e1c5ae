"""variants/sacpo.py: two stages, two metrics; KTO's estimate of the KL; averages of weights."""
import json
import math

import numpy as np
import pytest
import torch
from conftest import ROOT, pair_rows, tiny_checkpoint, write_rows
from safetensors.torch import load_file
from test_sdpo import killed_and_continued

import data
import stepdpo
from model import Llama
from variants import sacpo

COMMON = ["--prompt", "alpaca", "--batch_size", "6", "--lr", "1e-3", "--epochs", "2", "--device", "cpu", "--beta", "0.5"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny model; pairs for one metric and for another; single answers with labels (11, an odd number, mostly desirable, so that
    mismatched answers get likelier too and the KL rises); PKU-SafeRLHF's columns."""
    folder = tmp_path_factory.mktemp("sacpo")
    tiny_checkpoint(folder / "model")
    rows = pair_rows(18)
    write_rows(folder / "r.jsonl", rows[:9])
    write_rows(folder / "g.jsonl", rows[9:])
    single = [{"prompt": row["prompt"], "completion": "It is " * 5 + row["answer"] if i % 4 else "Q", "label": i % 4 > 0} for i, row in enumerate(rows[:11])]
    write_rows(folder / "single.jsonl", single)
    write_rows(folder / "pku.jsonl", [
        {"prompt": row["prompt"], "response_0": row["chosen"], "response_1": row["rejected"], "better_response_id": i % 2, "safer_response_id": (i + 1) % 2,
         "is_response_0_safe": i % 3 == 0, "is_response_1_safe": True} for i, row in enumerate(rows[:9])])
    return folder


def arguments(files, out, *more, data="r", then="g", method="stepdpo"):
    return [method, "--model", str(files / "model"), "--data", str(files / f"{data}.jsonl"), "--then", str(files / f"{then}.jsonl"), "--out", str(out), *COMMON,
            *more]


def metrics(out) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def test_two_stages_of_dpo_are_two_runs(files, tmp_path):
    """The second from and against the first's result, at beta / lambda, beginning at log 2: the same bits as by hand."""
    assert sacpo.main(arguments(files, tmp_path / "out", "--lam", "5")) == 0
    for source, start, out, beta in (("r", files / "model", "one", "0.5"), ("g", tmp_path / "one", "two", "0.1")):
        assert stepdpo.main(["stepdpo", "--model", str(start), "--data", str(files / f"{source}.jsonl"), "--out", str(tmp_path / out), "--warmup", "0.03",
                             "--max_length", "512", *COMMON, "--beta", beta]) == 0
    for ours, theirs in ((tmp_path / "out" / "stage1", "one"), (tmp_path / "out", "two")):
        assert (ours / "model.safetensors").read_bytes() == (tmp_path / theirs / "model.safetensors").read_bytes()
        assert metrics(ours)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


# ------------------------------------------------------------------------------------------------------------------ KTO

def kto(files, out, *more, data="single"):
    """A first stage of KTO, three updates; its metrics."""
    assert sacpo.main(arguments(files, out, "--first", "kto", "--second", "kto", "--max_steps", "3", *more, data=data, then=data)) == 0
    return metrics(out / "stage1")


def test_kto_equals_a_plain_loop(files, tmp_path):
    """All logits, two models, mismatched answers row by row, the KL of the whole batch: the same losses for three updates."""
    found = kto(files, tmp_path / "out", "--seed", "3")
    tokenizer = data.Tokenizer.from_pretrained(files / "model")
    args = stepdpo.parser(sacpo.options).parse_args(arguments(files, tmp_path / "out", data="single"))
    stepdpo.settle(args)
    examples, _ = sacpo.KTO("helpful", args).encode(args.data, tokenizer, "stepdpo", "alpaca", 512)
    policy, reference = (Llama.from_pretrained(files / "model") for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)

    def log_ratio(context, answer):
        def logp(model):
            ids = torch.tensor(np.concatenate([context, answer])).long()
            return model(ids[None])[0].log_softmax(-1)[len(context) - 1:-1].gather(1, ids[len(context):, None]).sum()
        with torch.no_grad():
            before = logp(reference)
        return logp(policy) - before

    context = [example.sides[0][:example.start] for example in examples]
    answer = [example.sides[0][example.start:] for example in examples]
    labels = [example.row["label"] for example in examples]
    weight = sum(labels) / (len(labels) - sum(labels))
    plan = [step for epoch in (0, 1) for step in data.epoch_plan(examples, batch_size=6, seed=3, epoch=epoch)]
    for step in range(3):
        rows = [row for of_rank in plan[step] for micro_batch in of_rank for row in micro_batch]
        with torch.no_grad():
            others = [next((row + k) % 11 for k in range(1, 11) if context[(row + k) % 11].tolist() != context[row].tolist()) for row in rows]
            kl = max(0.0, float(sum(log_ratio(context[row], answer[other]) for row, other in zip(rows, others)) / len(rows)))
        losses = []
        for row in rows:
            reward, sign = 0.5 * log_ratio(context[row], answer[row]), 1 if labels[row] else -1
            losses.append((1.0 if labels[row] else weight) * (1 - torch.sigmoid(sign * (reward - 0.5 * kl))))
        loss = torch.stack(losses).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = stepdpo.learning_rate(step, 3, 1e-3, 0.03, "cosine")
        optimizer.step()
        optimizer.zero_grad()
        assert found[step]["loss"] == pytest.approx(loss.item(), abs=2e-5) and found[step]["kl"] == pytest.approx(kl, abs=2e-4)
    assert found[2]["kl"] > 0


def test_kto_begins_at_half_the_weights(files, tmp_path):
    """policy = reference: every reward and the KL are 0, so a loss is its weight times 1/2."""
    rows = [row for _, row in data.read_rows(files / "single.jsonl")]
    good = sum(row["label"] for row in rows)
    found = kto(files, tmp_path / "out", "--batch_size", "11")[0]
    assert found["loss"] == pytest.approx((good + (11 - good) * good / (11 - good)) / 11 / 2, abs=1e-5) and found["kl"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("more, world", [(["--micro_batch_size", "1"], 1), (["--micro_batch_size", "4"], 1), ([], 2), (["--micro_batch_size", "1"], 2),
                                         (["--shard"], 2)])
def test_the_kl_is_of_the_global_batch(processes, files, tmp_path, more, world):
    """However a batch is cut into micro-batches and processes, losses and KL are the same (TRL once took one micro-batch's, or only the last's)."""
    whole_batch = kto(files, tmp_path / "whole")
    processes.run(str(ROOT / "variants" / "sacpo.py"), *arguments(files, tmp_path / "cut", "--first", "kto", "--second", "kto", "--max_steps", "3", *more,
                                                                 data="single", then="single"), world=world)
    assert whole_batch[2]["kl"] > 0.01
    for ours, theirs in zip(metrics(tmp_path / "cut" / "stage1"), whole_batch):
        assert {k: pytest.approx(v, abs=2e-4, rel=1e-3) for k, v in theirs.items()} == ours


@pytest.mark.parametrize("count", [2, 3, 7])
def test_no_answer_meets_its_own_prompt(count):
    """Pairs unpaired stand side by side with one prompt, and a count may be odd: still every mismatched answer is another prompt's."""
    examples = [data.Example(f"{i}", [np.array([i // 2, 100 + i])], 1, [np.zeros(1)]) for i in range(count + 1)]
    for example, other in zip(examples, sacpo.mismatch(examples, None)):
        assert other.sides[0][0] == example.sides[0][0] and (other.sides[0][1] - 100) // 2 != example.sides[0][0]


def test_batches_of_one_answer(files, tmp_path):
    """Its mismatched answer comes from the file, not from the batch: the KL is no longer that of the answer itself."""
    found = kto(files, tmp_path / "out", "--batch_size", "1", "--lr", "1e-2")
    assert len({round(line["kl"], 6) for line in found}) > 1


def test_the_kl_has_no_gradient(files):
    """A number, not a tensor; below 0 it is 0."""
    below = sacpo.kl_estimate(torch.tensor([-3.0, -2.0], requires_grad=True), torch.tensor([-1.0, -1.0]))
    above = sacpo.kl_estimate(torch.tensor([-1.0, -1.0], requires_grad=True), torch.tensor([-3.0, -2.0]))
    assert (below, above) == (0.0, 1.5) and isinstance(above, float)


def test_held_out_answers(files, tmp_path):
    """--eval_data in KTO: the held-out rows' own KL estimate."""
    kto(files, tmp_path / "out", "--eval_data", str(files / "single.jsonl"), "--batch_size", "11")
    held = json.loads((tmp_path / "out" / "stage1" / "eval.jsonl").read_text().splitlines()[-1])
    assert held["kl"] > 0 and 0 < held["loss"] < 1


# ----------------------------------------------------------------------------------------------------------------- rows

def test_columns_of_pku(files, tmp_path, capsys):
    """One file, two metrics: the first stage reads which answer is better, the second which is safe; --safety_first exchanges them."""
    for more in ([], ["--safety_first"]):
        argv = arguments(files, tmp_path / f"out{len(more)}", "--first", "kto", "--second", "kto", "--max_steps", "1", *more, data="pku", then="pku", method="dpo")
        assert sacpo.main(argv) == 0
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("KTO:")]
        helpful, safe = ("KTO: 9 desirable answers, 9 undesirable ones", "KTO: 12 desirable answers, 6 undesirable ones")
        assert [line.partition(", weight")[0] for line in said] == ([helpful, safe] if not more else [safe, helpful])


def test_pairs_train_kto_as_two_answers(files, tmp_path):
    """A chosen step is a desirable answer, a rejected one an undesirable one, in the context of the same steps."""
    found = kto(files, tmp_path / "out", "--batch_size", "18", data="r")
    assert found[0]["loss"] == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize("row, more, said", [
    ({"prompt": "a", "completion": "b", "label": "yes"}, ["--first", "kto"], "label is 'yes'; expected true (desirable) or false"),
    ({"prompt": "a", "completion": "b", "label": True}, [], "a single answer with a label, where DPO takes pairs: choose kto"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, ["--first", "kto"], "all rows have the same one"),
    ({"prompt": "a", "response_0": "b", "response_1": "c", "better_response_id": 2}, [], "better_response_id is 2; expected 0 or 1"),
    ({"prompt": "a", "response_0": "b", "response_1": "c"}, ["--safety_first"], "safer_response_id is None; expected 0 or 1"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, ["--lam", "0"], "--lam is 0: expected a number above 0"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, ["--lam", "inf"], "--lam is inf: expected a number above 0"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, ["--merge", "0.5", "1.5"], "--merge 1.5: expected a share from 0 to 1"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, ["--reference", "x"], "--reference has no place in it")])
def test_bad_input_gets_one_line(files, tmp_path, capsys, row, more, said):
    """File, field, remedy; and nothing is trained."""
    write_rows(tmp_path / "bad.jsonl", [row, row])
    argv = ["dpo", "--model", str(files / "model"), "--data", str(tmp_path / "bad.jsonl"), "--out", str(tmp_path / "out"), *COMMON, *more]
    assert sacpo.main(argv) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "out" / "stage1" / "config.json").exists()


@pytest.mark.parametrize("rows, said", [
    ([{"prompt": "a", "completion": "b", "label": True}, {"prompt": "c", "chosen": "d", "rejected": "e"}], "bad.jsonl:2: no single answer with a label"),
    ([{"prompt": "a", "completion": "b", "label": True}, {"prompt": "c", "completion": "d", "label": True}], "found 2 desirable ones of 2"),
    ([{"prompt": "a", "completion": "b", "label": False}, {"prompt": "c", "completion": "d", "label": False}], "found 0 desirable ones of 2")])
def test_rows_that_kto_cannot_learn_from(files, tmp_path, capsys, rows, said):
    """Pairs among single answers would be left out in silence; answers of one kind alone would have no weight."""
    write_rows(tmp_path / "bad.jsonl", rows)
    assert sacpo.main(["dpo", "--model", str(files / "model"), "--data", str(tmp_path / "bad.jsonl"), "--out", str(tmp_path / "out"), *COMMON, "--first", "kto"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_averages(files, tmp_path):
    """q = 0 is the first stage and q = 1 the second, bit for bit; between them every weight lies on the straight line."""
    assert sacpo.main(arguments(files, tmp_path / "out", "--merge", "0", "0.25", "1")) == 0
    read = lambda name: load_file(tmp_path / "out" / name / "model.safetensors")
    first, second, quarter = read("stage1"), read("."), read("q0.25")
    assert all(torch.equal(read("q0")[k], first[k]) and torch.equal(read("q1")[k], second[k]) for k in first)
    for k in first:
        torch.testing.assert_close(quarter[k].double(), 0.25 * second[k].double() + 0.75 * first[k].double(), atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("world", [1, 2])
def test_killed_anywhere(processes, files, tmp_path, world):
    """A kill before any file operation, in any stage, and the same command again: the same files. Another lambda does not go on."""
    argv = lambda out: [str(ROOT / "variants" / "sacpo.py"), *arguments(files, out, "--first", "kto", "--checkpoint_every", "1", "--merge", "0.5")]
    out = killed_and_continued(processes, argv, tmp_path, world, "sacpo")
    processes.start([*argv(out), "--lam", "9"], world)
    assert 2 in processes.wait() and "beta: 0.125 then, 0.05" in processes.log.read_text()
