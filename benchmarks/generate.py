"""Generation beside transformers: samples a second from the same weights, at equal numbers of output tokens.

    python benchmarks/generate.py                                                 under 5 minutes on 2 cores
    python benchmarks/generate.py --device cuda --shape 0.5B --precision bf16

    rectification   8 prompts of 256 tokens, 4 samples each, 64 new tokens, temperature 0.8, top-p 0.95: a
                    wrong step is drawn again
    evaluation      64 prompts of 64 to 192 tokens, greedy, 64 new tokens each
    collection      the same prompts, temperature 1; one token of 96 ends an answer, or its 192nd does:
                    answers as unequal as real ones are

Weights are random. In the first two cases no token ends a sample, so every contestant makes exactly
samples x 64 tokens; in the third the tokens of the answers are counted, not what is computed for rows
that have ended. transformers gets one batch, padded on the left as it wants it, a KV cache, and its own
defaults otherwise; this project is `model.generate`, as eval.py calls it.

In turn, each in a process of its own, round after round; a process makes its tokens once to warm up and
is timed after that; the medians count. Under greedy both must find the same tokens (in bf16 rounding
parts them, so there only the first difference is printed)."""
import argparse
import random
import sys
import tempfile
from pathlib import Path

from common import (SHAPES, add_options, clocked, finish, in_child, machine, machine_line, median, must,
                    peak_memory, progress, table, version, write_checkpoint, yes)

import torch

from model import Llama, generate, keep_freed_memory

CASES = {"rectification": dict(prompts=8, n=4, lengths=(256, 256), temperature=0.8, top_p=0.95),
         "evaluation": dict(prompts=64, n=1, lengths=(64, 192), temperature=0.0, top_p=1.0),
         "collection": dict(prompts=64, n=1, lengths=(64, 192), temperature=1.0, top_p=1.0, ends=96,
                            longer=3)}


def prompts_of(case: dict, vocab: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(2, vocab) for _ in range(rng.randint(*case["lengths"]))]
            for _ in range(case["prompts"])]


def ends_of(case: dict, vocab: int) -> list[int]:
    """The tokens that end an answer: every `ends`-th of the vocabulary."""
    return list(range(2, vocab, case["ends"])) if "ends" in case else []


def timed(work, device: str, repeats: int, most: float) -> tuple:
    """(result, seconds of each run after the first): up to `repeats` of them, as long as they take less than
    `most` seconds."""
    result, seconds = work(), []
    while len(seconds) < repeats and (not seconds or sum(seconds) + seconds[-1] < most):
        seconds.append(clocked(device, work)[1])
    return result, seconds


def run_ours(folder: str, case: dict, prompts: list, new: int, device: str, dtype, repeats: int) -> dict:
    keep_freed_memory()
    model = Llama.from_pretrained(folder, dtype=dtype, device=device)
    how = dict(n=case["n"], max_new_tokens=new, temperature=case["temperature"], top_p=case["top_p"], seed=0,
               eos_ids=tuple(ends_of(case, model.config.vocab_size)))
    samples, seconds = timed(lambda: generate(model, prompts, **how), device, repeats, 15)
    tokens = [s.token_ids for row in samples for s in row]
    return {"tokens": tokens, "seconds": seconds, "peak": peak_memory(device)}


def run_transformers(folder: str, case: dict, prompts: list, new: int, device: str, dtype,
                     repeats: int) -> dict:
    import transformers
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    how = dict(do_sample=False)
    if case["temperature"]:
        how = dict(do_sample=True, temperature=case["temperature"], top_p=case["top_p"], top_k=0)
    ends = ends_of(case, model.config.vocab_size)
    config = transformers.GenerationConfig(
        max_new_tokens=new, min_new_tokens=None if ends else new, num_return_sequences=case["n"],
        eos_token_id=ends or None, pad_token_id=0, **how)

    def work():
        torch.manual_seed(0)
        with torch.inference_mode():
            return model.generate(input_ids=ids, attention_mask=mask, generation_config=config)

    out, seconds = timed(work, device, repeats, 15)
    stop, answers = set(ends), []
    for row in out[:, width:].tolist():         # what was computed for a row after its end is no output
        length = next((i for i, token in enumerate(row) if token in stop), len(row))
        answers.append(row[:length])
    return {"tokens": answers, "seconds": seconds, "peak": peak_memory(device)}


