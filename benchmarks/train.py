"""Training speed and memory: one epoch of Step-DPO by this project and by TRL's DPOTrainer, on the same weights, rows, precision and updates.

    python benchmarks/train.py                     everything below, on a small model of Qwen2's shape: under 5 minutes on 2 cores
    python benchmarks/train.py --part peers        this project beside TRL's DPOTrainer, at TRL's defaults and at its best settings
    python benchmarks/train.py --part ideas        from a plain implementation to this one, one idea at a time
    python benchmarks/train.py --part prefix       sharing the prefix against its formula, (P + 2S) / (2P + 2S)
    python benchmarks/train.py --device cuda --shape 0.5B --precision bf16 --batch_size 16 --peak_tflops 989

Every contestant runs in a process of its own, in turn, round after round, so that a drift of the machine's speed meets all alike; its figure
is the median of the rounds. This project runs as its users run it, by `stepdpo.main`, and is timed by its own metrics.jsonl; TRL by
`DPOTrainer.train`, from the end of an update to the end of the next. All take the same rows in the same order, AdamW (fused) with the same linear
schedule, gradients clipped at 1. The first update warms up and is not counted. That all did the same work is checked: token counts row by row,
and the loss of every update.

Model FLOPs of an update, forward and backward (the backward costs twice the forward, hence 3 x 2 = 6 a weight and token):

    6 N body - 6 (N - A) last + 6 M C V + 12 layers heads head_size (pairs of tokens of which one attends to the other)

with N = P + 2S tokens a pair (the prefix counted once), body = the weights of the blocks' linear layers, M response tokens, predicted at A positions,
last = the weights of the last block that only these need (its output projection and MLP), C hidden size, V vocabulary.
Recomputation is not counted. These operations cannot be avoided, so they are the numerator for every contestant: the share of the
GEMM rate says how near a whole update, optimizer included, comes to the time that the machine's matrix product alone would need."""
import argparse
import copy
import dataclasses
import json
import math
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from common import (ASSETS, QUICK, SHAPES, finish, gemm_rates, in_child, machine, machine_line, median, peak_memory, synchronize, table, version,
                    write_checkpoint, yes)

import tokenizers
import torch

import data
import stepdpo
from model import Config, Llama, Tree, keep_freed_memory

BETA, LR = 0.4, 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# what is trained on

def word_tokenizer(folder: Path, vocab: int):
    """tokenizer.json of `vocab` words w0, w1, ... between spaces: text with exactly as many tokens as it has words."""
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, vocab)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    tokenizer.add_special_tokens(["<pad>", "<eos>"])
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "pad_token": "<pad>", "add_bos_token": False}))


