"""Killed anywhere and started again by the same command: the same bytes as if never interrupted.

Real processes end by a real SIGKILL: all of a run's at once, as in a power cut, or one of two. A kill falls at a moment drawn over the whole life of a process,
or right before one of its file operations, so that also the instants between two renames are hit (conftest.py, `Processes`).

    python -m pytest tests/test_kill.py                 2 a case
    KILLS=20 python -m pytest -s tests/test_kill.py     40 a case, and a line for each case: how many, and where they fell
    SEED=7 KILLS=...                                    other moments; a failure names its seed and its kills
"""
import itertools
import json
import os
import random
import signal
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from conftest import ROOT, write_rows
from test_train import no_room

import data
import eval as ev

KILLS, SEED = int(os.environ.get("KILLS", 1)), int(os.environ.get("SEED", 0))


def training(work: Path, method: str, out: Path) -> list[str]:
    """8 updates (in batches of 8, 8, 8, 3) with a checkpoint after each or every other one, and held-out pairs on the way."""
    held_out = ["--eval_data", str(work / "held.jsonl"), "--eval_every", "3"] if method != "sft" else []
    return [str(ROOT / "stepdpo.py"), method, "--model", str(work / "model"), "--data", str(work / "pairs.jsonl"), "--out", str(out), "--prompt", "alpaca",
            "--batch_size", "8", "--micro_batch_size", "3", "--lr", "1e-3", "--epochs", "2", "--device", "cpu", *held_out]


def result(out: Path) -> dict:
    """All that a finished run leaves behind, without its timings."""
    found = {p.name: p.read_bytes() for p in out.iterdir()}
    lines = [json.loads(line) for line in found["metrics.jsonl"].splitlines()]
    found["metrics.jsonl"] = [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]
    run = json.loads(found["run.json"])
    found["run.json"] = run["finished"], {k: v for k, v in run["identity"].items()}
    return found


def phase(out: Path) -> str:
    """What a training run was doing when it was killed, by what lies in its folder."""
    steps = list((out / "checkpoint").glob("step-*"))
    if not (out / "run.json").exists():
        return "start"
    run = json.loads((out / "run.json").read_text())
    if run["finished"]:
        return "after the end"
    if (out / ".saving").exists() or (out / "config.json").exists():
        return "final save"
    if (out / "checkpoint" / "writing").exists() or len(steps) > 1:
        return "checkpoint"
    if run["settings"]["method"] != "sft" and not (out / "checkpoint" / "reference.safetensors").exists():
        return "reference pass"
    return "updates"


def batter(processes, command, world: int, result, phase, rng):
    """2 x KILLS kills, half of them at random moments and half before random file operations, spread over as many runs as that takes. Each run is started again
    until it ends, and then has the result of the undisturbed one. command() -> (argv, OUT) of a new run; result(OUT); phase(OUT) names what it was doing."""
    (argv, out), count = command(), processes.folder / "count"
    begun = time.monotonic()
    processes.start(argv, world, out, count=count)
    assert processes.wait() == [0] * world, processes.log.read_text()
    life, operations, expected = time.monotonic() - begun, [len(Path(f"{count}-{r}").read_bytes()) for r in range(world)], result(out)
    where, runs = Counter(), 0
    while where.total() < 2 * KILLS:
        (argv, out), kills, codes, runs = command(), [], None, runs + 1
        assert runs < 100 + 20 * KILLS, f"SEED={SEED}: only {where.total()} kills in {runs} runs"
        while codes != [0] * world:
            victim = rng.choice([None, None, *range(world)]) if world > 1 else None         # None: all at once
            doom = rng.choice([None, "after", "after", "before", "before"]) if where.total() < 2 * KILLS else None
            if doom == "before" and operations[victim or 0]:
                doom = {"before": rng.randint(1, operations[victim or 0]), "rank": victim or 0, "all": victim is None}
            elif doom:
                doom = {"after": rng.uniform(0, life), "rank": victim or 0, "all": victim is None}
            processes.start(argv, world, out, kill=doom if doom and "before" in doom else None)
            if doom and "after" in doom:
                time.sleep(doom["after"])
                with suppress(ProcessLookupError):
                    os.killpg(processes.pids[0], signal.SIGKILL) if victim is None else os.kill(processes.pids[victim], signal.SIGKILL)
            codes, said = processes.wait(), processes.log.read_text()
            told = f"SEED={SEED}, killed {kills}: exit status {codes}\n{said}"
            assert "Traceback" not in said and (codes == [0] * world or -signal.SIGKILL in codes), told
            if -signal.SIGKILL in codes:
                kills.append(doom)
                where[phase(out)] += 1
        assert result(out) == expected, told
    print(f"\n{where.total()} kills in {runs} runs (file operations {operations}, {life:.2f} s): "
          + ", ".join(f"{n} x {name}" for name, n in where.most_common()))


