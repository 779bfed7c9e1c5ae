"""From hidden states to log-probabilities, forward and backward: `stepdpo.FusedLogProbs` and what could
stand in its place.

    python benchmarks/logprobs.py                             under 5 minutes on 2 cores
    python benchmarks/logprobs.py --device cuda --width 3584  with Liger's kernel, where it is installed

Given hidden (M, C), weight (V, C), targets (M,) and a gradient for each of the M log-probs (in DPO a
token's weight is known only after the sum over its step), every contestant makes the M log-probs and the
gradients of hidden and weight:

    this project              stepdpo.FusedLogProbs
    plain                     log_softmax(hidden @ weight.T), then gather
    F.linear_cross_entropy    torch's own (2.13), with reduction="none", in chunks of 128 tokens (left to
                              choose, it takes 1 to 8 tokens at these vocabularies, and several times as long)
    Liger                     liger_kernel's fused linear cross entropy, CUDA only: makes its gradients in the
                              forward pass, so it cannot take one for each token. It runs with a plain sum, an
                              easier task: only its speed and memory are comparable

Each case runs in a process of its own, with malloc set as in training (model.keep_freed_memory). Its
first run gives the memory: `extra` is the peak above what was there before, less the two gradients, which
must be returned. After another to warm up, one or two more give the time (the faster of two, where they
are short). Error: the largest difference from float64, over the largest value."""
import argparse
import sys
import tempfile
from pathlib import Path

from common import (add_options, clocked, finish, in_child, machine, machine_line, must, peak_memory,
                    progress, reset_peak, resident, synchronize, table, version, yes)

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from model import keep_freed_memory
from stepdpo import FusedLogProbs


def inputs(M: int, C: int, V: int, device="cpu", dtype=torch.float32) -> tuple:
    """hidden, weight, targets and the gradient of each log-prob: logits of a spread of about 3, as a trained
    model has them."""
    generator = torch.Generator().manual_seed(V + M)
    normal = lambda *shape: torch.empty(shape).normal_(generator=generator)
    hidden, weight = normal(M, C), normal(V, C).mul_(3 / C**0.5)
    targets = torch.randint(V, (M,), generator=generator)
    hidden, weight = (x.to(device, dtype).requires_grad_() for x in (hidden, weight))
    return hidden, weight, targets.to(device), normal(M).to(device)


def ours(hidden, weight, targets):
    return FusedLogProbs.apply(hidden, weight, targets)


def plain(hidden, weight, targets):
    return F.linear(hidden, weight).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def linear_cross_entropy(hidden, weight, targets):
    options = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=128)
    return -F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)


def liger(hidden, weight, targets):
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss
    return -LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, targets)


WAYS = {"this project": ours, "plain": plain, "F.linear_cross_entropy": linear_cross_entropy, "Liger": liger}


def exact(folder: str, M: int, C: int, V: int, bf16: bool) -> dict:
    """The float64 answer to the same inputs, a few tokens at a time, into a file."""
    hidden, weight, targets, grad = inputs(M, C, V, dtype=torch.bfloat16 if bf16 else torch.float32)
    h, w, g = hidden.detach().double(), weight.detach().double(), grad.double()
    logps, grad_hidden, grad_weight = torch.empty(M).double(), torch.empty_like(h), torch.zeros_like(w)
    for start in range(0, M, 256):
        s = slice(start, start + 256)
        z = h[s] @ w.T
        log_z = z.logsumexp(-1)
        logps[s] = z.gather(1, targets[s, None])[:, 0] - log_z
        z.sub_(log_z[:, None]).exp_().mul_(-g[s, None]).scatter_add_(1, targets[s, None], g[s, None])
        grad_hidden[s] = z @ w
        grad_weight.addmm_(z.T, h[s])
    found = {"logps": logps, "grad_hidden": grad_hidden.float(), "grad_weight": grad_weight.float()}
    save_file(found, Path(folder) / f"{M}-{V}.safetensors")
    return {}


