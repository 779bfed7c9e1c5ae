"""variants/scdpo.py: naive pairs, forks under a rising temperature, filters, one mix; and the credit of each step."""
import argparse
import json
import random
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, pair_rows, write_rows
from test_eval import checkpoint, rows_of  # noqa: F401  (a fixture)

import data
import eval as ev
import stepdpo
from eval import Drawn, Problem, Prompt
from examples import arithmetic
from examples.siblings.__main__ import main as siblings_main
from model import Llama
from variants import scdpo

RIGHT = "Step 1: 1 + 2 = 3.\nStep 2: 3 + 3 = 6.\nStep 3: 6 + 1 = 7.\nStep 4: 7 + 2 = 9.\nThe answer is 9"
WRONG = RIGHT.replace("7 + 2 = 9", "7 + 2 = 8").replace("is 9", "is 8")


def attempt(id, text=RIGHT, sample=0, correct=None, **more) -> dict:
    correct = text.endswith("9") if correct is None else correct
    return {"id": id, "question": f"{id} + a\n", "answer": "9", "sample": sample, "completion": text, "correct": correct, "stop_reason": "eos", **more}


def attempts(path: Path, count: int = 9) -> Path:
    return write_rows(path, [attempt(i, text, sample) for i in range(count) for sample, text in enumerate([RIGHT, WRONG])])


def pairs_command(checkpoint, file, out, *more, source="--attempts") -> list[str]:  # noqa: F811
    return ["pairs", "--model", str(checkpoint), source, str(file), "--out", str(out), "--prompt", "raw", "--max_new_tokens", "12", "--device", "cpu",
            "--batch_size", "4", "--tries", "12", *map(str, more)]


def problems(path: Path, count: int = 12) -> Path:
    """Solutions begun, so that a model that says nothing of worth is often right."""
    begun = RIGHT[:RIGHT.index(" 7 + 2")]
    return write_rows(path, [{"id": i, "question": f"{i} + a\n", "answer": "7", "prefix": begun} for i in range(count)])


def result(out: Path) -> dict:
    """All that a finished run leaves beside `out`, without its timings."""
    found = {path.name: path.read_bytes() for path in out.parent.iterdir()}
    for name in found:
        if name.endswith(".summary.json"):
            found[name] = json.loads(found[name]) | {"seconds": None}
    return found


# --------------------------------------------------------------------------------------------------------------- forks

class Scripted:
    """A sampler that writes the given steps, and remembers how hot each was drawn and behind what."""

    def __init__(self, tail: list[str]):
        self.tail, self.heat, self.read = tail, [], []

    def prepare(self, problem, text, cut=None):
        return Prompt([1], text, False)

    def draw(self, prompts, n, seed, temperature=0.0, **how):
        for i, prompt in enumerate(prompts):
            step = self.tail[len(self.heat)]
            self.read.append(prompt.text)
            yield i, 0, Drawn(step, 3, "eos" if len(self.heat) + 1 == len(self.tail) else "stop")
        self.heat.append(temperature)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("rise, wanted", [(0.05, [1.1, 1.15, 1.2]), (0.1, [1.1, 1.2, 1.3])])
def test_every_step_after_the_fork_is_hotter_than_the_last(k, rise, wanted):
    """i counts from the fork, wherever that is; each step is drawn behind the kept ones and those before it, and the tail ends where the model ends it."""
    steps = [f"\nStep {k + 1 + i}: 3 + {i} = 4." for i in range(3)]
    said = [step + f"\nStep {k + 2 + i}:" for i, step in enumerate(steps[:-1])] + steps[-1:]
    sampler, right = Scripted(said), tuple(data.split_steps(RIGHT))
    fork = scdpo.Fork(Problem("f:1", "p", "q\n", "9", "", {}), right, k)
    (tail, ended), = scdpo.sample_tails(sampler, [fork], lambda i: scdpo.temperature(i, rise), 0, "auto", 20)
    assert sampler.heat == pytest.approx(wanted) and tail == steps and ended
    assert [text for text in sampler.read] == ["".join([*right[:k], *steps[:i]]) for i in range(3)]