def generated_rows(count: int, vocab: int, seed: int, prefix: tuple[int, int], step: tuple[int, int]) -> list[dict]:
    """Rows with the columns of Math-Step-DPO-10K, of random words: a prefix (question and steps) and two steps of lengths in the given ranges."""
    rng = random.Random(seed)
    words = lambda n: " ".join(f"w{rng.randrange(2, vocab)}" for _ in range(n))
    rows = []
    for _ in range(count):
        before = rng.randint(*prefix)
        rows.append({"prompt": words(before // 2), "initial_reason_steps": " " + words(before - before // 2),
                     "chosen": " " + words(rng.randint(*step)), "rejected": " " + words(rng.randint(*step))})
    return rows


def flops_of(example, config: Config) -> int:
    """Model FLOPs of one update's share of a pair; the formula is at the top of this file."""
    P, tails = example.shared, [len(side) - example.shared for side in example.sides]
    responses = sum(len(side) - example.start for side in example.sides)
    c, width = config, config.num_attention_heads * config.head_dim
    last = c.hidden_size * (width + 3 * c.intermediate_size)
    body = c.num_hidden_layers * (last + c.hidden_size * (width + 2 * c.num_key_value_heads * c.head_dim))
    asked = responses - (len(tails) - 1) * (P - example.start + 1)              # the last token of the prefix predicts for both sides
    seen = P * (P + 1) // 2 + sum(S * P + S * (S + 1) // 2 for S in tails)
    tokens = P + sum(tails)
    return 6 * tokens * body - 6 * (tokens - asked) * last + 6 * responses * c.hidden_size * c.vocab_size + 12 * c.num_hidden_layers * width * seen


# ---------------------------------------------------------------------------------------------------------------------
# the contestants; each function runs in a child

def train_ours(job: dict, precision: str, checkpointing: bool, micro: int | None = None) -> dict:
    """stepdpo.py as its command line runs it; the reference pass is timed by a wrapper around `stepdpo.score`."""
    seconds, score = [], stepdpo.score

    def timed(*args, **kwargs):
        clock = time.perf_counter()
        table = score(*args, **kwargs)
        synchronize(job["device"])
        seconds.append(time.perf_counter() - clock)
        return table

    stepdpo.score = timed
    out = Path(job["folder"]) / f"ours-{os.getpid()}"
    status = stepdpo.main([
        "stepdpo", "--model", job["model"], "--data", job["rows"], "--out", str(out), "--prompt", job["prompt"], "--epochs", "1",
        "--max_steps", str(job["steps"]), "--batch_size", str(job["batch_size"]), "--micro_batch_size", str(micro or job["micro_batch_size"]),
        "--lr", str(LR), "--schedule", "linear", "--warmup", "0", "--beta", str(BETA), "--precision", precision, "--device", job["device"],
        "--checkpoint_every", "0", *["--gradient_checkpointing"] * checkpointing])
    if status:
        raise RuntimeError(f"stepdpo.py ended with status {status}")
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {"losses": [s["loss"] for s in steps], "seconds": [s["seconds"] for s in steps], "score_seconds": sum(seconds),
            "peak": peak_memory(job["device"])}


# What makes TRL fastest was looked for on 2 cores. One pair at a time, accumulated to the same batch, wins by far on a CPU: it pads little.
# No gain: torch_compile (73 s to compile, then 10 % slower). No longer there: padding_free (TRL 1.16 warns and goes on without it) and
# use_logits_to_keep (its fused head took its place: on CUDA it computes response positions only, on a CPU all positions).
PRECOMPUTED = dict(precompute_ref_log_probs=True, gradient_checkpointing=False)
TRL_SETTINGS = {
    "TRL, its defaults": dict(),
    "TRL, reference precomputed, no checkpointing": PRECOMPUTED,
    "TRL, the same, one pair at a time": dict(PRECOMPUTED, micro_batch_size=1),
}


def train_trl(job: dict, precision: str, settings: dict) -> dict:
    """TRL's DPOTrainer. It is handed token ids instead of text (its own tokenisation adds an EOS to every response, which a step must not have)."""
    import datasets
    import transformers
    import trl
    datasets.disable_progress_bars()
    settings = dict(settings)
    micro = settings.pop("micro_batch_size", job["micro_batch_size"])
    if job["gradient_checkpointing"]:
        settings.pop("gradient_checkpointing", None)                           # TRL's default is on
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(Path(job["model"]) / "tokenizer.json"), pad_token=job["pad_token"],
                                                     eos_token=job["pad_token"])
    model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    ends, losses, scoring, counts = [], [], [], []

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            ends.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            synchronize(job["device"])
            ends.append(time.perf_counter())

        def on_log(self, args, state, control, logs=None, **_):
            losses.extend([logs["loss"]] if "loss" in logs else [])

    class Trainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *_, **__):                         # the rows are tokens already
            return dataset

        def compute_ref_log_probs(self, *args, **kwargs):
            clock = time.perf_counter()
            logps = super().compute_ref_log_probs(*args, **kwargs)
            synchronize(job["device"])
            scoring.append(time.perf_counter() - clock)
            return logps

    config = trl.DPOConfig(
        output_dir=str(Path(job["folder"]) / f"trl-{os.getpid()}"), per_device_train_batch_size=micro,
        gradient_accumulation_steps=job["batch_size"] // micro, max_steps=job["steps"], learning_rate=LR, lr_scheduler_type="linear", warmup_steps=0,
        beta=BETA, max_grad_norm=1.0, weight_decay=0.0, bf16=precision == "bf16", use_cpu=job["device"] == "cpu", seed=0,
        train_sampling_strategy="sequential", logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True, **settings)
    rows = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in job["tokens"]]
    trainer = Trainer(model=model, args=config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Clock()])
    collate = trainer.data_collator

    def counting(features):
        batch = collate(features)
        whole, answer = batch["attention_mask"].sum(1).tolist(), batch["completion_mask"].sum(1).tolist()
        half = len(whole) // 2
        counts.extend([w - a, a, b] for w, a, b in zip(whole[:half], answer[:half], answer[half:]))
        return batch

    trainer.data_collator = counting
    trainer.train()
    same = counts[:len(job["tokens"])] == [[len(part) for part in row] for row in job["tokens"]]
    return {"losses": losses, "seconds": [b - a for a, b in zip(ends, ends[1:])], "score_seconds": sum(scoring) or None,
            "peak": peak_memory(job["device"]), "same_tokens": same}


