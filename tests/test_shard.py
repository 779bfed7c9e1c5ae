"""--shard: one model over several processes. Proved with gloo on a CPU; the code is the same on GPUs, the transport (nccl) is not."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, pair_rows, tiny_checkpoint, tiny_model, write_rows
from safetensors.torch import load_file
from test_train import ENV, close, cmdline, kill_all, metrics, wait_for_lines, weights

import stepdpo

PROGRAM = str(ROOT / "stepdpo.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Tiny checkpoints with a vocabulary of 259 (which neither 2 nor 4 divide), 27 pairs (batches of 8, 8, 8, 3) and what one process makes of them."""
    folder = tmp_path_factory.mktemp("work")
    tiny_checkpoint(folder / "model")
    tiny_checkpoint(folder / "tied", seed=3, tie_word_embeddings=True)
    tiny_checkpoint(folder / "other", seed=5)
    write_rows(folder / "pairs.jsonl", pair_rows(27))
    write_rows(folder / "held.jsonl", pair_rows(10, seed=1))
    assert stepdpo.main(arguments(folder, folder / "one")) == 0
    return folder


def arguments(work, out, *more) -> list[str]:
    """30 updates. A row in a micro-batch more or less makes ranks differ in how many passes they need, in every step and in every pass over held-out pairs."""
    return ["stepdpo", "--model", str(work / "model"), "--data", str(work / "pairs.jsonl"), "--out", str(out), "--eval_data", str(work / "held.jsonl"),
            "--eval_every", "9", "--prompt", "alpaca", "--batch_size", "8", "--micro_batch_size", "3", "--lr", "1e-3", "--max_steps", "30",
            "--checkpoint_every", "4", "--device", "cpu", *more]


def run(*command) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def start(*command):
    return subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def same_numbers(a: Path, b: Path):
    """Losses, gradient norms, held-out results and weights, but for the rounding of sums in another order."""
    close(a, b, 2e-5)
    for x, y in zip(*((out / "eval.jsonl").read_text().splitlines() for out in (a, b)), strict=True):
        assert json.loads(x) == pytest.approx(json.loads(y), abs=2e-5, rel=2e-5)


@pytest.fixture(scope="module")
def whole(work):
    """What two processes that share the model make of it, uninterrupted."""
    run(*TORCHRUN, "2", PROGRAM, *arguments(work, work / "two", "--shard"))
    return work / "two"


def test_two_processes_give_what_one_gives(work, whole):
    """30 updates and 5 held-out passes, with ranks that differ in how many micro-batches they have; transformers loads the folder."""
    same_numbers(work / "one", whole)
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle of this test")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
    assert all(torch.equal(theirs.get_parameter(k), w) for k, w in weights(whole).items())


@pytest.mark.skipif(sys.platform != "linux", reason="finds the run's processes in /proc")
def test_a_process_dies(work, whole, tmp_path):
    """One of two is killed: `torchrun --max-restarts` starts both again and the run ends bit-identical, although it was begun with --restart, which a second
    start must not obey."""
    out = tmp_path / "out"
    process = start(*TORCHRUN, "2", "--max-restarts", "1", PROGRAM, *arguments(work, out, "--shard", "--restart"))
    wait_for_lines(out / "metrics.jsonl", 10, process)
    victim, = (int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and str(out).encode() in cmdline(p)
               and b"torch.distributed.run" not in cmdline(p) and b"\0LOCAL_RANK=1\0" in (p / "environ").read_bytes())
    os.kill(victim, signal.SIGKILL)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "continuing after step" in said, said
    assert metrics(out) == metrics(whole)
    assert all(torch.equal(w, weights(whole)[k]) for k, w in weights(out).items())