def test_the_ramp_stops_at_its_cap():
    assert scdpo.temperature(100) == scdpo.temperature(3, 0.1) == 1.4 and scdpo.temperature(5, 0, 1.0) == 1.0


def test_a_cap_drawn_at_random_over_k():
    """Every step that may be kept is equally likely (3.3 sigma of a binomial), none twice in a problem, and none of the last two steps or no step at all."""
    steps, drawn = ["s"] * 8, Counter()
    for seed in range(3000):
        ks = scdpo.draw_forks(steps, 2, random.Random(seed))
        assert len(set(ks)) == 2
        drawn.update(ks)
    assert set(drawn) == set(range(1, 7)) and all(abs(n - 1000) < 3.3 * (3000 * 1 / 3 * 2 / 3) ** 0.5 for n in drawn.values())
    assert sorted(scdpo.draw_forks(steps, 99, random.Random(0))) == list(range(1, 7))
    assert scdpo.draw_forks(["s", "s"], 2, random.Random(0)) == []


# ------------------------------------------------------------------------------------------------------------- filters

@pytest.mark.parametrize("text, use", [
    (RIGHT, "right"), (WRONG, "wrong"), (RIGHT.replace("Step 2", "Step 2: I apologize,"), "apology"), ("An Error: " + RIGHT, "apology"),
    ("\n".join(f"Step {i}: 1 = 1." for i in range(1, 24)) + "\nThe answer is 9", "garbled"), (RIGHT + " <|python|> 9", "garbled"),
    (RIGHT + " </s> 9", "garbled"),
    ("Step 1: " + "a" * 3000, "garbled"), ("...", "unfinished")])
def test_what_an_attempt_is_used_for(work, text, use):
    tokenizer = data.Tokenizer.from_pretrained(work / "model")
    row = {"correct": text.endswith("9"), "answer": "9", "stop_reason": "eos"}
    assert scdpo.use_of(row, text, "auto", tokenizer) == use
    if use in ("right", "wrong"):
        assert scdpo.use_of(row | {"stop_reason": "length"}, text, "auto", tokenizer) == "unfinished"


def test_near_duplicates_come_to_the_same_in_every_step():
    a = data.split_steps(RIGHT)
    assert scdpo.alike(a, data.split_steps(RIGHT.replace("Step 2: ", "Step 2: Then ")), "auto")
    assert not scdpo.alike(a, data.split_steps(WRONG), "auto") and not scdpo.alike(a, a[:-1], "auto")


def test_a_wrong_tail_that_says_the_same_again_is_no_second_pair():
    """Two forks of a solution that go wrong in the same way: one pair. The naive pair's wrong answer counts as well."""
    args = argparse.Namespace(steps="auto", per_problem=2, seed=0)
    right, other = data.split_steps(RIGHT), RIGHT.replace("6 + 1 = 7.", "6 + 1 = 6.").replace("is 9", "is 7")
    row = attempt("p") | {"text": RIGHT, "where": "f:1"}
    forks = [scdpo.Fork(Problem("f:1", "p", row["question"], "9", "", {}), tuple(right), k) for k in (1, 2)]
    tails = lambda text: {(f, 0): ["wrong", data.split_steps(text)[k:]] for f, k in ((0, 1), (1, 2))}
    rows, _ = scdpo.collect(tails(other), {"p": [row, None]}, forks, args)
    assert [r["initial_reason_steps"] for r in rows] == [right[0]]
    rows, _ = scdpo.collect(tails(WRONG), {"p": [row, row | {"text": WRONG}]}, forks, args)
    assert [r["initial_reason_steps"] for r in rows] == [""]


# ------------------------------------------------------------------------------------------------------- the whole way