# ---------------------------------------------------------------------------------------------------------------------
# the ideas, one by one

IDEAS = {"reference": "reference scored once, not at every update",
         "padding": "no padding: texts end to end",
         "prefix": "the shared prefix runs once a pair",
         "vocabulary": "only response tokens meet the vocabulary",
         "last": "nor do others meet the last block's MLP",
         "fused": "fused log-softmax and gather",
         "memory": "freed memory is reused (malloc)"}


def rectangle(examples, rows) -> data.Batch:
    """The plain layout: two texts a pair, all padded on the right to the longest. `lengths` holds the one width."""
    texts = [examples[row].sides[side] for side in (0, 1) for row in rows]
    starts = [examples[row].start for _ in (0, 1) for row in rows]
    width = max(map(len, texts))
    ids = torch.zeros(len(texts), width, dtype=torch.int64)
    for i, text in enumerate(texts):
        ids[i, :len(text)] = torch.from_numpy(text)
    at = [torch.arange(start - 1, len(text) - 1) + i * width for i, (text, start) in enumerate(zip(texts, starts))]
    return data.Batch(ids.flatten(), torch.arange(width).repeat(len(texts)), [width], [-1], torch.cat(at), ids.flatten()[torch.cat(at) + 1],
                      torch.cat([torch.full_like(a, i) for i, a in enumerate(at)]), torch.tensor(rows))


def end_to_end(examples, rows, shared: bool, padded: bool) -> data.Batch:
    """A flat line of texts: a pair as one tree (`shared`) or as two texts. `padded`: every pair is filled up to the length of the longest."""
    if shared and not padded:
        return data.collate(examples, rows)
    if shared:
        pieces = [[data.collate(examples, [row])] for row in rows]
    else:
        alone = [data.Example(e.where, side, None, e.start, len(side)) for e in examples for side in e.sides]
        pieces = [[data.collate(alone, [2 * row]), data.collate(alone, [2 * row + 1])] for row in rows]
    length = max(sum(len(b.input_ids) for b in piece) for piece in pieces)
    ids, positions, lengths, parents, at, targets, response, offset = [], [], [], [], [], [], [], 0
    for i, piece in enumerate(pieces):
        for side, b in enumerate(piece):
            ids.append(b.input_ids), positions.append(b.position_ids), at.append(b.predict_at + offset), targets.append(b.targets)
            parents.extend(p + len(lengths) if p >= 0 else -1 for p in b.parents)
            lengths.extend(b.lengths)
            response.append(torch.where(b.response + side > 0, len(rows) + i, i))
            offset += len(b.input_ids)
        fill = length - sum(len(b.input_ids) for b in piece)
        if padded and fill:
            ids.append(torch.zeros(fill, dtype=torch.int64)), positions.append(torch.arange(fill)), parents.append(-1), lengths.append(fill)
            offset += fill
    order = torch.cat(response).argsort(stable=True)                            # chosen sides first, as everywhere
    return data.Batch(torch.cat(ids), torch.cat(positions), lengths, parents, torch.cat(at)[order], torch.cat(targets)[order],
                      torch.cat(response)[order], torch.tensor(rows))


def token_logps(model: Llama, batch: data.Batch, on: set) -> torch.Tensor:
    """(M,) log-probs of the response tokens with the ideas in `on`; with all of them this is `stepdpo.Policy`."""
    if len(batch.lengths) == 1:
        hidden = model.hidden_states(batch.input_ids.view(-1, batch.lengths[0])).flatten(0, 1)
    else:
        early = batch.predict_at if {"vocabulary", "last"} <= on else None
        hidden = model.hidden_states(batch.input_ids[None], batch.position_ids, Tree(batch.lengths, batch.parents), early)[0]
        if early is not None:
            batch = dataclasses.replace(batch, predict_at=torch.arange(len(early)))
    at, targets = batch.predict_at, batch.targets
    if "vocabulary" not in on:                                                  # every position, and one that predicts for both branches twice
        others = torch.ones(len(hidden), dtype=torch.bool).index_fill(0, at.cpu(), False).nonzero()[:, 0].to(at.device)
        at, targets = torch.cat((others, at)), torch.cat((torch.zeros_like(others), targets))
    hidden = hidden.index_select(0, at)
    if "fused" in on:
        logps = stepdpo.FusedLogProbs.apply(hidden, model.lm_head.weight, targets)
    else:
        logps = model.lm_head(hidden).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return logps[-len(batch.targets):]


