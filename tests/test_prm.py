"""variants/prm.py: the value of a step is two rows of the vocabulary, its labels are shares of right continuations, and its scores go into files."""
import json
import math
import random
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_checkpoint, write_rows
from hypothesis import given
from hypothesis import strategies as st

import data
import stepdpo
from model import Llama
from variants import prm

COMMON = ["--prompt", "raw", "--device", "cpu"]


def solution_of(a: int, b: int, slip: int) -> list[str]:
    return ["Let's think step by step.\nStep 1: Twice is plain.", f"\nStep 2: {a} + {b} = {a + b + slip}{', I think' * slip}.",
            f"\nStep 3: So it is {a + b + slip}.\nThe answer is: {a + b + slip}"]


def valued_rows(n: int) -> list[dict]:
    """Attempts as eval.py --rollouts 4 --every_step --all leaves them: two of each problem, which begin alike; every other one slips in step 2."""
    rng, rows = random.Random(0), []
    for i in range(n):
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        for sample in (0, 1):
            steps = solution_of(a, b, sample)
            values = [[2 + sample, 4], [0, 4], [0, 4]] if sample else [[3, 4], [4, 4], [4, 4]]
            rows.append({"id": f"p{i}", "question": f"{a} + {b}?\n", "answer": str(a + b), "sample": sample, "prefix": "", "completion": "".join(steps),
                         "extracted": str(a + b + sample), "correct": not sample, "stop_reason": "eos", "tokens": 9, "steps": steps, "values": values,
                         "agreement": [[1, 2, 4]] * 3})
    return rows


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prm")
    tiny_checkpoint(folder / "model")
    tiny_checkpoint(folder / "tied", tie_word_embeddings=True)
    write_rows(folder / "valued.jsonl", valued_rows(12))
    assert prm.main(["label", "--attempts", str(folder / "valued.jsonl"), "--out", str(folder / "labels.jsonl")]) == 0
    assert prm.main(train(folder, folder / "trained", "--epochs", "16")) == 0
    return folder


def train(work, out, *more, model="model") -> list[str]:
    return ["train", "--model", str(work / model), "--data", str(work / "labels.jsonl"), "--out", str(out), *COMMON, "--batch_size", "8", "--lr", "3e-3", *more]


def score(work, out, *more) -> list[str]:
    return ["score", "--model", str(work / "trained"), "--attempts", str(work / "valued.jsonl"), "--out", str(out), *COMMON, *more]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def batch_of(work, rows: list[dict]):
    tokenizer = data.Tokenizer.from_pretrained(work / "model")
    examples = [prm.solution("row", row["question"], row["steps"], tokenizer, "raw", row["labels"]) for row in rows]
    return tokenizer, examples, data.collate(examples, range(len(examples)))


# ---------------------------------------------------------------------------------------------------------------- the value

def test_the_value_is_asked_at_the_last_token_of_each_step(work):
    """v of the batch, in which solutions of one problem share their beginning, is sigmoid(logit of " +" - logit of " -") of the plain model after each step."""
    rows = lines(work / "labels.jsonl")[:4]
    tokenizer, _, batch = batch_of(work, rows)
    model = Llama.from_pretrained(work / "model")
    got = prm.value_logits(stepdpo.Policy(model)(batch), batch).split([3] * 4)
    plus, minus = (tokenizer.encode(text).ids[-1] for text in (" +", " -"))
    for row, mine in zip(rows, got):
        for m, logit in enumerate(mine):
            text = row["question"] + "".join(row["steps"][:m + 1])
            plain = model(torch.tensor([tokenizer.encode(text).ids]))[0, -1]
            assert logit.item() == pytest.approx((plain[plus] - plain[minus]).item(), abs=1e-4)