def test_pairs_keep_the_right_steps_and_both_tails_end(checkpoint, tmp_path):  # noqa: F811
    """A step-controlled row: kept steps + right tail is the right solution; the wrong tail leaves it there, is graded wrong, and in training both sides end
    in the end token. `chosen` and `rejected` are the first steps of the tails."""
    assert scdpo.main(pairs_command(checkpoint, attempts(tmp_path / "a.jsonl"), out := tmp_path / "p.jsonl")) == 0
    rows = rows_of(out)
    forked = [row for row in rows if row["initial_reason_steps"]]
    assert len(rows) - len(forked) == 9 and len(forked) > 9
    assert [bool(row["initial_reason_steps"]) for row in rows] != sorted(bool(row["initial_reason_steps"]) for row in rows), "one shuffled mix"
    for row in forked:
        kept, right = data.split_steps(row["initial_reason_steps"]), data.split_steps(RIGHT)
        assert kept == right[:len(kept)] and len(kept) in (1, 2) and row["initial_reason_steps"] + row["full_chosen"] == RIGHT
        assert row["chosen"] == right[len(kept)] and row["full_rejected"].startswith(row["rejected"])
        assert ev.grade(row["initial_reason_steps"] + row["full_rejected"], "9")[1] is False
    tokenizer = data.Tokenizer.from_pretrained(checkpoint)
    examples, report = data.encode_dataset(out, tokenizer, "dpo", "raw")
    assert report.kept == len(rows) and all(side[-1] == 1 and 1 not in side[1:-1] for e in examples for side in e.sides)
    assert max(Counter(row["prompt"] for row in forked).values()) == 2


def test_from_problems_alone(checkpoint, tmp_path):  # noqa: F811
    """At temperature 1 until one answer is right and one is wrong: no try after that, none beyond --tries; the attempts are eval.py's rows."""
    file = problems(tmp_path / "q.jsonl")
    assert scdpo.main(pairs_command(checkpoint, file, out := tmp_path / "p.jsonl", source="--problems")) == 0
    tried, tokenizer = {}, data.Tokenizer.from_pretrained(checkpoint)
    for _, row in data.read_attempts(str(tmp_path / "p.attempts.jsonl"), [], "attempts"):
        tried.setdefault(row["id"], []).append(scdpo.use_of(row, row["text"], "auto", tokenizer))
    both = lambda uses: {"right", "wrong"} <= set(uses)
    assert len(tried) == 12 and any(both(uses) for uses in tried.values())
    for uses in tried.values():
        assert both(uses) and not both(uses[:-1]) if both(uses) else len(uses) == 12
    assert sum(not row["initial_reason_steps"] for row in rows_of(out)) == sum(map(both, tried.values())) < len(rows_of(out))


AT_A_LINE = """
import os, signal, sys
import data
from model import leave_processes
from variants import scdpo

(journal, left), write = (sys.argv.pop(1), int(sys.argv.pop(1))), data.Journal.write

def counted(self, entry):
    global left
    left -= self.path.name.startswith(journal)
    if left == 0:
        os.killpg(0, signal.SIGKILL)
    write(self, entry)

data.Journal.write = counted
sys.exit(leave_processes(scdpo.main()))
"""


@pytest.mark.parametrize("world", [1, 2])
def test_killed_in_both_stages_it_ends_in_the_same_bytes(processes, checkpoint, tmp_path, world):  # noqa: F811
    """Killed before lines of the attempts' journal and of the forks'. And two processes write what one writes."""
    (script := tmp_path / "killed.py").write_text(AT_A_LINE)
    file, whole, killed = problems(tmp_path / "q.jsonl"), tmp_path / "whole" / "p.jsonl", tmp_path / "killed" / "p.jsonl"
    assert scdpo.main(pairs_command(checkpoint, file, whole, source="--problems")) == 0
    for journal, line in (("p.attempts", 7), ("p.attempts", 12), ("p.jsonl", 2), ("p.jsonl", 3)):
        processes.start([str(script), journal, str(line), *pairs_command(checkpoint, file, killed, source="--problems")], world)
        assert -signal.SIGKILL in processes.wait() and not killed.exists(), processes.log.read_text()
        assert (tmp_path / "killed" / "p.attempts.jsonl").exists() == (journal == "p.jsonl")
    processes.run(script, "-", "-1", *pairs_command(checkpoint, file, killed, source="--problems"), world=world)
    assert result(whole) == result(killed)