def train_ideas(job: dict, on: list[str], repeats: int) -> dict:
    """Up to `repeats` updates on one micro-batch with the ideas in `on`, after one to warm up: seconds a pair, peak, log-probs before the first."""
    on, device = set(on), job["device"]
    if "memory" in on:
        keep_freed_memory()
    examples = examples_of(job)
    model = Llama.from_pretrained(job["model"], device=device)
    reference = model if "reference" in on else copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    settings = SimpleNamespace(beta=BETA, precision=job["precision"])
    model.gradient_checkpointing = job["gradient_checkpointing"]
    everything = on >= set(IDEAS)
    policy = stepdpo.Policy(model)

    def lay_out(rows):
        if "prefix" not in on and "padding" not in on:
            return rectangle(examples, rows).to(device)
        return end_to_end(examples, rows, "prefix" in on, "padding" not in on).to(device)

    def logps(net, batch):
        with stepdpo.autocast(settings, torch.device(device)):
            return policy(batch) if everything else token_logps(net, batch, on)

    def reference_of(batch):
        with torch.no_grad():
            return torch.stack(stepdpo.response_logps(logps(reference, batch), batch).chunk(2), dim=1)

    first, seconds, begin = None, [], time.perf_counter()
    while len(seconds) <= repeats and (len(seconds) < 2 or time.perf_counter() - begin < 4):
        rows = job["micros"][0]
        ref = reference_of(lay_out(rows)) if "reference" in on else None        # once a run: not part of an update
        synchronize(device)
        clock = time.perf_counter()
        batch = lay_out(rows)
        if ref is None:
            ref = reference_of(batch)
        losses, metrics = stepdpo.preference_objective(logps(model, batch), batch, ref, settings)
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        seconds.append((time.perf_counter() - clock) / len(rows))
        if first is None:
            first = torch.stack((metrics["chosen_logps"], metrics["rejected_logps"]), dim=1).tolist()
    return {"seconds": seconds[1:], "peak": peak_memory(device), "logps": first}


def examples_of(job: dict) -> list:
    tokenizer = data.Tokenizer.from_pretrained(job["model"])
    return data.encode_dataset(job["rows"], tokenizer, "stepdpo", job["prompt"], 1024)[0]


def prepare(args, folder: Path, source: Path | None, tokenizer: Path | None, prompt: str) -> dict:
    """The model, the rows and the order in which everybody takes them, as a JSON-able job. Runs in a child."""
    raw = dict(SHAPES[args.shape])
    model, rows = folder / "model", folder / "rows.jsonl"
    wanted = args.batch_size * args.steps
    if source is None:
        word_tokenizer(model, raw["vocab_size"])
        made = generated_rows(wanted, raw["vocab_size"], 0, *(((12, 48), (4, 12)) if args.shape == "quick" else ((120, 480), (20, 100))))
    else:
        model.mkdir(parents=True)
        for file in tokenizer.iterdir():
            if file.name.startswith(("tokenizer", "special_tokens", "chat_template")):
                (model / file.name).write_bytes(file.read_bytes())
        known = data.Tokenizer.from_pretrained(tokenizer)
        raw["vocab_size"] = len(known)
        kept = {e.where for e in data.encode_dataset(source, known, "stepdpo", prompt, 1024)[0]}
        made = [row for where, row in data.read_rows(source) if where in kept][:wanted]
    rows.write_text("".join(json.dumps(row) + "\n" for row in made))
    job = {"folder": str(folder), "model": str(model), "rows": str(rows), "prompt": prompt, "device": args.device, "precision": args.precision,
           "gradient_checkpointing": args.gradient_checkpointing, "batch_size": args.batch_size, "micro_batch_size": args.micro_batch_size,
           "vocab": raw["vocab_size"], **write_checkpoint(model, raw)}
    examples = examples_of(job)
    plan = data.epoch_plan([e.length for e in examples], batch_size=args.batch_size, micro_batch_size=args.micro_batch_size, micro_batch_tokens=8192,
                           seed=0, epoch=0)[:args.steps]
    steps = [[row for micro in step[0] for row in micro] for step in plan]
    order = [examples[row] for step in steps for row in step]
    config = Config.from_dict(raw)
    a_step = lambda f: [sum(f(examples[row]) for row in step) for step in steps]
    return job | {
        "steps": len(steps), "pairs": [len(step) for step in steps], "rows_used": len(order), "micros": [micro for step in plan for micro in step[0]],
        "pad_token": tokenizers.Tokenizer.from_file(str(model / "tokenizer.json")).id_to_token(0),
        "tokens": [[e.chosen[:e.start].tolist(), *(side[e.start:].tolist() for side in e.sides)] for e in order],
        "both_sides": a_step(lambda e: sum(map(len, e.sides))), "once": a_step(lambda e: e.length), "flops": a_step(lambda e: flops_of(e, config)),
        "mean_prefix": sum(e.start for e in order) / len(order), "mean_step": sum(len(side) - e.start for e in order for side in e.sides) / (2 * len(order))}


