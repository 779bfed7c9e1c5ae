"""The loop as its users run it: the command line, one process and two, killed and continued, beside an independent twin."""
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from conftest import ROOT, pair_rows, tiny_checkpoint, write_json, write_rows
from safetensors.torch import load_file, save_file

import data
import stepdpo
from model import locked

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
COMMON = ["--prompt", "alpaca", "--batch_size", "8", "--lr", "1e-3", "--device", "cpu"]         # also where there is a GPU: bits are compared


def arguments(work, method, out, *more):
    return [method, "--model", str(work / "model"), "--data", str(work / "pairs.jsonl"), "--out", str(out), *COMMON, *more]


def command(work, method, out, *more, processes=1):
    launcher = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    return [*launcher, str(ROOT / "stepdpo.py"), *arguments(work, method, out, *more)]


def metrics(out: Path, timings: bool = False) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if timings or k not in ("seconds", "tokens_per_second")} for line in lines]


def weights(out: Path) -> dict:
    return load_file(out / "model.safetensors")


def close(a: Path, b: Path, tolerance: float):
    for x, y in zip(metrics(a), metrics(b), strict=True):
        assert x == pytest.approx(y, abs=tolerance, rel=tolerance)
    for k, w in weights(a).items():
        torch.testing.assert_close(w, weights(b)[k], atol=tolerance, rtol=0)


@pytest.mark.parametrize("method", ["sft", "dpo", "stepdpo"])
def test_the_twin(work, tmp_path, method):
    """Every method beside the plainest code for it: transformers' model, two separate rows a pair, all logits, two models, torch's AdamW. Same order, same
    schedule: the losses of three updates and the weights agree. The first preference loss is log 2."""
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle of this test")
    assert stepdpo.main(arguments(work, method, tmp_path / "out", "--max_steps", "3")) == 0
    examples, _ = data.encode_dataset(work / "pairs.jsonl", data.Tokenizer.from_pretrained(work / "model"), method, "alpaca", 1024)
    plan = data.epoch_plan(examples, batch_size=8, seed=0, epoch=0)
    policy, reference = (transformers.AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32) for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)

    def logps(model, ids, start):
        ids = torch.from_numpy(ids).long()[None]
        return model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[start - 1:, 0]

    losses = []
    for step in range(3):
        rows = [examples[r] for micro in plan[step][0] for r in micro]
        if method == "sft":
            loss = -torch.cat([logps(policy, e.chosen, e.start) for e in rows]).mean()
        else:
            margins = []
            for e in rows:
                with torch.no_grad():
                    ref = [logps(reference, side, e.start).sum() for side in e.sides]
                pol = [logps(policy, side, e.start).sum() for side in e.sides]
                margins.append(0.4 * ((pol[0] - ref[0]) - (pol[1] - ref[1])))
            loss = -torch.nn.functional.logsigmoid(torch.stack(margins)).mean()
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        schedule = stepdpo.DEFAULTS[method]
        for group in optimizer.param_groups:
            group["lr"] = stepdpo.learning_rate(step, 3, 1e-3, schedule["warmup"], schedule["schedule"])
        optimizer.step()
        optimizer.zero_grad()
    assert [m["loss"] for m in metrics(tmp_path / "out")] == pytest.approx(losses, abs=2e-5)
    trained = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)      # OUT is a folder that transformers loads
    for (name, ours), theirs in zip(trained.named_parameters(), policy.parameters()):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0, msg=name)
    if method != "sft":
        assert losses[0] == pytest.approx(math.log(2), abs=1e-6)