def test_other_settings_or_attempts_are_refused_by_name(checkpoint, tmp_path, capsys):  # noqa: F811
    file, out = attempts(tmp_path / "a.jsonl"), tmp_path / "p.jsonl"
    assert scdpo.main(pairs_command(checkpoint, file, out)) == 0
    before = out.read_bytes()
    assert scdpo.main(pairs_command(checkpoint, file, out)) == 0 and "already complete" in capsys.readouterr().out
    for more, said in ((["--rise", 0.1], "rise was 0.05, is 0.1"), (["--cap", 1.2], "cap was 1.4, is 1.2"), (["--per_problem", 1], "per_problem was 2, is 1"),
                       (["--seed", 1], "seed was 0, is 1"), (["--temperature", 1], "temperature was 1.1, is 1.0")):
        assert scdpo.main(pairs_command(checkpoint, file, out, *more)) == 2
        assert said in capsys.readouterr().err and out.read_bytes() == before
    attempts(file, 8)
    assert scdpo.main(pairs_command(checkpoint, file, out)) == 2 and "attempts was" in capsys.readouterr().err
    assert scdpo.main(pairs_command(checkpoint, file, out, "--restart")) == 0 and out.read_bytes() != before


@pytest.mark.parametrize("rows, said", [
    ([attempt(0, WRONG)], "holds no right solution to fork"), ([{"question": "q", "answer": "9"}], "a.jsonl:1"),
    ([{"prompt": "q", "chosen": "a", "rejected": "b"}], "a.jsonl:1")])
def test_a_file_that_is_no_attempts_ends_in_one_line(checkpoint, tmp_path, capsys, rows, said):  # noqa: F811
    assert scdpo.main(pairs_command(checkpoint, write_rows(tmp_path / "a.jsonl", rows), tmp_path / "p.jsonl")) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and said in error[0]


def test_a_bad_row_is_named_and_the_rest_is_done(checkpoint, tmp_path, capsys):  # noqa: F811
    file = attempts(tmp_path / "a.jsonl", 3)
    with file.open("a") as f:
        f.write(json.dumps(attempt(7) | {"correct": "yes"}) + "\n")
    assert scdpo.main(pairs_command(checkpoint, file, tmp_path / "p.jsonl")) == 1
    assert "a.jsonl:7: field 'correct'" in capsys.readouterr().err and rows_of(tmp_path / "p.jsonl")


@pytest.mark.parametrize("more, said", [
    (["--temperature", "1.5"], "expected 0 < T <= cap"), (["--temperature", "nan"], "expected 0 < T <= cap"), (["--rise", "-0.1"], "--rise"),
    (["--tries", "0"], "--tries"), (["--api_model", "m"], "belong together"), (["--problems", "q.jsonl"], "not allowed with")])
def test_unusable_arguments_end_in_one_line(checkpoint, tmp_path, capsys, more, said):  # noqa: F811
    with pytest.raises(SystemExit) as end:
        scdpo.main(pairs_command(checkpoint, tmp_path / "a.jsonl", tmp_path / "p.jsonl", *more))
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_a_server_that_is_not_there_ends_in_one_line(checkpoint, tmp_path, capsys, monkeypatch):  # noqa: F811
    """Nothing half-made is left under the name of the file."""
    def refused(self, body):
        raise data.EndpointError(f"{self.url}: no connection; start the server, then the same command continues")
    monkeypatch.setattr(data.Endpoint, "ask", refused)
    argv = pairs_command(checkpoint, attempts(tmp_path / "a.jsonl"), tmp_path / "p.jsonl", "--endpoint", "http://127.0.0.1:9/v1", "--api_model", "m")
    assert scdpo.main(argv) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: http://127.0.0.1:9/v1: no connection") and not (tmp_path / "p.jsonl").exists()