# ---------------------------------------------------------------------------------------------------------------------
# the parts

def per_pair(job: dict, seconds: list[float]) -> float:
    """Seconds a pair over all updates but the first."""
    return sum(seconds[1:]) / sum(job["pairs"][1:])


def peers(job: dict, rounds: int, trl: bool) -> dict:
    """Everybody in turn, `rounds` times: medians, and what the machine's matrix product did in the same minutes."""
    precision, checkpointing = job["precision"], job["gradient_checkpointing"]
    contestants = {}
    for name, settings in TRL_SETTINGS.items() if trl else ():
        if job["micro_batch_size"] > 1 or "micro_batch_size" not in settings:
            contestants[name] = (train_trl, precision, settings)
    contestants["this project"] = (train_ours, precision, checkpointing)
    if job["micro_batch_size"] > 1:
        contestants["this project, one pair at a time"] = (train_ours, precision, checkpointing, 1)
    if not checkpointing:
        contestants["this project, gradient checkpointing"] = (train_ours, precision, True)
    if precision == "fp32":
        contestants["this project, bf16"] = (train_ours, "bf16", checkpointing)
    runs, rates = {name: [] for name in contestants}, []
    for turn in range(rounds):
        rates.append(in_child(gemm_rates, job["device"], job["gemm_size"], job["gemm_seconds"]))
        for name, (work, *settings) in contestants.items():
            run = in_child(work, job, *settings)
            runs[name].append(run)
            said = run.get("failed") or f"{per_pair(job, run['seconds']):.3f} s a pair"
            print(f"  round {turn + 1}: {name}: {said}", file=sys.stderr, flush=True)
    rate = {name: median(r[name] for r in rates) for name in ("fp32", "bf16")}
    pairs, out = sum(job["pairs"][1:]), {}
    for name, found in runs.items():
        if errors := [run["failed"] for run in found if "failed" in run]:
            out[name] = {"failed": errors[0]}
            continue
        times = sorted(per_pair(job, run["seconds"]) for run in found)
        scores = [run["score_seconds"] / job["rows_used"] for run in found if run["score_seconds"]]
        flops = sum(job["flops"][1:]) / pairs / median(times)
        out[name] = {
            "seconds_per_pair": median(times), "fastest": times[0], "slowest": times[-1], "score_seconds_per_pair": median(scores) if scores else None,
            "peak_bytes": max(run["peak"] for run in found), "tokens_per_second": sum(job["both_sides"][1:]) / pairs / median(times),
            "flops_per_second": flops, "gemm_share": flops / rate["bf16" if "bf16" in name else precision], "losses": found[0]["losses"],
            "same_tokens": all(run.get("same_tokens", True) for run in found)}
    return {"gemm": rate, "contestants": out, "checks": check(out)}


def check(contestants: dict) -> dict:
    """Did all do the same work? Tokens, log 2 to begin with, and the losses of all updates (AdamW's first steps magnify rounding to about 1e-4)."""
    ran = {name: c for name, c in contestants.items() if "failed" not in c}
    own = ran.get("this project", {"losses": []})["losses"]
    return {"all_ran": len(ran) == len(contestants), "same_tokens": all(c["same_tokens"] for c in ran.values()),
            "log2_at_step_0": all(abs(c["losses"][0] - math.log(2)) < (5e-2 if "bf16" in name else 1e-3) for name, c in ran.items()),
            "same_losses": all(abs(a - b) < (5e-2 if "bf16" in name else 2e-3) for name, c in ran.items() for a, b in zip(own, c["losses"]))}