def test_a_golden_run(work, tmp_path):
    """Four updates with the numbers they gave when this was written: log 2 first, then down; the margin up from exactly 0."""
    assert stepdpo.main(arguments(work, "stepdpo", tmp_path / "out", "--max_steps", "4", "--eval_data", str(work / "held.jsonl"), "--eval_every", "2")) == 0
    got = metrics(tmp_path / "out")
    assert [m["loss"] for m in got] == pytest.approx(GOLDEN["loss"], abs=1e-3)
    assert [m["margin"] for m in got] == pytest.approx(GOLDEN["margin"], abs=3e-3)
    assert set(got[0]) == {"step", "loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logps", "rejected_logps", "grad_norm", "lr"}
    held = [json.loads(line) for line in (tmp_path / "out" / "eval.jsonl").read_text().splitlines()]
    assert [h["step"] for h in held] == [0, 2, 4] and held[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and held[2]["margin"] > held[1]["margin"] > 0.1


GOLDEN = {"loss": [0.6931, 0.4841, 0.3033, 0.2273], "margin": [0.0, 0.4785, 1.0590, 1.4075]}


def wrapped(folder: Path, code: str) -> str:
    """stepdpo.py as a script of someone's own: `code`, which knows its `rank`, then `main`."""
    path = folder / "wrapped.py"
    path.write_text(f"import os, resource, sys, torch, stepdpo\nfrom model import Llama\nrank = int(os.environ.get('RANK', 0))\n{code}\nsys.exit(stepdpo.main())\n")
    return str(path)


IN_FP64 = """
read, save = Llama.read_weights, Llama.save_pretrained
Llama.read_weights = lambda self, dtype=None, device="cpu", seed=0: read(self, torch.float64, device)
Llama.save_pretrained = lambda self, folder, dtype=None, **more: save(self, folder, torch.float64, **more)
"""


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("method", ["sft", "stepdpo"])
def test_however_the_batch_is_cut(processes, work, tmp_path, method, precision):
    """8 at once, 4 x 2, 8 x 1, by token budget, with gradient checkpointing, on two processes, on two that share the model: the same weights and numbers after
    10 updates, short last batches (27 = 8 + 8 + 8 + 3 rows) included. One more: three processes with a last batch of 1 row, so two have none.

    Sums are only added in another order. In fp64 the same loop shows that this is all: weights and metrics differ by less than 5e-15.
    In fp32 AdamW's division by sqrt(v) magnifies the rounding of small gradients: weights differ by up to 4e-6 after ten updates of up to 1e-3."""
    program = str(ROOT / "stepdpo.py") if precision == "fp32" else wrapped(tmp_path, IN_FP64)
    tolerance = {"fp32": 1e-5, "fp64": 1e-13}[precision]
    go = lambda out, *more, world=1: processes.run(program, *arguments(work, method, out, *more), world=world)
    base = tmp_path / "base"
    go(base, "--max_steps", "10")
    assert precision == "fp32" or weights(base)["lm_head.weight"].dtype == torch.float64
    for i, (world, *more) in enumerate([(1, "--micro_batch_size", "2"), (1, "--micro_batch_size", "1"), (1, "--micro_batch_tokens", "700"),
                                        (1, "--gradient_checkpointing"), (2, "--micro_batch_size", "3"), (2, "--micro_batch_size", "3", "--shard")]):
        if precision == "fp32" or "--shard" not in more:            # sharded gradients are summed as fp32 (test_shard.py)
            go(tmp_path / str(i), "--max_steps", "10", *more, world=world)
            close(base, tmp_path / str(i), tolerance)
    if method == "stepdpo":
        write_rows(work / "ten.jsonl", pair_rows(9))
        for world in (1, 3):
            go(tmp_path / f"ten{world}", "--data", str(work / "ten.jsonl"), "--max_steps", "4", world=world)
        close(tmp_path / "ten1", tmp_path / "ten3", tolerance)


@pytest.mark.parametrize("world", [1, 2])
def test_the_same_command_gives_the_same_numbers(processes, work, tmp_path, world):
    """Same seed, same machine: bit-identical weights, metrics and held-out results. Another seed: others."""
    for out, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        more = ["--max_steps", "5", "--seed", seed, "--eval_data", str(work / "held.jsonl")]
        processes.run(ROOT / "stepdpo.py", *arguments(work, "stepdpo", tmp_path / out, *more), world=world)
    a, b, c = (tmp_path / out for out in "abc")
    assert metrics(a) == metrics(b) != metrics(c)
    for name in ("model.safetensors", "eval.jsonl"):
        assert (a / name).read_bytes() == (b / name).read_bytes() != (c / name).read_bytes()


@pytest.mark.parametrize("option, other", [("--data", "held.jsonl"), ("--model", "another"), ("--lr", "1e-4")])
def test_processes_that_do_not_see_the_same_are_noticed(processes, work, tmp_path, option, other):
    """The second of two reads other rows, another model, or was given another setting: both end before anything is written."""
    tiny_checkpoint(work / "another", seed=9)
    value = str(work / other) if option != "--lr" else other
    script = wrapped(tmp_path, f"if rank: sys.argv[sys.argv.index({option!r}) + 1] = {value!r}")
    processes.start([script, *arguments(work, "stepdpo", tmp_path / "out")], world=2)
    assert set(processes.wait()) <= {2, -15}                # the second may be ended as torchrun would
    assert "do not read the same model, data and settings" in processes.log.read_text() and not (tmp_path / "out").exists()


NOT_FINITE = """
def objective(token_logps, ref_token_logps, batch, args):
    losses, metrics = stepdpo.preference_objective(token_logps, ref_token_logps, batch, args)
    if ROW in batch.rows.tolist() and WHAT == "gradient":
        token_logps.register_hook(lambda grad: grad * torch.inf)
    elif ROW in batch.rows.tolist():
        losses = losses * torch.nan
    return losses, metrics

main = stepdpo.main
stepdpo.main = lambda: main(objective=objective)
"""


@pytest.mark.parametrize("world, what", [(1, "gradient"), (2, "gradient"), (2, "loss")])
def test_one_row_that_is_not_finite_stops_all_processes_before_the_weights_are_touched(processes, work, tmp_path, world, what):
    """One row has a finite loss with an infinite gradient, or a loss that is no number, in one of two processes: all stop in that step, its rows are named, and
    what the last checkpoint holds are the weights before it."""
    examples, _ = data.encode_dataset(work / "pairs.jsonl", data.Tokenizer.from_pretrained(work / "model"), "stepdpo", "alpaca", 1024)
    epoch = data.epoch_plan(examples, batch_size=8, micro_batch_tokens=8192, world_size=world, seed=0, epoch=0)
    batches = [sorted(row for micros in step for micro in micros for row in micro) for step in epoch]
    step, row = 2, batches[2][0]
    script = wrapped(tmp_path, NOT_FINITE.replace("ROW", str(row)).replace("WHAT", repr(what)))
    processes.start([script, *arguments(work, "stepdpo", tmp_path / "out", "--checkpoint_every", "1")], world=world)
    assert set(processes.wait()) <= {2, -15}
    error, = [line for line in processes.log.read_text().splitlines() if line.startswith("error: ")]
    assert f"step {step}: loss {'0.' if what == 'gradient' else 'nan'}" in error and "gradient norm" in error
    assert error.endswith(", ".join(examples[row].where for row in batches[step]))
    assert len(metrics(tmp_path / "out")) == step and not (tmp_path / "out" / "model.safetensors").exists()
    folder, = (tmp_path / "out" / "checkpoint").glob("step-*")
    assert folder.name == f"step-{step:08d}" and all(w.isfinite().all() for path in folder.iterdir() for w in load_file(path).values())


@contextmanager
def no_room():
    """Every write to a file fails, as on a full disk (with EFBIG instead of ENOSPC)."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("function, call, named", [("write_json", 1, "run.json"), ("score_tokens", 2, "reference.safetensors"), ("append", 4, "metrics.jsonl"),
                                                   ("save_checkpoint", 3, "checkpoint/writing/"), ("evaluate", 1, "eval.jsonl"),
                                                   ("save_pretrained", 1, "model.safetensors"), ("keep_lines", 1, "")])
def test_a_full_disk(work, tmp_path, monkeypatch, capsys, function, call, named):
    """From the moment on when this function is called, nothing can be written: one line that names the file, status 2, the last checkpoint whole. With room
    again, the same command ends in the same weights and metrics."""
    argv = lambda out: arguments(work, "stepdpo", tmp_path / out, "--max_steps", "5", "--checkpoint_every", "1", "--eval_data", str(work / "held.jsonl"))
    assert stepdpo.main(argv("whole")) == 0
    owner = stepdpo.Llama if function == "save_pretrained" else stepdpo
    original, left = getattr(owner, function), [call]
    with ExitStack() as stack:
        def full(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                stack.enter_context(no_room())
            return original(*args, **kwargs)
        monkeypatch.setattr(owner, function, full)
        error = fails(capsys, argv("out"))
    monkeypatch.undo()
    assert named in error and "cannot be written (" in error and "then the same command continues" in error and error.count("\n") == 1
    kept = list((tmp_path / "out" / "checkpoint").glob("step-*"))
    assert not (tmp_path / "out" / "model.safetensors").exists() and len(kept) == (function in ("append", "save_checkpoint", "evaluate", "save_pretrained"))
    assert all(load_file(path) for step in kept for path in step.iterdir())
    assert stepdpo.main(argv("out")) == 0
    assert bool(kept) == ("continuing after step" in capsys.readouterr().out)
    assert metrics(tmp_path / "out") == metrics(tmp_path / "whole")
    for name in ("model.safetensors", "eval.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}


@pytest.mark.parametrize("rank, more", [(0, []), (1, ["--shard"])])
def test_a_full_disk_of_one_process(processes, work, tmp_path, rank, more):
    """Where one of two processes cannot write its part of the third checkpoint, both end, the file is named, and the same command goes on to the same bytes."""
    argv = lambda out: arguments(work, "stepdpo", tmp_path / out, "--max_steps", "5", "--checkpoint_every", "1", *more)
    processes.run(ROOT / "stepdpo.py", *argv("whole"), world=2)
    script = wrapped(tmp_path, f"""
save = stepdpo.save_checkpoint
def full(folder, step, *rest):
    if step == 3 and rank == {rank}:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))     # room for what is said, not for a layer
    return save(folder, step, *rest)