def test_a_token_across_the_end_of_a_step_is_asked(work):
    """A token that holds the step's last character and more of the next one is the step's last; no step is asked for twice."""
    class Merged(data.Tokenizer):
        def encode(self, text, bos=True):
            found = super().encode(text, bos)
            at = text.find(".\nStep 2") + 1 + (self.bos_id is not None and bos)             # "." and "\n" become one token
            return data.Encoded(found.ids[:at] + found.ids[at + 1:], found.offsets[:at - 1] + [(at - 2, at)] + found.offsets[at + 1:])

    tokenizer = Merged.from_pretrained(work / "model")
    steps = solution_of(2, 3, 0)
    example = prm.solution("row", "", steps, tokenizer, "raw")
    places = example.predicted[0][0][:3]
    ends = [tokenizer.encode("".join(steps)).offsets[place] for place in places]
    first = len(steps[0])
    assert ends[0] == (first - 1, first + 1) and ends[1][1] == first + len(steps[1]) and ends[2][1] == len("".join(steps))


def test_the_loss_by_hand(work):
    """Cross-entropy to soft labels, a mean over steps; a step without a label is not asked."""
    rows = [row | {"labels": [row["labels"][0], None, row["labels"][2]]} for row in lines(work / "labels.jsonl")[:2]]
    _, examples, batch = batch_of(work, rows)
    assert [example.units for example in examples] == [2, 2]
    logits = torch.tensor([0.3, -1.2, 2.0, 0.0])                    # two of each row
    logps = torch.cat([logits[:2], torch.zeros(2), logits[2:], torch.zeros(2)])
    batch.source = torch.arange(8)                                  # no place is shared
    batch.predict_at = torch.arange(8)
    losses, metrics = prm.value_objective(logps, None, batch, None)
    labels = [0.75, 1.0, 0.75, 0.0]
    for loss, z, y, off in zip(losses, logits, labels, metrics["squared_error"]):
        v = 1 / (1 + math.exp(-z))
        assert loss.item() == pytest.approx(-y * math.log(v) - (1 - y) * math.log(1 - v), abs=1e-6)
        assert off.item() == pytest.approx((v - y) ** 2, abs=1e-6)


def test_two_rows_of_the_vocabulary_get_a_gradient_and_no_other(work):
    """Exactly 0 for every other row of lm_head, also where several solutions ask at one place, in whatever order a GPU adds. (The control: differences taken
    row by row leave rounding there, of which AdamW would make whole steps.)"""
    rows = lines(work / "labels.jsonl")
    tokenizer, _, batch = batch_of(work, rows)
    assert len(batch.predict_at) < 3 * len(rows)                    # places are shared
    order = torch.randperm(6 * len(rows), generator=torch.Generator().manual_seed(0))
    back = order.argsort()
    model = Llama.from_pretrained(work / "model")
    others = [i for i in range(model.config.vocab_size) if i not in prm.verdict_tokens(tokenizer)]

    def gradient(logits_of):
        model.zero_grad()
        torch.manual_seed(0)
        added = stepdpo.Policy(model)(replace(batch, source=batch.source[order], targets=batch.targets[order]))[back]
        (logits_of(added) * torch.randn(3 * len(rows))).sum().backward()
        return model.lm_head.weight.grad.clone()

    naive = lambda logps: torch.cat([torch.sub(*part.chunk(2)) for part in logps.split(6)])
    ours, theirs = gradient(lambda logps: prm.value_logits(logps, batch)), gradient(naive)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert not ours[others].any() and theirs[others].any()


def test_tied_embeddings_of_tokens_that_do_not_occur_keep_their_bits(work, tmp_path):
    """Input and output embeddings are one matrix: after training, the rows of tokens that stand in no text, and are no verdict, are the same to the bit."""
    assert prm.main(train(work, tmp_path / "out", "--epochs", "2", model="tied")) == 0
    before, after = (Llama.from_pretrained(folder).lm_head.weight for folder in (work / "tied", tmp_path / "out"))
    tokenizer, examples, _ = batch_of(work, lines(work / "labels.jsonl"))
    occur = set(np.concatenate([example.chosen for example in examples]).tolist()) | set(prm.verdict_tokens(tokenizer))
    moved = set((before != after).any(1).nonzero()[:, 0].tolist())
    assert len(occur) < 60 and moved == occur & moved and set(prm.verdict_tokens(tokenizer)) <= moved