def measure(folder: str, way: str, M: int, C: int, V: int, device: str, bf16: bool) -> dict:
    keep_freed_memory()
    dtype = torch.bfloat16 if bf16 else torch.float32
    small = inputs(8, C, 64, device, dtype)
    torch.autograd.grad(WAYS[way](*small[:3]).sum(), small[:2])         # loads libraries, starts threads
    hidden, weight, targets, grad = inputs(M, C, V, device, dtype)

    def once():
        logps = WAYS[way](hidden, weight, targets)
        of_each = grad.to(logps.dtype) if logps.dim() else None
        return logps.detach(), *torch.autograd.grad(logps, (hidden, weight), of_each)

    synchronize(device)
    if device == "cpu":
        reset_peak()
        before = resident()
    else:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    logps, *grads = once()
    synchronize(device)
    peak = peak_memory(device) - before
    returned = sum(g.numel() * g.element_size() for g in grads)
    error = {}
    if logps.dim():
        wanted = load_file(Path(folder) / f"{M}-{V}.safetensors", device=device)
        for name, found in {"logps": logps, "grad_hidden": grads[0], "grad_weight": grads[1]}.items():
            error[name] = float((wanted[name] - found).abs().max() / wanted[name].abs().max())
        del wanted
    del grads, logps
    once()
    seconds = []
    while len(seconds) < 2 and sum(seconds) < 3:
        seconds.append(clocked(device, once)[1])
    return {"seconds": min(seconds), "peak_bytes": peak, "extra_bytes": max(0, peak - returned),
            "gradient_bytes": returned, "error": error}


def main(argv=None) -> int:
    p = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    add_options(p, precision="of hidden and weight", rounds=None, shape=False)
    p.add_argument("--width", type=int, default=512, metavar="C", help="hidden size (default 512)")
    p.add_argument("--vocabulary", type=int, action="append", metavar="V",
                   help="may be repeated (default: 32000, 128256, 151936: those of Llama 2, Llama 3, Qwen2)")
    args = p.parse_args(argv)
    vocabularies, tokens, C = args.vocabulary or (32_000, 128_256, 151_936), (512, 4096), args.width
    if args.quick:
        vocabularies, tokens, C = (400, 1000), (32,), 16
    there = {"Liger": args.device.startswith("cuda") and version("liger-kernel"),
             "F.linear_cross_entropy": hasattr(F, "linear_cross_entropy")}
    bf16 = args.precision == "bf16"
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        for V in vocabularies:
            for M in tokens:
                must(f"{M} x {V} in float64", exact, folder, M, C, V, bf16)
                for way in WAYS:
                    if there.get(way, True):
                        case = in_child(measure, folder, way, M, C, V, args.device, bf16)
                        cases.append({"way": way, "V": V, "M": M, **case})
                        progress(f"{M} x {V}: {way}: {case.get('failed') or '%.2f s' % case['seconds']}")
                (Path(folder) / f"{M}-{V}.safetensors").unlink()
    rows, plain = [], {(c["V"], c["M"]): c.get("seconds") for c in cases if c["way"] == "plain"}
    for case in cases:
        if "failed" in case:
            rows.append([f"{case['way']}: {case['failed'][:60]}", case["V"], case["M"]] + [None] * 7)
            continue
        case["logits_bytes"] = case["V"] * case["M"] * (2 if bf16 else 4)
        beside = plain[case["V"], case["M"]]
        case["of_plain"] = case["seconds"] / beside if beside else None
        error = case["error"]
        gradients = max(error["grad_hidden"], error["grad_weight"]) if error else None
        rows.append([case["way"], case["V"], case["M"], case["seconds"], case["of_plain"],
                     case["extra_bytes"] / 1e6, case["logits_bytes"] / 1e6,
                     case["extra_bytes"] / case["logits_bytes"], error.get("logps"), gradients])
    ours_ran = [c for c in cases if c["way"] == "this project" and "failed" not in c]
    bound = 5e-2 if bf16 else 1e-5
    exact_enough = bool(ours_ran) and all(max(c["error"].values()) < bound for c in ours_ran)
    checks = {f"error_below_{bound:g}": exact_enough, "all_ran": not any("failed" in c for c in cases)}
    notes = ["extra: peak above the inputs and the returned gradients; full logits: one (tokens, vocabulary) "
             "matrix.",
             f"Checked: error of this project below {bound:g} everywhere: {yes(exact_enough)}."]
    if ours_ran:
        last = ours_ran[-1]
        small, fast = last["extra_bytes"] <= 0.1 * last["logits_bytes"], (last["of_plain"] or 0) <= 1
        notes.append(f"This project at {last['M']:,} tokens x {last['V']:,}: extra at most 10 % of the full "
                     f"logits: {yes(small)}; no slower than plain: {yes(fast)}.")
    peers = ("liger-kernel",) if args.device.startswith("cuda") else ()
    report = {"machine": machine(args.device, peers), "settings": vars(args), "cases": cases,
              "checks": checks}
    columns = {"": "", "vocabulary": ",", "tokens": ",", "seconds": ".3f", "of plain": ".2f",
               "extra MB": ",.0f", "full logits MB": ",.0f", "extra share": ".0%", "error logps": ".0e",
               "error gradients": ".0e"}
    title = f"Log-probabilities of targets, forward and backward, hidden size {C}, {args.precision}"
    text = machine_line(report["machine"]) + "\n\n" + table(title, columns, rows, notes)
    finish(report, text, args.json)
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