stepdpo.save_checkpoint = full""")
    processes.start([script, *argv("out")], world=2)
    status, said = processes.wait(), processes.log.read_text()
    assert 2 in status and "Traceback" not in said and "cannot be written (" in said and f"/checkpoint/writing/model-{rank:05d}-" in said, (status, said)
    assert "continuing after step 1" in processes.run(ROOT / "stepdpo.py", *argv("out"), world=2)
    assert metrics(tmp_path / "out") == metrics(tmp_path / "whole")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_an_unusable_out_is_refused_before_the_model_is_read(work, tmp_path, monkeypatch, capsys):
    """A file, below a file, another checkpoint's folder, the model's own, a folder that one may not write into: at once,
    not after minutes of reading weights."""
    monkeypatch.setattr(stepdpo, "resolve", lambda folder: pytest.fail("the model was looked for"))
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model-00001-of-00002.safetensors").write_text("x")
    for out, found in ((tmp_path / "file", "file: is a file"), (tmp_path / "file" / "below", "file: is a file"),
                       (tmp_path / "folder", "holds model-00001-of-00002.safetensors"), (work / "model", "holds config.json")):
        assert found in fails(capsys, arguments(work, "sft", out))
    (tmp_path / "locked").mkdir(mode=0o555)
    if os.access(tmp_path / "locked", os.W_OK):
        pytest.skip("permissions do not bind the superuser; the rest passed")
    for out in (tmp_path / "locked", tmp_path / "locked" / "below"):
        assert "locked: is not writable" in fails(capsys, arguments(work, "sft", out))


def test_a_damaged_checkpoint_is_named(work, tmp_path, monkeypatch, capsys):
    """A file of OUT/checkpoint cut short, one missing, a run.json that is none: one line; --restart begins anew."""
    argv = arguments(work, "stepdpo", tmp_path / "out", "--max_steps", "2", "--checkpoint_every", "1")
    assert stepdpo.main(argv) == 0
    whole = (tmp_path / "out" / "model.safetensors").read_bytes()

    def stopped(*_, **__):
        raise KeyboardInterrupt

    for damage in ("cut", "missing", "reference", "run"):
        monkeypatch.setattr(stepdpo.Llama, "save_pretrained", stopped)
        assert stepdpo.main([*argv, "--restart"]) == 130
        monkeypatch.undo()
        folder = tmp_path / "out" / "checkpoint" / "step-00000001"
        path = {"reference": folder.parent / "reference.safetensors", "run": tmp_path / "out" / "run.json"}.get(damage)
        path = path or folder / "optimizer-00000-0.safetensors"
        path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:100])
        error = fails(capsys, argv)
        assert str(folder if damage == "missing" else path) in error and "--restart" in error
        assert stepdpo.main([*argv, "--restart"]) == 0 and (tmp_path / "out" / "model.safetensors").read_bytes() == whole


@pytest.mark.skipif(sys.platform != "linux", reason="finds the run's processes in /proc")
@pytest.mark.parametrize("world", [1, 2])
def test_killed_and_stopped_on_the_command_line(processes, work, tmp_path, world):
    """As its users start it, with torchrun for two: SIGKILL for all in the middle, and the same command again; SIGTERM and SIGINT, at which it finishes its step,
    saves and says so; again, to a result that is bit-identical to that of an undisturbed run. (test_kill.py kills at random, and more often.)"""
    more = ["--epochs", "10", "--checkpoint_every", "3", "--eval_data", str(work / "held.jsonl"), "--eval_every", "6"]
    direct = lambda out: processes.run(ROOT / "stepdpo.py", *arguments(work, "stepdpo", out, *more), world=world)
    direct(tmp_path / "whole")
    out = tmp_path / "cut"
    process = subprocess.Popen(command(work, "stepdpo", out, *more, processes=world), env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)
    wait_for_lines(out / "metrics.jsonl", 7, process)
    kill_all(out, process)
    for number, after in [(signal.SIGTERM, 20)] + [(signal.SIGINT, 30)] * (world == 1):          # (torchrun passes a SIGINT on as a SIGTERM)
        process = subprocess.Popen(command(work, "stepdpo", out, *more, processes=world), env=ENV, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                                   start_new_session=True)
        wait_for_lines(out / "metrics.jsonl", after, process)
        process.send_signal(number)
        said = process.communicate(timeout=60)[0]
        assert "continuing after step" in said and f"stopped by {number.name} after step" in said and "the same command continues" in said
        assert process.returncode == (128 + number if world == 1 else 1)              # 1 is torchrun's own way
        assert not (out / "model.safetensors").exists(), "nothing half-trained under the final name"
    last = metrics(out)[-1]["step"]
    assert f"continuing after step {last}" in direct(out), "it was saved in the step that was under way"
    assert metrics(out) == metrics(tmp_path / "whole")
    for name in ("model.safetensors", "eval.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (out / "checkpoint").exists()
    assert "is complete" in direct(out)


def kill_all(out: Path, process):
    """SIGKILL for every process of the run, as in a power cut: torchrun starts its workers in sessions of their own, so a kill of the group would miss them."""
    while True:
        pids = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and str(out).encode() in cmdline(p)]
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        process.poll()
        if not pids:
            return


def cmdline(p: Path) -> bytes:
    try:
        return (p / "cmdline").read_bytes()
    except OSError:
        return b""


def wait_for_lines(path: Path, n: int, process):
    end = time.monotonic() + 120
    while not path.exists() or len(path.read_text().splitlines()) < n:
        assert process.poll() is None and time.monotonic() < end, "the run ended before it could be interrupted"
        time.sleep(0.005)


def fails(capsys, argv) -> str:
    """The one line that a failing command prints; its exit status is 2 and there is no traceback."""
    capsys.readouterr()
    assert stepdpo.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
    return error


def test_a_run_is_not_continued_under_other_conditions(work, tmp_path, capsys):
    """Other settings, other data, another model: refused, and what changed is named. --restart begins anew; a stranger's folder is not touched."""
    out = tmp_path / "out"
    assert stepdpo.main(arguments(work, "stepdpo", out, "--max_steps", "1")) == 0
    assert "beta: 0.4 then, 0.5 now" in fails(capsys, arguments(work, "stepdpo", out, "--max_steps", "1", "--beta", "0.5"))
    write_rows(tmp_path / "other.jsonl", pair_rows(27, seed=5))
    assert "data: " in fails(capsys, arguments(work, "stepdpo", out, "--max_steps", "1", "--data", str(tmp_path / "other.jsonl")))
    tiny_checkpoint(tmp_path / "other", seed=5)
    assert "model: " in fails(capsys, arguments(work, "stepdpo", out, "--max_steps", "1", "--model", str(tmp_path / "other")))

    def another_objective(token_logps, ref_token_logps, batch, args):
        return stepdpo.response_logps(token_logps, batch).view(-1, 2)[:, 1], {}

    assert stepdpo.main(arguments(work, "stepdpo", out, "--max_steps", "1"), another_objective) == 2
    assert "objective: 'preference_objective' then" in capsys.readouterr().err
    assert stepdpo.main(arguments(work, "stepdpo", tmp_path / "variant", "--max_steps", "1"), another_objective) == 0      # metrics are its own affair
    assert stepdpo.main(arguments(work, "stepdpo", out, "--max_steps", "1", "--beta", "0.5", "--restart")) == 0
    (tmp_path / "early").mkdir()                                # killed in the moment before run.json had its name: nothing to protect yet
    (tmp_path / "early" / "run.json.tmp").write_text("{")
    assert stepdpo.main(arguments(work, "stepdpo", tmp_path / "early", "--max_steps", "1")) == 0
    for more in ([], ["--restart"]):
        assert "holds config.json and no run.json" in fails(capsys, arguments(work, "stepdpo", work / "model", *more))
        assert "--model or --reference" in fails(capsys, [*arguments(work, "stepdpo", out, *more), "--model", str(out)])
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode


def test_harmless_files_in_the_way_are_left_alone(work, tmp_path):
    """OUT made beforehand, with a log that `tee` writes there, or what version control and file managers leave."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("train.log", ".gitkeep", ".DS_Store"):
        (out / name).write_text("x")
    assert stepdpo.main(arguments(work, "stepdpo", out, "--max_steps", "1")) == 0
    assert (out / "model.safetensors").is_file() and (out / "train.log").read_text() == "x"


def test_two_runs_into_one_out(work, tmp_path, capsys):
    """While another command writes OUT, the second one says who, and touches nothing; a lock that a killed one left
    behind holds nothing."""
    argv = arguments(work, "stepdpo", tmp_path / "out", "--max_steps", "1")
    with locked(tmp_path / "out"):
        assert f"is being written by process {os.getpid()} on" in fails(capsys, argv)
    assert not list(tmp_path.iterdir())
    (tmp_path / "out.lock").write_text("process 1 on a machine that was switched off")
    assert stepdpo.main(argv) == 0 and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_another_reference(work, tmp_path, capsys):
    """--reference: the margins begin away from 0, by exactly the difference of the two models' log-probs; the same model as reference begins at log 2."""
    tiny_checkpoint(tmp_path / "other", seed=5)
    assert stepdpo.main(arguments(work, "stepdpo", tmp_path / "a", "--max_steps", "1", "--reference", str(tmp_path / "other"))) == 0
    assert abs(metrics(tmp_path / "a")[0]["margin"]) > 1e-3
    assert stepdpo.main(arguments(work, "stepdpo", tmp_path / "b", "--max_steps", "1", "--reference", str(work / "model"))) == 0
    assert metrics(tmp_path / "b")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    before = (work / "model" / "model.safetensors").read_bytes()
    assert (work / "model" / "model.safetensors").read_bytes() == before