def peers_table(job: dict, report: dict, title: str, peak_tflops: float | None) -> str:
    ours, rows = report["contestants"]["this project"], []
    for name, c in report["contestants"].items():
        if "failed" in c:
            rows.append([f"{name}: {c['failed'][:80]}"] + [None] * 7)
            continue
        slower, memory = (c[k] / ours[k] if "failed" not in ours else None for k in ("seconds_per_pair", "peak_bytes"))
        rows.append([name, c["seconds_per_pair"], slower, c["peak_bytes"] / 1e9, memory, c["tokens_per_second"], c["score_seconds_per_pair"] or "in updates",
                     c["flops_per_second"] / (peak_tflops * 1e12) if peak_tflops else c["gemm_share"]])
    columns = {"": "", "s/pair": ".3f", "beside ours": ".2f", "peak GB": ".2f", "beside ours ": ".2f", "tokens/s": ",.0f", "scoring s/pair": ".3f",
               "MFU" if peak_tflops else "of GEMM": ".0%"}
    gemm = report["gemm"]
    return table(title, columns, rows, [
        f"{job['rows_used']} pairs, prefix {job['mean_prefix']:.0f} and step {job['mean_step']:.0f} tokens on average, vocabulary {job['vocab']:,}, "
        f"{job['parameters'] / 1e6:,.1f} M parameters, {job['precision']};",
        f"{job['batch_size']} pairs an update, {job['micro_batch_size']} in one pass unless said otherwise. tokens/s: both whole sides, computed or shared.",
        f"Model FLOPs {sum(job['flops']) / sum(job['pairs']) / 1e9:,.1f} G a pair; GEMM {gemm['fp32'] / 1e9:,.0f} GFLOP/s in fp32, "
        f"{gemm['bf16'] / 1e9:,.0f} in bf16.",
        "Checked: " + ", ".join(f"{fact.replace('_', ' ')} {yes(true)}" for fact, true in report["checks"].items()) + "."])


def ideas(job: dict, repeats: int) -> dict:
    """From nothing to everything, cumulatively; and from everything, each idea switched off alone."""
    names, runs = list(IDEAS), {}
    sets = [names[:i] for i in range(len(names) + 1)] + [[other for other in names if other != name] for name in names]
    for on in sets:
        if tuple(on) not in runs:
            runs[tuple(on)] = in_child(train_ideas, job, on, repeats)
            print(f"  {' + '.join(on) or 'plain'}: {min(runs[tuple(on)].get('seconds', [math.nan])):.3f} s a pair", file=sys.stderr, flush=True)
            if "failed" in runs[tuple(on)]:
                raise SystemExit(f"error: ideas {on}: {runs[tuple(on)]['failed']}")
    cost = lambda on: {"seconds_per_pair": median(runs[tuple(on)]["seconds"]), "peak_bytes": runs[tuple(on)]["peak"]}
    everything = runs[tuple(names)]["logps"]
    worst = max(abs(a - b) / abs(b) for run in runs.values() for row, other in zip(run["logps"], everything) for a, b in zip(row, other))
    return {"plain": cost([]), "cumulative": {name: cost(names[:i + 1]) for i, name in enumerate(names)},
            "without": {name: cost([other for other in names if other != name]) for name in names},
            "checks": {"same_logps": worst < (1e-4 if job["precision"] == "fp32" else 2e-2)}, "worst_relative_difference": worst}


def ideas_table(report: dict) -> str:
    before, full = report["plain"], list(report["cumulative"].values())[-1]
    rows = [["plain", before["seconds_per_pair"], None, before["peak_bytes"] / 1e9, None, None]]
    for name, c in report["cumulative"].items():
        off = report["without"][name]
        rows.append([f"+ {IDEAS[name]}", c["seconds_per_pair"], c["seconds_per_pair"] - before["seconds_per_pair"], c["peak_bytes"] / 1e9,
                     off["seconds_per_pair"] - full["seconds_per_pair"], off["peak_bytes"] / 1e9])
        before = c
    columns = {"": "", "s/pair": ".3f", "change": "+.3f", "peak GB": ".2f", "without it alone": "+.3f", "peak GB ": ".2f"}
    return table("One idea at a time", columns, rows, [
        "plain: two padded rows a pair, all tokens through lm_head, log_softmax + gather, the reference recomputed. The changes add up to this project.",
        "without it alone: everything else on, how much slower. The cached reference's one scoring pass (once a run) is not in these times.",
        f"Checked: all give the same log-probs, to {report['worst_relative_difference']:.0e} relative: {yes(report['checks']['same_logps'])}."])