@pytest.mark.skipif(sys.platform != "linux", reason="finds the run's processes in /proc")
def test_a_run_goes_on_under_another_number_of_processes(work, tmp_path):
    """One checkpoint format for all: begun by 4 processes that share the model and stopped; continued by one without --shard and killed; ended by 2 that share
    it. With all that may go wrong in between: tied embeddings, --reference (sharded too), --gradient_checkpointing."""
    out, more = tmp_path / "out", ["--model", str(work / "tied"), "--reference", str(work / "other"), "--gradient_checkpointing"]
    assert stepdpo.main(arguments(work, tmp_path / "one", *more)) == 0
    process = start(*TORCHRUN, "4", PROGRAM, *arguments(work, out, *more, "--shard"))
    wait_for_lines(out / "metrics.jsonl", 5, process)
    process.send_signal(signal.SIGTERM)
    assert "stopped by SIGTERM after step" in process.communicate(timeout=120)[0]
    process = start(sys.executable, PROGRAM, *arguments(work, out, *more))
    wait_for_lines(out / "metrics.jsonl", 18, process)
    kill_all(out, process)
    assert "continuing after step" in process.communicate()[0]
    assert "continuing after step" in run(*TORCHRUN, "2", PROGRAM, *arguments(work, out, *more, "--shard"))
    same_numbers(tmp_path / "one", out)
    assert weights(out).keys() == weights(tmp_path / "one").keys() and "lm_head.weight" not in weights(out)


@pytest.fixture(scope="module")
def script(work):
    """Two processes that read and save a model of 143 MB, and then train a tiny one in bf16: (the folder, a line of megabytes from each)."""
    tiny_model(hidden_size=512, intermediate_size=1408, num_hidden_layers=12, vocab_size=2000).save_pretrained(work / "large")
    (work / "script.py").write_text(SCRIPT)
    return work, run(*TORCHRUN, "2", str(work / "script.py"), str(ROOT), str(work), *arguments(work, work / "bf16", *BF16, "--shard"))


BF16 = ["--max_steps", "4", "--precision", "bf16"]
SCRIPT = """
import sys
from argparse import Namespace
from pathlib import Path
root, work, *argv = sys.argv[1:]
sys.path.insert(0, root)
import stepdpo

def memory(field):
    return next(int(line.split()[1]) / 1024 for line in open('/proc/self/status') if line.startswith(field))

(rank, world), cpu = stepdpo.join_processes(), stepdpo.torch.device('cpu')
if sys.platform == 'linux':
    stepdpo.keep_freed_memory()
    args = Namespace(shard=True, precision='bf16', compile=False, lora=None, seed=0)
    stepdpo.load_policy(work + '/model', args, world, cpu)         # a tiny one first, so that what the libraries take for themselves is not counted
    before = memory('VmRSS')
    policy = stepdpo.load_policy(work + '/large', args, world, cpu)
    held, loading = sum(stepdpo.own_slice(p).nbytes for p in policy.parameters()) / 2**20, memory('VmHWM') - before
    stepdpo.barrier()
    before = memory('VmRSS')
    policy.model.save_pretrained(work + '/large again', shard_bytes=10 * 2**20)
    sys.stdout.write(f"MB: {held} {loading} {max(0, memory('VmHWM') - before)}\\n")
status = stepdpo.main(argv)
stepdpo.dist.destroy_process_group()
sys.exit(status)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
def test_no_process_holds_the_whole_model(script):
    """Each process has half of the model, reads it with hardly more than that, and saves it with no more than one of the files (10 MB here) in flight."""
    work, said = script
    size = (work / "large" / "model.safetensors").stat().st_size / 2**20
    lines = [line.split()[1:] for line in said.splitlines() if line.startswith("MB: ")]
    assert len(lines) == 2
    for held, loading, saving in (map(float, line) for line in lines):
        assert held < 0.51 * size and loading < 0.6 * size and saving < 0.3 * size, f"MB of {size:.0f}: {lines}"
    files = list((work / "large again").glob("*.safetensors"))
    again = {k: w for path in files for k, w in load_file(path).items()}
    assert len(files) > 10 and again.keys() == weights(work / "large").keys()
    assert all(torch.equal(w, again[k]) for k, w in weights(work / "large").items())


def test_bf16(script):
    """Weights that travel as bf16 give the losses of an unsharded bf16 run but for rounding, and stay fp32 where they are kept."""
    work, _ = script
    assert stepdpo.main(arguments(work, work / "bf16 one", *BF16)) == 0
    for x, y in zip(metrics(work / "bf16"), metrics(work / "bf16 one"), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], abs=5e-3) and x["grad_norm"] == pytest.approx(y["grad_norm"], rel=0.03)
    moved = [(weights(work / "model")[k], w) for k, w in weights(work / "bf16").items()]
    assert all(w.dtype == torch.float32 and not torch.equal(w, w.bfloat16().float()) and not torch.equal(w, before) for before, w in moved)