def test_it_learns(work, tmp_path):
    """After 16 epochs the loss is far below a constant's, and solutions that it has not seen are told apart at the step that slips."""
    labels = np.array([y for row in lines(work / "labels.jsonl") for y in row["labels"]])
    assert lines(work / "trained" / "metrics.jsonl")[-1]["squared_error"] < 0.25 * labels.var()
    judge = prm.PRM(work / "trained", "raw", device="cpu")
    right, wrong = judge.scores([judge.read("row", "4 + 5?\n", solution_of(4, 5, slip)) for slip in (0, 1)])
    assert right[0] == pytest.approx(wrong[0], abs=1e-4) and right[1] > 0.7 and wrong[1] < 0.3


@pytest.mark.parametrize("shard", [[], ["--shard"]])
def test_two_processes_train_the_same(processes, work, tmp_path, shard):
    """Under torchrun, replicated or sharded, killed and continued: the metrics of one process."""
    argv = [ROOT / "variants" / "prm.py", *train(work, tmp_path / "two", "--max_steps", "4", "--checkpoint_every", "2", *shard)]
    processes.run(*argv, world=2)
    assert prm.main(train(work, tmp_path / "one", "--max_steps", "4")) == 0
    for one, two in zip(lines(tmp_path / "one" / "metrics.jsonl"), lines(tmp_path / "two" / "metrics.jsonl")):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-4)


# --------------------------------------------------------------------------------------------------------------- the labels

def test_labels_are_shares_of_right_rollouts(work):
    first, second = lines(work / "labels.jsonl")[:2]
    assert first["labels"] == [0.75, 1.0, 1.0] and second["labels"] == [0.75, 0.0, 0.0]
    assert first["tries"] == [4, 4, 4] and first["question"] == "8 + 8?\n" and first["steps"] == solution_of(8, 8, 0)


def test_labels_of_a_tree(tmp_path):
    """Without rollouts: of the four solutions that begin with a step, the share that ends right; one that was cut off is no leaf; other problems are other trees."""
    def attempt(sample, steps, right, stop="eos", question="1 + 1?"):
        return {"id": question, "question": question, "answer": "2", "sample": sample, "completion": "".join(steps), "correct": right, "stop_reason": stop,
                "extracted": None, "tokens": 1}
    a, b, c, d = "Step 1: a.", "\nStep 2: b.", "\nStep 2: c.", "\nStep 3: d."
    rows = [attempt(0, [a, b], True), attempt(1, [a, c, d], False), attempt(2, [a, c, "\nStep 3: e."], True), attempt(3, [a, c], False, "length"),
            attempt(0, [a, b], False, question="1 + 2?")]
    file = write_rows(tmp_path / "a.jsonl", rows)
    assert prm.main(["label", "--tree", "--attempts", str(file), "--out", str(tmp_path / "l.jsonl")]) == 0
    got = lines(tmp_path / "l.jsonl")
    assert [row["labels"] for row in got] == [[2 / 3, 1], [2 / 3, 0.5, 0], [2 / 3, 0.5, 1], [0, 0]]
    assert [row["tries"] for row in got] == [[3, 1], [3, 2, 1], [3, 2, 1], [1, 1]]


def test_the_audit_by_hand():
    """Share of 0 and 1, the noise of N rollouts, a prefix that is called hopeless and comes right all the same, what a constant reaches."""
    rows = [{"labels": [0.5, 0.0, 0.25], "tries": [4, 4, 4]}, {"labels": [1.0, 1.0, None], "tries": [4, 4, 0]}]
    found, said = prm.audit(rows, [[True, True, False], [True, True, True]])
    flat = np.array([0.5, 0, 0.25, 1, 1])
    assert found["zero"] == 0.2 and found["one"] == 0.4 and found["revived"] == 1.0 and found["steps"] == 5
    assert found["noise"] == pytest.approx((0.25 / 3 + 0.1875 / 3) / 5 / flat.var())
    assert found["squared_error_of_constant"] == pytest.approx(flat.var()) and found["accuracy_of_constant"] == 0.6
    p = flat.mean()
    assert found["loss_of_constant"] == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p))
    assert found["right_with_0"] == 0.25 and found["wrong_above_0"] == 1.0 and found["auc"] == 0.75
    assert "5 labelled steps" in said


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=30))
def test_auc_is_the_share_of_ordered_pairs(items):
    values, right = [v for v, _ in items], [r for _, r in items]
    pairs = [(x > y) + 0.5 * (x == y) for x, good in items for y, other in items if good and not other]
    got = prm.auc(values, right)
    assert math.isnan(got) if not pairs else got == pytest.approx(sum(pairs) / len(pairs))