def test_a_loss_that_is_not_a_number_stops_the_run_before_the_weights_are_touched(work, tmp_path, capsys):
    """Weights so large that the loss overflows: the message names the step and the rows of its batch, and no checkpoint
    is left behind that holds it."""
    tiny_checkpoint(tmp_path / "broken")
    tensors = load_file(tmp_path / "broken" / "model.safetensors")
    tensors["model.norm.weight"][:] = 3e38
    save_file(tensors, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    error = fails(capsys, arguments(work, "sft", tmp_path / "out", "--model", str(tmp_path / "broken")))
    assert "step 0: loss nan" in error and "pairs.jsonl:" in error and error.count("pairs.jsonl:") == 8
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_wrong_reference_is_noticed(work, tmp_path, monkeypatch, capsys):
    """If the first loss is not log 2, the reference is not the policy at step 0, and training would optimise something else. (A variant's margin may
    begin where it likes.)"""
    right = stepdpo.score_tokens
    monkeypatch.setattr(stepdpo, "score_tokens", lambda *a, **how: [row + torch.linspace(1, 0, len(row)) for row in right(*a, **how)])
    assert "instead of 0" in fails(capsys, arguments(work, "stepdpo", tmp_path / "out"))
    variant = lambda *args: stepdpo.preference_objective(*args)
    assert stepdpo.main(arguments(work, "stepdpo", tmp_path / "variant", "--max_steps", "1"), objective=variant) == 0


def test_a_run_without_clipping_ends(work, tmp_path):
    """--clip inf is how one says it, and no JSON number: the run ends, and the same command finds it complete."""
    argv = arguments(work, "stepdpo", tmp_path / "out", "--max_steps", "1", "--clip", "inf")
    assert stepdpo.main(argv) == 0
    before = (tmp_path / "out" / "run.json").stat().st_mtime_ns
    assert stepdpo.main(argv) == 0 and (tmp_path / "out" / "run.json").stat().st_mtime_ns == before


def test_others_stop_where_the_model_learned_to(work, tmp_path):
    """A base checkpoint whose EOS is not what ends a turn of the chat: after SFT on the chat, config.json and generation_config.json name both (so
    transformers and servers stop there), after Step-DPO, which teaches no end, what they named before."""
    model = tiny_checkpoint(tmp_path / "base")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ bos_token }}{% for m in messages %}{{ m.content }}<pad>{% endfor %}"
    write_json(model / "tokenizer_config.json", settings)
    write_json(model / "generation_config.json", {"eos_token_id": 2, "top_k": 7})
    for method, ends in (("sft", [2, 0]), ("stepdpo", 2)):
        out = tmp_path / method
        assert stepdpo.main(arguments(work, method, out, "--model", str(model), "--prompt", "chat", "--max_steps", "1")) == 0
        assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": ends, "top_k": 7}
        assert json.loads((out / "config.json").read_text())["eos_token_id"] == ends