def prefix(job: dict, lengths: list[tuple[int, int]], repeats: int) -> dict:
    """The whole update with and without the shared prefix, for pairs of one prefix length P and one step length S."""
    out, config = [], Config.from_dict(json.loads((Path(job["model"]) / "config.json").read_text()))
    for P, S in lengths:
        rows = Path(job["folder"]) / f"rows-{P}.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in generated_rows(2, job["vocab"], P, (P, P), (S, S))))
        one = job | {"rows": str(rows), "prompt": "raw", "micros": [[0, 1]]}
        runs = [in_child(train_ideas, one, [name for name in IDEAS if name != "prefix"], repeats), in_child(train_ideas, one, list(IDEAS), repeats)]
        if errors := [run["failed"] for run in runs if "failed" in run]:
            raise SystemExit(f"error: prefix {P}: {errors[0]}")
        twice, once = (median(run["seconds"]) for run in runs)
        example = data.Example("", torch.zeros(P + S).int().numpy(), torch.zeros(P + S).int().numpy(), P, P)
        alone = data.Example("", example.chosen, None, P, P + S)
        work = flops_of(example, config) / (2 * flops_of(alone, config))
        out.append({"P": P, "S": S, "tokens": (P + 2 * S) / (2 * P + 2 * S), "flops": work, "time": once / twice, "shared": once, "apart": twice})
    return {"lengths": out}


def prefix_table(report: dict) -> str:
    columns = {"P": "", "S": "", "(P + 2S) / (2P + 2S)": ".2f", "model FLOPs": ".2f", "measured time": ".2f", "s/pair shared": ".3f", "apart": ".3f"}
    rows = [[str(r["P"]), *(r[k] for k in ("S", "tokens", "flops", "time", "shared", "apart"))] for r in report["lengths"]]
    return table("The shared prefix: this much of the work and time of two separate rows", columns, rows, [
        "The time is that of a whole update; tokens that meet the vocabulary, and AdamW, do not shrink with the prefix."])


def profile(job: dict) -> dict:
    """Where the time of our own updates goes, by torch.profiler."""
    from torch.profiler import ProfilerActivity
    keep_freed_memory()
    examples = examples_of(job)
    device = torch.device(job["device"])
    policy = stepdpo.Policy(Llama.from_pretrained(job["model"], device=device))
    policy.model.gradient_checkpointing = job["gradient_checkpointing"]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, weight_decay=0.0, fused=True)
    settings = SimpleNamespace(beta=BETA, precision=job["precision"], micro_batch_size=job["micro_batch_size"], micro_batch_tokens=8192)
    ref = stepdpo.score(policy, examples, settings, 0, 1, device, "reference")

    def update(rows):
        losses, _ = stepdpo.judge(policy, stepdpo.preference_objective, data.collate(examples, rows).to(device), ref, settings, device)
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    update(job["micros"][0])
    with torch.profiler.profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")) as trace:
        for rows in job["micros"]:
            update(rows)
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(trace.key_averages(), key=lambda e: -getattr(e, key))
    total = sum(getattr(e, key) for e in events)
    top = [{"name": e.key, "calls": e.count, "share": getattr(e, key) / total} for e in events[:12]]
    return {"seconds_per_pair": total / 1e6 / sum(job["pairs"]), "operations": top}


def profile_table(report: dict) -> str:
    return table(f"Where our own updates spend {report['seconds_per_pair']:.3f} s a pair (own time of an operation, without what it calls)",
                 {"operation": "", "calls": ",", "share": ".1%"}, [[o["name"], o["calls"], o["share"]] for o in report["operations"]])


# ---------------------------------------------------------------------------------------------------------------------
# command line

PARTS = {"peers": "this project beside TRL on generated rows", "real": "the same on real text (--data and --tokenizer, or ../shared/assets)",
         "ideas": "one idea at a time", "prefix": "the shared prefix against its formula", "profile": "our own ten most expensive operations"}