def first_difference(a: list, b: list) -> str | None:
    """Where two lists of samples part; None if nowhere."""
    for i, (x, y) in enumerate(zip(a, b)):
        for j, (s, t) in enumerate(zip(x, y)):
            if s != t:
                return f"prompt {i}, token {j}: {s} and {t}"
    return None


def prepare(folder: str, shape: str) -> dict:
    return write_checkpoint(Path(folder), SHAPES[shape] | {"eos_token_id": None})


def main(argv=None) -> int:
    p = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    add_options(p, precision="of weights and arithmetic")
    args = p.parse_args(argv)
    shape, new, rounds, repeats, bf16 = args.shape, 64, args.rounds, 3, args.precision == "bf16"
    contestants = {"this project": run_ours, "transformers": run_transformers}
    if args.quick:
        shape, new, rounds, repeats, bf16 = "quick", 8, 1, 1, False
    if args.quick or not version("transformers"):
        del contestants["transformers"]
    dtype = torch.bfloat16 if bf16 else torch.float32
    report = {"machine": machine(args.device, tuple(contestants)[1:]), "settings": vars(args),
              "cases": {}, "checks": {"all_ran": True, "all_tokens": True}}
    rows, notes, checks = [], [], report["checks"]
    with tempfile.TemporaryDirectory() as folder:
        must(f"--shape {shape}", prepare, folder, shape)
        for name, case in CASES.items():
            prompts = prompts_of(case, SHAPES[shape]["vocab_size"])
            runs = {who: [] for who in contestants}
            for turn in range(rounds):
                for who, work in contestants.items():
                    most = new * case.get("longer", 1)
                    run = in_child(work, folder, case, prompts, most, args.device, dtype, repeats)
                    runs[who].append(run)
                    said = run.get("failed") or f"{median(run['seconds']):.2f} s"
                    progress(f"{name}, round {turn + 1}: {who}: {said}")
            samples, ran, failed = case["prompts"] * case["n"], {}, {}
            for who, found in runs.items():
                if failures := [run["failed"] for run in found if "failed" in run]:
                    failed[who] = {"failed": failures[0]}
                    rows.append([f"{name}: {who}: {failures[0][:80]}"] + [None] * 5)
                    continue
                seconds = [s for run in found for s in run["seconds"]]
                time, made = median(seconds), sum(map(len, found[0]["tokens"]))
                ran[who] = {"seconds": time, "samples_per_second": samples / time,
                            "tokens_per_second": made / time, "tokens": made,
                            "peak_bytes": max(run["peak"] for run in found), "runs": seconds}
                checks["all_tokens"] &= "ends" in case or made == samples * new
            checks["all_ran"] &= not failed
            report["cases"][name] = failed | ran
            for who, c in ran.items():
                faster = None
                if "transformers" in ran:
                    faster = c["tokens_per_second"] / ran["transformers"]["tokens_per_second"]
                rows.append([f"{name}: {who}", c["tokens"], c["samples_per_second"], c["tokens_per_second"],
                             faster, c["peak_bytes"] / 1e9])
            if case["temperature"] == 0 and len(ran) == 2:
                parted = first_difference(*(runs[who][0]["tokens"] for who in contestants))
                checks["greedy_equal"] = bf16 or parted is None
                notes.append(f"Checked, {name}: both made the same {ran['this project']['tokens']:,} tokens: "
                             f"{yes(parted is None)}{', ' + parted if parted else ''}.")
    title = f"Generation, {args.precision}"
    if len(contestants) == 1:
        title += ": transformers is not installed, or left out"
    columns = {"": "", "tokens made": ",", "samples/s": ".2f", "tokens/s": ",.0f", "of transformers": ".2f",
               "peak GB": ".2f"}
    text = machine_line(report["machine"]) + "\n\n" + table(title, columns, rows, notes)
    finish(report, text, args.json)
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