def test_a_server_is_asked_step_by_step(checkpoint, tmp_path, monkeypatch):  # noqa: F811
    """It samples on to the end of the solution; of that only the next step is taken, and the one behind it is asked for again, hotter."""
    asked: dict[str, list] = {}

    def ask(self, body):
        question, begun = body["prompt"].split("\n", 1)
        asked.setdefault(question, []).append((len(data.split_steps(begun)), body["temperature"]))
        return WRONG[len(begun):], 20, "eos"
    monkeypatch.setattr(data.Endpoint, "ask", ask)
    file = write_rows(tmp_path / "a.jsonl", [attempt(i) for i in range(6)])
    argv = pairs_command(checkpoint, file, out := tmp_path / "p.jsonl", "--endpoint", "http://127.0.0.1:9/v1", "--api_model", "m", "--per_problem", 1)
    assert scdpo.main(argv) == 0
    rows = rows_of(out)
    assert len(rows) == 6 and {row["initial_reason_steps"] + row["full_rejected"] for row in rows} == {WRONG}
    for row in rows:
        k = len(data.split_steps(row["initial_reason_steps"]))
        assert asked[row["prompt"].strip()] == [(k + i, pytest.approx(1.1 + 0.05 * i)) for i in range(4 - k)]


# -------------------------------------------------------------------------------------------------------- loss, credit

def test_a_mask_over_the_kept_steps_changes_nothing(work):
    """L_SC on the tails alone = DPO on the whole answers, to rounding: what both sides share cancels in the margin. In float64, with random log-probs of a
    real batch's tokens, so that no implementation detail of the loop could hide a difference."""
    rows = [row for row in pair_rows(40) if row["initial_reason_steps"].endswith("Step 2:")]
    tokenizer = data.Tokenizer.from_pretrained(work / "model")
    margins = []
    policy, reference = (stepdpo.Policy(Llama.from_pretrained(work / "model").double()) for _ in range(2))
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    for masked in (False, True):
        named = [(f"row:{i}", row | {"prompt": row["prompt"] + " A:", "chosen": row["full_chosen"], "rejected": row["full_rejected"]})
                 for i, row in enumerate(rows)]
        examples, _ = data.encode_dataset(named, tokenizer, "stepdpo" if masked else "dpo", "raw")
        if masked:                                      # stepdpo leaves the end token out
            for example in examples:
                example.sides = [torch.cat([torch.from_numpy(side), torch.tensor([2], dtype=torch.int32)]).numpy() for side in example.sides]
                example.steps = [torch.zeros(len(side) - example.start, dtype=torch.int32).numpy() for side in example.sides]
        batch = data.collate(examples, range(len(examples)))
        with torch.no_grad():
            losses, metrics = stepdpo.preference_objective(policy(batch), reference(batch), batch, argparse.Namespace(beta=0.1))
        margins.append((losses, metrics["margin"], len(batch.targets)))
    assert margins[1][2] < margins[0][2]
    torch.testing.assert_close(margins[0][0], margins[1][0], atol=1e-12, rtol=0)
    torch.testing.assert_close(margins[0][1], margins[1][1], atol=1e-12, rtol=0)
    assert margins[0][1].abs().max() > 1e-3


@pytest.fixture(scope="module")
def trained(work, tmp_path_factory):
    """What `train` makes of the tiny model in one epoch at a large learning rate."""
    out = tmp_path_factory.mktemp("trained") / "out"
    argv = ["train", "--model", str(work / "model"), "--data", str(work / "pairs.jsonl"), "--out", str(out), "--prompt", "alpaca", "--device", "cpu",
            "--lr", "1e-3", "--epochs", "1", "--batch_size", "8"]
    assert scdpo.main(argv) == 0
    return out