def test_the_report_by_hand():
    """Calibration error: the mean distance of what is said from what is true, over tenths of what is said."""
    found, said = prm.report([[0.95, 0.15], [0.95, 0.95]], [[True, False], [True, False]])
    assert found["calibration_error"] == pytest.approx(0.75 * abs(0.95 - 2 / 3) + 0.25 * 0.15)
    assert found["accuracy"] == 0.75 and found["accuracy_of_constant"] == 0.5 and found["auc"] == pytest.approx(3.0 / 4)
    assert math.isnan(found["auc_by_position"][1]) and "0.9-1.0" in said


# --------------------------------------------------------------------------------------------------------------- the scores

def test_scores_are_written_into_attempts(work, tmp_path, capsys):
    """A score a step, and the same as counts, which `data.py localize --judge values` reads; everything else of an attempt stays."""
    assert prm.main(score(work, tmp_path / "s.jsonl")) == 0
    for row, was in zip(lines(tmp_path / "s.jsonl"), valued_rows(12)):
        assert row["values"] == [[round(8 * v), 8] for v in row["scores"]] and row["steps"] == was["steps"]
        changed = ("scores", "values", "agreement", "steps")
        assert {k: v for k, v in row.items() if k not in changed} == {k: v for k, v in was.items() if k not in changed}
    assert data.main(["localize", str(tmp_path / "s.jsonl"), "--judge", "values", "--out", str(tmp_path / "e.jsonl")]) == 0
    assert {row["step"] for row in lines(tmp_path / "e.jsonl")} == {2}
    capsys.readouterr()
    assert prm.main(score(work, tmp_path / "s.jsonl")) == 0 and "already complete" in capsys.readouterr().out
    assert prm.main(score(work, tmp_path / "s.jsonl", "--as_rollouts", "4")) == 2
    assert "as_rollouts was 8, is 4" in capsys.readouterr().err


@pytest.mark.parametrize("world", [1, 2])
def test_scoring_killed_anywhere_gives_the_same_bytes(processes, work, tmp_path, monkeypatch, world):
    """Killed before some of its file operations, and started again."""
    script = tmp_path / "few.py"                                                             # 5 solutions at once: 5 pieces
    script.write_text("import sys\nfrom variants import prm\nprm.AT_ONCE = 5\nsys.exit(prm.main())\n")
    processes.run(script, *score(work, tmp_path / "a" / "s.jsonl"), world=world)
    for before in (3, 5, 4):
        processes.start([str(script), *score(work, tmp_path / "b" / "s.jsonl")], world, tmp_path / "b", kill={"before": before, "rank": 0, "all": True})
        assert -signal.SIGKILL in processes.wait(), processes.log.read_text()
    processes.run(script, *score(work, tmp_path / "b" / "s.jsonl"), world=world)
    assert (tmp_path / "a" / "s.jsonl").read_bytes() == (tmp_path / "b" / "s.jsonl").read_bytes()
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["s.jsonl", "s.summary.json"]


def test_scores_of_another_prm(work, tmp_path, capsys):
    """--scores: joined by id and sample, in whatever order they stand; a row too few, a step too few or a score that is none is named."""
    given_rows = [{"id": row["id"], "sample": row["sample"], "scores": [0.9, 0.25, i / 100]} for i, row in enumerate(valued_rows(12))]
    go = lambda rows: prm.main(["score", "--scores", str(write_rows(tmp_path / "given.jsonl", rows)), "--attempts", str(work / "valued.jsonl"),
                                "--out", str(tmp_path / "s.jsonl"), "--restart"])
    assert go(given_rows[::-1]) == 0
    assert [row["scores"] for row in lines(tmp_path / "s.jsonl")] == [row["scores"] for row in given_rows]
    for rows, said in ((given_rows[:-1], "given.jsonl: has no scores for id 'p11', sample 1"),
                       ([given_rows[0] | {"scores": [0.5]}, *given_rows[1:]], "given.jsonl:1: field 'scores': found 1 entries for 3 steps"),
                       ([given_rows[0] | {"scores": [0.5, 7, 0]}, *given_rows[1:]], "given.jsonl:1: field 'scores': found 7; expected a number from 0 to 1")):
        assert go(rows) == 2 and said in capsys.readouterr().err


