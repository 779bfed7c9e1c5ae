"""What the three benchmarks share: a process for every measurement, its peak memory, the machine's own matrix
rate, random models, one table.

Linux only: peaks of memory are read from /proc, and children are forked (no import is paid twice, and every
child's allocator starts empty)."""
import argparse
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

# No download is ever wanted here, and peers are to be quiet. (Before they are imported.)
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false",
               "WANDB_DISABLED": "true"}
ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT.parent / "shared" / "assets"
sys.path.insert(0, str(ROOT))

import torch

from model import Config, Llama


# ----------------------------------------------------------------------------------------------------------
# a process for each measurement

def in_child(work, *args) -> dict:
    """work(*args), which returns a JSON-able dict, in a forked process; {"failed": why} if it fails, with the
    end of what it printed.

    The parent must not have used torch's threads or CUDA before: neither survives a fork."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        fork = multiprocessing.get_context("fork")
        child = fork.Process(target=_child, args=(theirs, log.name, work, args))
        child.start()
        theirs.close()
        try:
            result = json.loads(ours.recv_bytes())
        except EOFError:
            result = {"failed": "ended without a result (out of memory?)"}
        child.join()
        if "failed" in result:
            lines = Path(log.name).read_text(errors="replace").strip().splitlines()
            tail = " | ".join(lines[-3:])[-600:] or "nothing"
            result["failed"] += f"; exit code {child.exitcode}; it last said: {tail}"
        return result


def must(what: str, work, *args) -> dict:
    """`in_child`, where nothing can go on without the result."""
    result = in_child(work, *args)
    if "failed" in result:
        raise SystemExit(f"error: {what}: {result['failed']}")
    return result


def _child(pipe, log: str, work, args):
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(file, stream.fileno())
    try:
        result = work(*args)
    except BaseException as e:
        traceback.print_exc()
        result = {"failed": f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"}
    pipe.send_bytes(json.dumps(result).encode())


def resident(peak: bool = False) -> int:
    """Bytes of this process that are in memory now, or the most there ever were (since `reset_peak`)."""
    name = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def reset_peak():
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else resident(peak=True)


def synchronize(device: str):
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def clocked(device: str, work) -> tuple:
    """(what work() returns, seconds that it took)."""
    synchronize(device)
    begin = time.perf_counter()
    result = work()
    synchronize(device)
    return result, time.perf_counter() - begin


def median(values) -> float:
    values = sorted(values)
    return (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2


# ----------------------------------------------------------------------------------------------------------
# the machine

def gemm_rates(device: str, size: int, seconds: float = 1.0) -> dict:
    """FLOP/s of a product of two size x size matrices, 2 size^3 operations, in fp32 and bf16: the median over
    about `seconds` each."""
    rates = {}
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out, times = torch.empty_like(a), []
        while sum(times) < seconds or len(times) < 4:
            times.append(clocked(device, lambda: torch.mm(a, b, out=out))[1])
        rates[name] = 2 * size**3 / median(times[1:])
    return rates


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine(device: str = "cpu", peers: tuple[str, ...] = ()) -> dict:
    """What the figures were measured on. (In a child: asking for a GPU's name would start CUDA, which no fork
    survives.)"""
    return must(f"--device {device}", _machine, device, peers)


def _machine(device: str, peers: tuple[str, ...]) -> dict:
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    named = {}
    for key in ("model name", "flags"):
        named[key] = next((line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith(key)), "")
    return {"date": datetime.date.today().isoformat(), "cpu": named["model name"],
            "bf16": [flag for flag in ("avx512_bf16", "amx_bf16") if flag in named["flags"].split()],
            "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
            "versions": {name: version(name) for name in ("torch", *peers)}}


def machine_line(m: dict) -> str:
    bf16 = ", ".join(m["bf16"]) or "no bf16 instructions"
    where = f"{m['cpu']} ({bf16})" if m["device"] == "cpu" else f"{m['device']} (host: {m['cpu']})"
    versions = ", ".join(f"{name} {found or 'not installed'}" for name, found in m["versions"].items())
    return f"{where}, {m['cores']} cores, {m['threads']} threads; {versions}; {m['date']}"


# ----------------------------------------------------------------------------------------------------------
# random models of real shapes

def qwen2(hidden, intermediate, layers, heads, kv_heads, vocab, tied) -> dict:
    return {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu",
            "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
            "tie_word_embeddings": tied, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
            "rope_theta": 1e6, "initializer_range": 0.02, "bos_token_id": None, "eos_token_id": 1}


SHAPES = {"quick": qwen2(64, 176, 2, 4, 2, 300, True), "toy": qwen2(512, 1408, 8, 8, 2, 32000, True),
          "0.5B": qwen2(896, 4864, 24, 14, 2, 151936, True),
          "7B": qwen2(3584, 18944, 28, 28, 4, 152064, False)}


def write_checkpoint(folder: Path, raw: dict, seed: int = 0) -> dict:
    """A checkpoint folder of random weights in Hugging Face layout (bf16 above a billion parameters: it is
    read as fp32 anyway)."""
    model = Llama(Config.from_dict(raw)).init_weights(seed)
    parameters = sum(p.numel() for p in model.parameters())
    model.save_pretrained(folder, dtype=torch.bfloat16 if parameters > 1e9 else torch.float32)
    return {"parameters": parameters}


# ----------------------------------------------------------------------------------------------------------
# command line and output

QUICK = ("seconds instead of minutes: a tiny model, this project only; shows that the script works, measures "
         "nothing")


def add_options(p: argparse.ArgumentParser, precision: str, rounds: int | None = 2, shape: bool = True):
    """The options that several of the benchmarks have."""
    if shape:
        p.add_argument("--shape", choices=("toy", "0.5B", "7B"), default="toy",
                       help="toy: 8 layers, 512 wide, vocabulary 32,000; 0.5B, 7B: Qwen2's (random weights)")
    p.add_argument("--precision", choices=("fp32", "bf16"), default="fp32",
                   help=f"{precision} (default fp32)")
    p.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    if rounds:
        p.add_argument("--rounds", type=int, default=rounds,
                       help=f"how often each contestant runs (default {rounds})")
    p.add_argument("--quick", action="store_true", help=QUICK)
    p.add_argument("--json", metavar="FILE", help="write all figures there")


def progress(text: str):
    print(f"  {text}", file=sys.stderr, flush=True)


def table(title: str, columns: dict[str, str], rows: list[list], notes: list[str] = ()) -> str:
    """Aligned text: the first column to the left, the others to the right. columns: heading -> how its
    numbers are written; None prints as "-"."""
    def write(cell, how: str) -> str:
        if cell is None:
            return "-"
        return cell if isinstance(cell, str) else format(cell, how)

    cells = [list(columns)]
    cells += [[write(cell, how) for cell, how in zip(row, columns.values())] for row in rows]
    width = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = []
    for first, *others in cells:
        others = [cell.rjust(w) for cell, w in zip(others, width[1:])]
        lines.append("  ".join([first.ljust(width[0]), *others]).rstrip())
    rule = "-" * (sum(width) + 2 * (len(width) - 1))
    parts = [title, "", lines[0], rule, *lines[1:], ""]
    return "\n".join([*parts, *notes, ""] if notes else parts)


def yes(fact: bool) -> str:
    return "yes" if fact else "NO"


def finish(report: dict, text: str, path: str | None):
    print(text)
    if path:
        Path(path).write_text(json.dumps(report, indent=1) + "\n")
