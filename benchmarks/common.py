"""What the three benchmarks share: a process for every measurement, its peak memory, the machine's own matrix rate, random models, one table.

Linux only: peaks of memory are read from /proc, and children are forked (no import is paid twice, and every child's allocator starts empty)."""
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
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false", "WANDB_DISABLED": "true"}
ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT.parent / "shared" / "assets"
sys.path.insert(0, str(ROOT))

import torch

from model import Config, Llama


# ---------------------------------------------------------------------------------------------------------------------
# a process for each measurement

def in_child(work, *args) -> dict:
    """work(*args), which returns a JSON-able dict, in a forked process; {"failed": why} if it fails, with the end of what it printed.

    The parent must not have used torch's threads or CUDA before: neither survives a fork."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        child = multiprocessing.get_context("fork").Process(target=_child, args=(theirs, log.name, work, args))
        child.start()
        theirs.close()
        try:
            result = json.loads(ours.recv_bytes())
        except EOFError:
            result = {"failed": "ended without a result (out of memory?)"}
        child.join()
        if "failed" in result:
            tail = " | ".join(Path(log.name).read_text(errors="replace").strip().splitlines()[-3:])[-600:]
            result["failed"] += f"; exit code {child.exitcode}; it last said: {tail or 'nothing'}"
        return result


def _child(pipe, log: str, work, args):
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    sys.stdout.flush(), sys.stderr.flush()
    os.dup2(file, 1), os.dup2(file, 2)
    try:
        result = work(*args)
    except BaseException as e:
        traceback.print_exc()
        result = {"failed": f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"}
    pipe.send_bytes(json.dumps(result).encode())


def resident(peak: bool = False) -> int:
    """Bytes of this process that are in memory now, or the most there ever were (since `reset_peak`)."""
    name = "VmHWM:" if peak else "VmRSS:"
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))


def reset_peak():
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else resident(peak=True)


def synchronize(device: str):
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def median(values) -> float:
    values = sorted(values)
    return (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2


# ---------------------------------------------------------------------------------------------------------------------
# the machine

def gemm_rates(device: str, size: int, seconds: float = 1.0) -> dict:
    """FLOP/s of a product of two size x size matrices, 2 size^3 operations, in fp32 and bf16: the median over about `seconds` each."""
    rates = {}
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out, times, begin = torch.empty_like(a), [], time.perf_counter()
        while time.perf_counter() - begin < seconds or len(times) < 4:
            synchronize(device)
            clock = time.perf_counter()
            torch.mm(a, b, out=out)
            synchronize(device)
            times.append(time.perf_counter() - clock)
        rates[name] = 2 * size**3 / median(times[1:])
    return rates


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine(device: str = "cpu", peers: tuple[str, ...] = ()) -> dict:
    """What the figures were measured on. (In a child: asking for a GPU's name would start CUDA, which no fork survives.)"""
    found = in_child(_machine, device, peers)
    if "failed" in found:
        raise SystemExit(f"error: --device {device}: {found['failed']}")
    return found


def _machine(device: str, peers: tuple[str, ...]) -> dict:
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    named = {key: next((line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith(key)), "") for key in ("model name", "flags")}
    bf16 = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in named["flags"].split()]
    return {"date": datetime.date.today().isoformat(), "cpu": named["model name"], "bf16": bf16, "cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(), "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
            "versions": {name: version(name) for name in ("torch", *peers)}}


def machine_line(m: dict) -> str:
    where = f"{m['device']} (host: {m['cpu']})" if m["device"] != "cpu" else f"{m['cpu']} ({', '.join(m['bf16']) or 'no bf16 instructions'})"
    versions = ", ".join(f"{name} {found or 'not installed'}" for name, found in m["versions"].items())
    return f"{where}, {m['cores']} cores, {m['threads']} threads; {versions}; {m['date']}"


# ---------------------------------------------------------------------------------------------------------------------
# random models of real shapes

def qwen2(hidden, intermediate, layers, heads, kv_heads, vocab, tied) -> dict:
    return {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "hidden_size": hidden,
            "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "vocab_size": vocab, "tie_word_embeddings": tied, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
            "initializer_range": 0.02, "bos_token_id": None, "eos_token_id": 1}


SHAPES = {"quick": qwen2(64, 176, 2, 4, 2, 300, True), "toy": qwen2(512, 1408, 8, 8, 2, 32000, True),
          "0.5B": qwen2(896, 4864, 24, 14, 2, 151936, True), "7B": qwen2(3584, 18944, 28, 28, 4, 152064, False)}


def write_checkpoint(folder: Path, raw: dict, seed: int = 0) -> dict:
    """A checkpoint folder of random weights in Hugging Face layout (bf16 above a billion parameters: it is read as fp32 anyway)."""
    model = Llama(Config.from_dict(raw)).init_weights(seed)
    parameters = sum(p.numel() for p in model.parameters())
    model.save_pretrained(folder, dtype=torch.bfloat16 if parameters > 1e9 else torch.float32)
    return {"parameters": parameters}


# ---------------------------------------------------------------------------------------------------------------------
# output

def table(title: str, columns: dict[str, str], rows: list[list], notes: list[str] = ()) -> str:
    """Aligned text: the first column to the left, the others to the right. columns: heading -> how its numbers are written; None prints as "-"."""
    write = lambda cell, how: "-" if cell is None else cell if isinstance(cell, str) else format(cell, how)
    cells = [list(columns)] + [[write(cell, how) for cell, how in zip(row, columns.values())] for row in rows]
    width = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    align = lambda row: "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, width))).rstrip()
    return "\n".join([title, "", align(cells[0]), "-" * len(align(["x" * w for w in width])), *map(align, cells[1:]), *[""] * bool(notes), *notes, ""])


def yes(fact: bool) -> str:
    return "yes" if fact else "NO"


QUICK = "seconds instead of minutes: a tiny model, this project only; shows that the script works, measures nothing"


def finish(report: dict, text: str, path: str | None):
    print(text)
    if path:
        Path(path).write_text(json.dumps(report, indent=1) + "\n")