def test_scores_against_a_checker(work, tmp_path, capsys, monkeypatch):
    """--checker prints AUC, calibration and what a constant reaches."""
    (tmp_path / "plus.py").write_text("def check(question, steps, answer):\n    return None if answer in steps[1] else 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert prm.main(score(work, tmp_path / "s.jsonl", "--checker", "plus:check")) == 0
    said = capsys.readouterr().out
    assert "72 steps, 66.7% of them right" in said and "a constant: 66.7%" in said and "calibration error" in said


def test_an_attempt_that_cannot_be_scored_is_left_out_by_name(work, tmp_path, capsys):
    """A control token in it, or too long for the PRM; status 1, the others are scored."""
    rows = valued_rows(2)
    rows[1]["completion"] = "Step 1: </s> is no text."
    rows[2]["completion"] *= 9
    file = write_rows(tmp_path / "a.jsonl", rows)
    assert prm.main([*score(work, tmp_path / "s.jsonl"), "--attempts", str(file)]) == 1
    said = capsys.readouterr().err
    assert "a.jsonl:2: cannot be scored: the text contains the control token </s>" in said and "a.jsonl:3: cannot be scored: longer than 512" in said
    assert [row["id"] for row in lines(tmp_path / "s.jsonl")] == ["p0", "p1"]


# --------------------------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("change, said", [
    ({"labels": [0.5, 0.5]}, "labels.jsonl:2: field 'labels': found 2 entries for 3 steps"),
    ({"labels": [0.5, 1.5, 0]}, "labels.jsonl:2: field 'labels': found 1.5; expected a number from 0 to 1"),
    ({"labels": [True, 0, 0]}, "labels.jsonl:2: field 'labels': found True"),
    ({"labels": [None] * 3}, "labels.jsonl:2: field 'labels': holds no number"),
    ({"steps": "Step 1"}, "labels.jsonl:2: field 'steps': expected a list of texts"),
    ({"question": None}, "labels.jsonl:2: field 'question'")])
def test_a_bad_row_is_named(work, tmp_path, capsys, change, said):
    rows = lines(work / "labels.jsonl")[:3]
    file = write_rows(tmp_path / "labels.jsonl", [rows[0], rows[1] | change, rows[2]])
    assert prm.main([*train(work, tmp_path / "out"), "--data", str(file)]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out" / "run.json").exists()


def test_attempts_without_values_say_what_to_do(tmp_path, capsys):
    """A newcomer's slip: plain attempts, from which only --tree makes labels."""
    rows = [{k: v for k, v in row.items() if k not in ("values", "agreement", "steps")} for row in valued_rows(2)]
    assert prm.main(["label", "--attempts", str(write_rows(tmp_path / "a.jsonl", rows)), "--out", str(tmp_path / "l.jsonl")]) == 2
    assert "--rollouts" in capsys.readouterr().err


def test_labels_that_are_there_are_not_overwritten(work, tmp_path, capsys):
    argv = lambda n: ["label", "--attempts", str(write_rows(tmp_path / "v.jsonl", valued_rows(n))), "--out", str(tmp_path / "l.jsonl")]
    assert prm.main(argv(2)) == 0 and prm.main(argv(2)) == 0
    assert prm.main(argv(3)) == 2 and "holds other rows" in capsys.readouterr().err
    assert prm.main([*argv(3), "--restart"]) == 0


def test_the_manual(capsys):
    """python -m variants.prm train --help is the training loop's; of the others, their own."""
    for argv, said in ((["--help"], "the share of right answers"), (["train", "--help"], "--checkpoint_every"), (["label", "--help"], "--tree")):
        with pytest.raises(SystemExit):
            prm.main(argv)
        assert said in capsys.readouterr().out