def main(argv=None) -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="Parts: " + "; ".join(f"{k}: {v}" for k, v in PARTS.items()) + ".")
    p.add_argument("--part", action="append", choices=PARTS, help="only this part; may be repeated (default: peers, ideas, prefix)")
    p.add_argument("--shape", choices=("toy", "0.5B", "7B"), default="toy",
                   help="toy: 8 layers, 512 wide, vocabulary 32,000; 0.5B, 7B: those of Qwen2 (random weights)")
    p.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the arithmetic; weights are fp32 (default fp32)")
    p.add_argument("--gradient_checkpointing", action="store_true", help="for all contestants")
    p.add_argument("--batch_size", type=int, default=4, help="pairs an update (default 4)")
    p.add_argument("--micro_batch_size", type=int, default=4, help="pairs in one pass, where a contestant does not say otherwise (default 4)")
    p.add_argument("--steps", type=int, default=2, help="updates, of which the first warms up and is not counted (default 2)")
    p.add_argument("--rounds", type=int, default=2, help="how often each contestant runs (default 2)")
    p.add_argument("--no_trl", action="store_true", help="leave TRL out, where it is installed")
    p.add_argument("--data", type=Path, metavar="FILE", help="real rows, for --part real (default: ../shared/assets, where it is)")
    p.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="a real tokenizer for them")
    p.add_argument("--prompt", default="alpaca", choices=data.PROMPT_STYLES, help="how their questions become prompts (default alpaca)")
    p.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    p.add_argument("--peak_tflops", type=float, help="of the device, from its data sheet: MFU is printed instead of the share of the GEMM rate")
    p.add_argument("--quick", action="store_true", help=QUICK)
    p.add_argument("--json", metavar="FILE", help="write all figures there")
    args = p.parse_args(argv)
    if args.steps < 2 or args.batch_size % args.micro_batch_size:
        p.error("--steps must be 2 or more, and --batch_size a multiple of --micro_batch_size")
    if args.quick:
        args.shape, args.rounds, args.no_trl = "quick", 1, True
    parts = args.part or ["peers", "ideas", "prefix"]
    trl = not args.no_trl and version("trl") is not None
    report = {"machine": machine(args.device, ("trl", "transformers", "accelerate") if trl else ()),
              "settings": {name: str(value) for name, value in vars(args).items()}}
    text = [machine_line(report["machine"]), ""]
    with tempfile.TemporaryDirectory() as folder:
        jobs = {}
        for name in {"real" if part == "real" else "generated" for part in parts}:
            source, tokenizer, prompt = None, None, "raw"
            if name == "real":
                source = args.data or ASSETS / "prefs" / "qwen25math_derived_step_pairs.jsonl"
                tokenizer, prompt = args.tokenizer or ASSETS / "tokenizers" / "tinyllama", args.prompt
                if not (source.is_file() and tokenizer.is_dir()):
                    p.error(f"--part real: {source if tokenizer.is_dir() else tokenizer} is not there; give --data FILE and --tokenizer FOLDER")
            jobs[name] = in_child(prepare, args, Path(folder) / name, source, tokenizer, prompt)
            if "failed" in jobs[name]:
                p.error(jobs[name]["failed"])
            jobs[name] |= {"gemm_size": 256 if args.quick else 2048 if args.device == "cpu" else 8192, "gemm_seconds": 0.1 if args.quick else 1.0}
        kinds = {"peers": "Training beside TRL, generated rows", "real": "Training beside TRL, real text"}
        for part in parts:
            job = jobs["real" if part == "real" else "generated"]
            if part in kinds:
                shown = {k: v for k, v in job.items() if k not in ("tokens", "micros", "folder", "model", "rows")}
                report[part] = {"job": shown, **peers(job, args.rounds, trl)}
                title = kinds[part] if trl else f"{kinds[part]}: TRL is not installed, or left out"
                text.append(peers_table(job, report[part], title, args.peak_tflops))
            elif part == "ideas":
                report[part] = ideas(job, 1 if args.quick else 2)
                text.append(ideas_table(report[part]))
            elif part == "prefix":
                lengths = [(24, 8)] if args.quick else [(60, 60), (240, 60), (960, 60)]
                report[part] = prefix(job, lengths, 1 if args.quick else 2)
                text.append(prefix_table(report[part]))
            else:
                report[part] = in_child(profile, job)
                text.append(profile_table(report[part]) if "failed" not in report[part] else report[part]["failed"])
    finish(report, "\n".join(text), args.json)
    return 0 if all(fact for part in parts for fact in report[part].get("checks", {}).values()) else 1


if __name__ == "__main__":
    sys.exit(main())
