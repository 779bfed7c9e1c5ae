"""The loop as its users run it: the command line, one process and two, killed and continued, beside an independent twin."""
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, pair_rows, tiny_checkpoint, write_json, write_rows
from safetensors.torch import load_file, save_file

import data
import stepdpo

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
COMMON = ["--prompt", "alpaca", "--batch_size", "8", "--lr", "1e-3"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a tiny checkpoint `model`, 27 training pairs (so the last batch of 8 is short by 5) and 10 held-out ones."""
    folder = tmp_path_factory.mktemp("work")
    tiny_checkpoint(folder / "model")
    write_rows(folder / "pairs.jsonl", pair_rows(27))
    write_rows(folder / "held.jsonl", pair_rows(10, seed=1))
    return folder


def arguments(work, method, out, *more):
    return [method, "--model", str(work / "model"), "--data", str(work / "pairs.jsonl"), "--out", str(out), *COMMON, *more]


def command(work, method, out, *more, processes=1):
    launcher = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    return [*launcher, str(ROOT / "stepdpo.py"), *arguments(work, method, out, *more)]


def run(*args, **kwargs):
    done = subprocess.run(command(*args, **kwargs), capture_output=True, text=True, env=ENV, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


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
    plan = data.epoch_plan([e.length for e in examples], batch_size=8, seed=0, epoch=0)
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


@pytest.mark.parametrize("method", ["sft", "stepdpo"])
def test_however_the_batch_is_cut(work, tmp_path, method):
    """8 at once, 4 x 2, 8 x 1, by token budget, with gradient checkpointing, and on two processes: the same numbers after 10 updates, short last batches
    (27 = 8 + 8 + 8 + 3 rows) included. Sums are only added in another order. One more: three processes with a last batch of 1 row, so two have none."""
    base = tmp_path / "base"
    run(work, method, base, "--max_steps", "10")
    for i, (more, processes) in enumerate([(["--micro_batch_size", "2"], 1), (["--micro_batch_size", "1"], 1), (["--micro_batch_tokens", "700"], 1),
                                           (["--gradient_checkpointing"], 1), (["--micro_batch_size", "3"], 2)]):
        run(work, method, tmp_path / str(i), "--max_steps", "10", *more, processes=processes)
        close(base, tmp_path / str(i), 2e-5)
    if method == "stepdpo":
        write_rows(work / "ten.jsonl", pair_rows(9))
        for processes in (1, 3):
            run(work, method, tmp_path / f"ten{processes}", "--data", str(work / "ten.jsonl"), "--max_steps", "4", processes=processes)
        close(tmp_path / "ten1", tmp_path / "ten3", 2e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the run's processes in /proc")
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_continued_is_never_interrupted(work, tmp_path, processes):
    """SIGKILL in the middle, twice, and the same command again: bit-identical weights and metrics. Then SIGTERM: it finishes its step, saves, says so."""
    more = ["--epochs", "12", "--checkpoint_every", "3", "--eval_data", str(work / "held.jsonl"), "--eval_every", "6"]
    run(work, "stepdpo", tmp_path / "whole", *more, processes=processes)
    out = tmp_path / "cut"
    for after in (7, 20):
        process = subprocess.Popen(command(work, "stepdpo", out, *more, processes=processes), env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                   start_new_session=True)
        wait_for_lines(out / "metrics.jsonl", after, process)
        kill_all(out, process)
    process = subprocess.Popen(command(work, "stepdpo", out, *more, processes=processes), env=ENV, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                               start_new_session=True)
    wait_for_lines(out / "metrics.jsonl", 30, process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert "continuing after step" in said and "stopped by SIGTERM after step" in said and "the same command continues" in said
    if processes == 1:
        assert process.returncode == 128 + signal.SIGTERM
    assert not (out / "model.safetensors").exists(), "nothing half-trained under the final name"
    assert "continuing after step" in run(work, "stepdpo", out, *more, processes=processes)
    assert metrics(out) == metrics(tmp_path / "whole")
    assert (out / "eval.jsonl").read_text() == (tmp_path / "whole" / "eval.jsonl").read_text()
    assert all(torch.equal(w, weights(tmp_path / "whole")[k]) for k, w in weights(out).items())
    assert not (out / "checkpoint").exists()
    assert "is complete" in run(work, "stepdpo", out, *more, processes=processes)


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

    def another_objective(token_logps, batch, ref_logps, args):
        return stepdpo.response_logps(token_logps, batch).chunk(2)[1], {}

    assert stepdpo.main(arguments(work, "stepdpo", out, "--max_steps", "1"), another_objective) == 2
    assert "objective: 'preference_objective' then" in capsys.readouterr().err
    assert stepdpo.main(arguments(work, "stepdpo", tmp_path / "variant", "--max_steps", "1"), another_objective) == 0      # metrics are its own affair
    assert stepdpo.main(arguments(work, "stepdpo", out, "--max_steps", "1", "--beta", "0.5", "--restart")) == 0
    (tmp_path / "early").mkdir()                                # killed in the moment before run.json had its name: nothing to protect yet
    (tmp_path / "early" / "run.json.tmp").write_text("{")
    assert stepdpo.main(arguments(work, "stepdpo", tmp_path / "early", "--max_steps", "1")) == 0
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("x")
    for more in ([], ["--restart"]):
        assert "is not empty" in fails(capsys, arguments(work, "stepdpo", tmp_path / "precious", *more))
        assert "is not empty" in fails(capsys, arguments(work, "stepdpo", work / "model", *more))                  # nor is the base checkpoint
        assert "--model or --reference" in fails(capsys, [*arguments(work, "stepdpo", out, *more), "--model", str(out)])
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode


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
    """A NaN weight: the message names the step and the rows of its batch, and no checkpoint is left behind that holds it."""
    tiny_checkpoint(tmp_path / "broken")
    tensors = load_file(tmp_path / "broken" / "model.safetensors")
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    error = fails(capsys, arguments(work, "sft", tmp_path / "out", "--model", str(tmp_path / "broken")))
    assert "step 0: loss nan" in error and "pairs.jsonl:" in error and error.count("pairs.jsonl:") == 8
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_wrong_reference_is_noticed(work, tmp_path, monkeypatch, capsys):
    """If the first loss is not log 2, the reference is not the policy at step 0, and training would optimise something else."""
    right = stepdpo.score
    monkeypatch.setattr(stepdpo, "score", lambda *a: right(*a) + torch.tensor([1.0, 0.0]))
    assert "instead of 0" in fails(capsys, arguments(work, "stepdpo", tmp_path / "out"))


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
    assert "no row is left" in fails(capsys, [*argv, "--max_length", "20"])
    tiny_checkpoint(tmp_path / "short", max_position_embeddings=30)
    assert "longer than 30 tokens" in fails(capsys, [*argv, "--model", str(tmp_path / "short")])
    if not torch.cuda.is_available():
        assert "no CUDA device" in fails(capsys, [*argv, "--device", "cuda"])
    write_json(work / "model" / "stray.json", {})
    assert not Path(out).exists(), "a command that could not start leaves nothing behind"


def test_bf16_trains_fp32_weights(work, tmp_path):
    """bf16 arithmetic: step 0 still reads log 2, updates of 5e-7 move the fp32 weights, and --save_dtype bf16 halves the file."""
    assert stepdpo.main(arguments(work, "stepdpo", tmp_path / "a", "--max_steps", "2", "--precision", "bf16", "--lr", "5e-7")) == 0
    assert metrics(tmp_path / "a")[0]["loss"] == pytest.approx(math.log(2), abs=1e-2)
    before, after = weights(work / "model"), weights(tmp_path / "a")
    assert all(w.dtype == torch.float32 for w in after.values())
    assert sum(not torch.equal(before[k], after[k]) for k in before) > len(before) / 2
    assert stepdpo.main(arguments(work, "stepdpo", tmp_path / "b", "--max_steps", "1", "--save_dtype", "bf16")) == 0
    assert all(w.dtype == torch.bfloat16 for w in weights(tmp_path / "b").values())