def test_mistakes_of_a_newcomer_end_in_one_line(work, tmp_path, capsys):
    """What was wrong and what to do."""
    out = str(tmp_path / "out")
    argv = arguments(work, "stepdpo", out)
    assert "no such folder" in fails(capsys, [*argv, "--model", "nowhere"])
    assert "no such folder" in fails(capsys, [*argv, "--reference", "nowhere"])
    assert "nofile.jsonl" in fails(capsys, [*argv, "--data", str(tmp_path / "nofile.jsonl")])
    assert "--prompt alpaca" in fails(capsys, [*argv, "--prompt", "chat"])
    write_rows(tmp_path / "columns.jsonl", [{"question": "x", "good": "y", "bad": "z"}])
    assert "initial_reason_steps" in fails(capsys, [*argv, "--data", str(tmp_path / "columns.jsonl")])
    assert "--batch_size is 0" in fails(capsys, [*argv, "--batch_size", "0"])
    assert "--max_steps is 0" in fails(capsys, [*argv, "--max_steps", "0"])
    assert "--seed is -1" in fails(capsys, [*argv, "--seed", "-1"])
    assert "--lr is inf" in fails(capsys, [*argv, "--lr", "inf"])
    assert "--device gpu: expected cpu" in fails(capsys, [*argv, "--device", "gpu"])
    tiny_checkpoint(tmp_path / "renumbered")
    tokenizer = tmp_path / "renumbered" / "tokenizer.json"
    tokenizer.write_text(re.sub(r'"A":\s*(\d+)(.*?)"B":\s*(\d+)', r'"A": \3\2"B": \1', tokenizer.read_text(), flags=re.S))
    assert "numbers tokens otherwise: 'A' is" in fails(capsys, [*argv, "--reference", str(tmp_path / "renumbered")])
    assert "no row is left" in fails(capsys, [*argv, "--max_length", "20"])
    tiny_checkpoint(tmp_path / "short", max_position_embeddings=30)
    assert "longer than 30 tokens" in fails(capsys, [*argv, "--model", str(tmp_path / "short")])
    if not torch.cuda.is_available():
        assert "no CUDA device" in fails(capsys, [*argv, "--device", "cuda"])
    assert not Path(out).exists(), "a command that could not start leaves nothing behind"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_or_not_the_same_numbers(work, tmp_path, monkeypatch):
    """--compile: the same losses and weights, exactly log 2 at the start, and one compilation serves batches of every shape."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    counters = torch._dynamo.utils.counters
    counters.clear()
    for more in ([], ["--compile"]):
        assert stepdpo.main(arguments(work, "stepdpo", tmp_path / f"out{len(more)}", "--max_steps", "4", *more)) == 0
    close(tmp_path / "out0", tmp_path / "out1", 2e-5)
    assert metrics(tmp_path / "out1")[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert 0 < counters["stats"]["unique_graphs"] <= 8 and not counters["recompile_limit"]


def test_bf16_trains_fp32_weights(work, tmp_path):
    """bf16 arithmetic: step 0 still reads log 2, updates of 5e-7 move the fp32 weights, and --save_dtype bf16 halves the file."""
    assert stepdpo.main(arguments(work, "stepdpo", tmp_path / "a", "--max_steps", "2", "--precision", "bf16", "--lr", "5e-7")) == 0
    assert metrics(tmp_path / "a")[0]["loss"] == pytest.approx(math.log(2), abs=1e-2)
    before, after = weights(work / "model"), weights(tmp_path / "a")
    assert all(w.dtype == torch.float32 for w in after.values())
    assert sum(not torch.equal(before[k], after[k]) for k in before) > len(before) / 2
    assert stepdpo.main(arguments(work, "stepdpo", tmp_path / "b", "--max_steps", "1", "--save_dtype", "bf16")) == 0
    assert all(w.dtype == torch.bfloat16 for w in weights(tmp_path / "b").values())