def numbered(folder: Path):
    return (folder / str(i) for i in itertools.count())


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("method", ["sft", "dpo", "stepdpo"])
def test_training(processes, work, tmp_path, method, world):
    """Weights, metrics and held-out results are those of the undisturbed run, and nothing else is left in OUT."""
    rng, outs = random.Random(f"{SEED} {method} {world}"), numbered(tmp_path)
    command = lambda: ([*training(work, method, out := next(outs)), "--checkpoint_every", rng.choice("12")], out)
    batter(processes, command, world, result, phase, rng)


AT_A_PASS = """
import os, signal, sys
import stepdpo

left, forward = int(sys.argv.pop(1)), stepdpo.Policy.forward

def counted(self, batch):
    global left
    left -= 1
    if left < 0:
        os.killpg(0, signal.SIGKILL)
    return forward(self, batch)

stepdpo.Policy.forward = counted
sys.exit(stepdpo.main())
"""


@pytest.mark.parametrize("world", [1, 2])
def test_the_reference_pass(processes, work, tmp_path, world):
    """Killed before the first, a middle and the last micro-batch of the reference pass (it has 9 for training and 2 for held-out pairs on one process), it
    begins again, and the run ends as an undisturbed one."""
    script = tmp_path / "killed.py"
    script.write_text(AT_A_PASS)
    for out, kills in ((tmp_path / "undisturbed", []), (tmp_path / "killed", [0, 3, 10 // world])):
        argv = training(work, "stepdpo", out)
        for passes in kills:
            processes.start([str(script), str(passes), *argv[1:]], world, out)
            assert -signal.SIGKILL in processes.wait() and phase(out) == "reference pass", (passes, phase(out), processes.log.read_text())
        processes.run(*argv, world=world)
    assert result(tmp_path / "killed") == result(tmp_path / "undisturbed")


def sampled(out: Path) -> dict:
    """What eval.py leaves behind, without its timings."""
    found = {p.name: p.read_bytes() for p in out.iterdir()}
    summary = json.loads(found["o.summary.json"])
    return found | {"o.summary.json": {k: v for k, v in summary.items() if k not in ("seconds", "tokens_per_second")}}


def sampling_phase(out: Path) -> str:
    journals = list(out.glob("o.jsonl.journal-*")) if out.exists() else []
    if (out / "o.jsonl").exists():
        return "result written" if journals else "after the end"
    return "sampling" if journals else "start"


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("what", ["samples", "rollouts"])
def test_sampling(processes, work, tmp_path, what, world):
    """eval.py's samples, and the step values from its rollouts, are the bytes of an undisturbed run; no journal is left."""
    if what == "samples":
        rows = [{"question": f"{i} + 1", "answer": str(i + 1)} for i in range(12)]
        more = ["--samples", "3", "--temperature", "1"]
    else:
        rows = [{"id": i, "question": f"{i} + 1", "answer": "x", "sample": 0, "prefix": "", "correct": False, "stop_reason": "eos",
                 "completion": f"Step 1: {i}.\nStep 2: so.\nThe answer is {i}"} for i in range(6)]
        more = ["--rollouts", "4", "--every_step", "--temperature", "1"]
    file = write_rows(tmp_path / "in.jsonl", rows)
    outs = numbered(tmp_path)
    command = lambda: ([str(ROOT / "eval.py"), "--model", str(work / "model"), "--problems", str(file), "--out", str((out := next(outs)) / "o.jsonl"),
                        "--prompt", "raw", "--max_new_tokens", "12", "--device", "cpu", "--batch_size", "6", *more], out)
    batter(processes, command, world, sampled, sampling_phase, random.Random(f"{SEED} {what} {world}"))


JUDGE = """
import time

def judge(question, steps, answer):
    time.sleep(0.01)
    return next((k for k, step in enumerate(steps) if "wrong" in step), None)
"""


def wrong_attempts(n: int) -> list[dict]:
    return [{"id": f"p{i}", "question": f"Twice {i}?", "answer": str(2 * i), "sample": 0, "correct": False, "stop_reason": "eos", "extracted": "x",
             "completion": f"Let's think step by step.\nStep 1: {i}.\nStep 2: wrong.\nThe answer is {i}"} for i in range(n)]


@pytest.mark.parametrize("stage", ["localize", "pairs"])
def test_data(processes, tmp_path, stage):
    """data.py with a judge that takes its time: the same bytes, and no journal is left."""
    (processes.folder / "slow.py").write_text(JUDGE)
    if stage == "localize":
        rows = wrong_attempts(30)
        more = ["localize", "--judge", "slow:judge"]
    else:
        rows = [{"id": f"p{i}#0", "question": f"Twice {i}?", "answer": str(2 * i), "sample": 0, "correct": True, "stop_reason": "eos", "extracted": str(2 * i),
                 "prefix": "Let's think step by step.\nStep 1:", "completion": f" {i} + {i}.\nStep 2: wrong.", "rejected": " no.", "full_rejected": " no.",
                 "step": 1} for i in range(30)]
        more = ["pairs", "--verify", "slow:judge"]
    file = write_rows(tmp_path / "in.jsonl", rows)
    outs = numbered(tmp_path)
    command = lambda: ([str(ROOT / "data.py"), more[0], str(file), *more[1:], "--out", str((out := next(outs)) / "o.jsonl")], out)
    batter(processes, command, 1, lambda out: {p.name: p.read_bytes() for p in out.iterdir()},
           lambda out: "after the end" if (out / "o.jsonl").exists() else "judging" if out.exists() else "start", random.Random(f"{SEED} {stage}"))


# ---------------------------------------------------------------------------------------------------------------------
# a full disk (of training: test_train.py)

@pytest.mark.parametrize("entry", [0, 1, 7])
def test_a_full_disk_while_sampling(work, tmp_path, monkeypatch, capsys, entry):
    """One line that names the journal, status 2; with room again the same command gives the same bytes."""
    file = write_rows(tmp_path / "in.jsonl", [{"question": f"{i} + 1", "answer": str(i + 1)} for i in range(6)])
    argv = lambda out: ["--model", str(work / "model"), "--problems", str(file), "--out", str(out / "o.jsonl"), "--prompt", "raw", "--max_new_tokens", "8",
                        "--device", "cpu", "--samples", "2", "--temperature", "1"]
    full_at_write(monkeypatch, data.Journal, "write", entry, lambda: ev.main(argv(tmp_path / "out")))
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"error: {tmp_path}/out/o.jsonl.journal-0: cannot be written (" in error and "the same command continues" in error
    assert ev.main(argv(tmp_path / "out")) == 0 and ev.main(argv(tmp_path / "whole")) == 0
    assert sampled(tmp_path / "out") == sampled(tmp_path / "whole")


@pytest.mark.parametrize("entry", [0, 2])
def test_a_full_disk_while_judging(processes, tmp_path, monkeypatch, capsys, entry):
    """The same of data.py's verdicts."""
    monkeypatch.syspath_prepend(str(processes.folder))
    (processes.folder / "slow.py").write_text(JUDGE)
    file = write_rows(tmp_path / "in.jsonl", wrong_attempts(4))
    argv = lambda out: ["localize", str(file), "--judge", "slow:judge", "--out", str(out / "o.jsonl")]
    full_at_write(monkeypatch, data.Journal, "write", entry, lambda: data.main(argv(tmp_path / "out")))
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"error: {tmp_path}/out/o.jsonl.verdicts: cannot be written (" in error and "the same command continues" in error
    assert data.main(argv(tmp_path / "out")) == 0 and data.main(argv(tmp_path / "whole")) == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}


def full_at_write(monkeypatch, owner, function: str, entry: int, command):
    """Run the command on a disk that is full from the `entry`-th call of this function on."""
    original, calls = getattr(owner, function), itertools.count()
    with ExitStack() as stack, monkeypatch.context() as patch:
        def full(*args):
            if next(calls) == entry:
                stack.enter_context(no_room())
            original(*args)
        patch.setattr(owner, function, full)
        assert command() == 2