def test_train_is_dpo_with_the_papers_settings(work, trained, tmp_path):
    """The same bytes as stepdpo.py dpo; and without flags lr 1e-7, 2 epochs, batch 64, beta 0.1."""
    argv = ["dpo", "--model", str(work / "model"), "--data", str(work / "pairs.jsonl"), "--out", str(tmp_path / "out"), "--prompt", "alpaca", "--device", "cpu",
            "--lr", "1e-3", "--epochs", "1", "--batch_size", "8", "--beta", "0.1"]
    assert stepdpo.main(argv) == 0
    assert (trained / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()
    args = stepdpo.parser(defaults=scdpo.TRAINING).parse_args(["dpo", "--model", "m", "--data", "d", "--out", "o"])
    stepdpo.settle(args)
    assert (args.lr, args.epochs, args.batch_size, args.beta, args.warmup, args.schedule) == (1e-7, 2, 64, 0.1, 0.1, "cosine")


def test_credits_add_up_to_the_reward_of_the_answer(work, trained):
    """Their sum is beta (log pi - log ref) of the whole answer, end token included; each is the sum over its own step's tokens, counted here by hand."""
    texts = [("What?", RIGHT), ("How many?", WRONG)]
    found = scdpo.credit(trained, work / "model", texts, beta=0.5, prompt="alpaca", device="cpu")
    rows = [{"prompt": q, "response": text} for q, text in texts]
    logps, ref_logps = (stepdpo.log_probs(folder, rows, "sft", "alpaca", device="cpu")[:, 0] for folder in (trained, work / "model"))
    assert [sum(of_steps) for of_steps in found] == pytest.approx((0.5 * (logps - ref_logps)).tolist(), abs=1e-4)
    tokenizer = data.Tokenizer.from_pretrained(work / "model")
    for (question, text), of_steps in zip(texts, found):
        prompt = data.render_prompt("alpaca", question, tokenizer)
        ids = torch.tensor(tokenizer.encode(prompt + text).ids + [2])
        of_token = [Llama.from_pretrained(folder)(ids[None])[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0] for folder in (trained, work / "model")]
        at = len(tokenizer.encode(prompt).ids) - 1      # bytes are tokens here
        steps = data.split_steps(text)
        for i, (step, value) in enumerate(zip(steps, of_steps)):
            end = at + len(step.encode()) + (i == len(steps) - 1)
            assert value == pytest.approx(0.5 * (of_token[0] - of_token[1])[at:end].sum().item(), abs=1e-3)
            at = end
    same = scdpo.credit(work / "model", work / "model", texts, prompt="alpaca", device="cpu")
    assert [len(of_steps) for of_steps in same] == [4, 4] and max(abs(v) for of_steps in same for v in of_steps) < 1e-6


def test_credit_prints_every_step_and_marks_the_lowest(processes, work, trained, tmp_path, capsys):
    argv = ["credit", "--model", str(trained), "--reference", str(work / "model"), "--prompt", "alpaca", "--device", "cpu", "--limit", "2", "--attempts"]
    assert scdpo.main([*argv, str(attempts(tmp_path / "a.jsonl"))]) == 0
    said = capsys.readouterr().out
    assert said.count(">>") == 2 and said.count("Step ") == 8 and "a.jsonl:2: 0 + a" in said
    two = processes.run(ROOT / "variants" / "scdpo.py", *argv, tmp_path / "a.jsonl", world=2)
    assert [line for line in two.splitlines() if "Step " in line] == [line for line in said.splitlines() if "Step " in line], "printed once, by one process"
    write_rows(tmp_path / "right.jsonl", [attempt(0)])
    assert scdpo.main([*argv, str(tmp_path / "right.jsonl")]) == 2 and "holds no wrong attempt" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- experiment

def test_the_experiment_small(tmp_path, monkeypatch, capsys):
    """All arms from equally many rows, the table and the remarks; the same command again trains nothing anew and says the same."""
    tiny = replace(arithmetic.QUICK, sft=6000, collect=60, held_out=8, pairs=8, epochs=1, test=10)
    monkeypatch.setattr(arithmetic, "QUICK", tiny)
    argv = ["--method", "scdpo", "--out", str(tmp_path), "--quick"]
    assert siblings_main(argv) == 0
    said, folder = capsys.readouterr().out, tmp_path / "scdpo" / "seed0"
    first = json.loads((tmp_path / "scdpo" / "results.json").read_text())
    from examples.siblings.scdpo import ARMS
    assert set(first["arms"]) == set(ARMS) and all(arm.about in said for arm in ARMS.values()) and "first error: step k+1" in said
    assert len({len(rows_of(folder / f"{arm}.jsonl")) for arm in ARMS if arm != "sft"}) == 1
    for row in rows_of(folder / "undone.jsonl"):
        assert row["full_chosen"] != row["full_rejected"]
    assert siblings_main(argv) == 0
    again = json.loads((tmp_path / "scdpo" / "results.json").read_text())
    assert again["arms"] == first["arms"] and "already complete" in capsys.readouterr().out
