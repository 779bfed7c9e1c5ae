"""Training speed and memory: Step-DPO by this project and by TRL's DPOTrainer, on the same weights, rows,
precision and updates.

    python benchmarks/train.py                  all but `real` and `profile`, on a small model like Qwen2
    python benchmarks/train.py --part peers     beside TRL's DPOTrainer, at its defaults and best settings
    python benchmarks/train.py --part ideas     from a plain implementation to this one, one idea at a time
    python benchmarks/train.py --part prefix    sharing the prefix beside its formula, (P + 2S) / (2P + 2S)
    python benchmarks/train.py --part tree      several pairs of a problem: apart, pairs shared, one tree
    python benchmarks/train.py --device cuda --shape 0.5B --precision bf16 --batch_size 16 --peak_tflops 989

Every contestant runs in a process of its own, in turn, round after round, so that a drift of the machine's
speed meets all alike; its figure is the median of the rounds. Beside TRL this project runs as its users run
it, by `stepdpo.main`, and is timed by its own metrics.jsonl; TRL by `DPOTrainer.train`, from the end of an
update to the end of the next. All take the same rows in the same order, AdamW (fused) with the same linear
schedule, gradients clipped at 1. The first update warms up and is not counted. That all did the same work is
checked: token counts row by row, and the loss of every update.

Model FLOPs of an update, forward and backward (the backward costs twice the forward, hence 3 x 2 = 6 a weight
and token):

    6 N body - 6 (N - P) last + 6 P C V + 12 layers heads head_size (how often a token attends to a token)

N tokens in the tree (of a pair its prefix and two steps), of which P predict a response token; body = the
weights of the blocks' linear layers, last = the weights of the last block that only those P need (its output
projection and MLP), C hidden size, V vocabulary. Recomputation is not counted. These operations cannot be
avoided, so they are the numerator for every contestant: the share of the GEMM rate says how near a whole
update, optimizer included, comes to the time that the machine's matrix product alone would need."""
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

from common import (ASSETS, SHAPES, add_options, clocked, finish, gemm_rates, in_child, machine, machine_line,
                    median, must, peak_memory, progress, synchronize, table, version, write_checkpoint, yes)

import tokenizers
import torch

import data
import stepdpo
from model import Config, Llama, Tree, keep_freed_memory

BETA, LR = 0.4, 1e-5

# ----------------------------------------------------------------------------------------------------------
# what is trained on

def word_tokenizer(folder: Path, vocab: int):
    """tokenizer.json of `vocab` words w0, w1, ... between spaces: a text has as many tokens as words."""
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, vocab)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    tokenizer.add_special_tokens(["<pad>", "<eos>"])
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<eos>", "pad_token": "<pad>", "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


class Words:
    """Random words, a seeded stream of them."""

    def __init__(self, vocab: int, seed: int = 0):
        self.rng, self.vocab = random.Random(seed), vocab

    def __call__(self, least: int, most: int) -> str:
        count = self.rng.randint(least, most)
        return "".join(f" w{self.rng.randrange(2, self.vocab)}" for _ in range(count))


def pair_rows(count: int, vocab: int, prefix: tuple[int, int], step: tuple[int, int]) -> list[dict]:
    """Rows with the columns of Math-Step-DPO-10K, no two of one problem: a prefix, half of it question and
    half steps, and two steps, of lengths in the given ranges."""
    words, rows = Words(vocab), []
    for _ in range(count):
        length = words.rng.randint(*prefix)
        question, steps = (words(part, part) for part in (length // 2, length - length // 2))
        rows.append({"prompt": question, "initial_reason_steps": steps,
                     "chosen": words(*step), "rejected": words(*step)})
    return rows


def grouped_rows(problems: int, vocab: int, question: tuple[int, int], step: tuple[int, int]) -> list[dict]:
    """Eight rows a problem, as Step-DPO's pipeline makes them: wrong attempts that leave a right solution of
    four steps, one at each; and for each wrong step two right ones, the solution's own and another."""
    words, rows = Words(vocab), []
    for _ in range(problems):
        asked, solution = words(*question), [words(*step) for _ in range(4)]
        for k, right in enumerate(solution):
            wrong = words(*step)
            rows += [{"prompt": asked, "initial_reason_steps": "".join(solution[:k]), "chosen": chosen,
                      "rejected": wrong} for chosen in (right, words(*step))]
    return rows


def write_jsonl(path: Path, rows: list[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def examples_of(job: dict) -> list[data.Example]:
    tokenizer = data.Tokenizer.from_pretrained(job["model"])
    return data.encode_dataset(job["rows"], tokenizer, "stepdpo", job["prompt"], 1024)[0]


def flops_of(batch: data.Batch, config: Config) -> int:
    """Model FLOPs of a micro-batch's share of an update; the formula is at the top of this file."""
    width = config.num_attention_heads * config.head_dim
    keys_and_values = 2 * config.num_key_value_heads * config.head_dim
    last = config.hidden_size * (width + 3 * config.intermediate_size)
    body = config.num_hidden_layers * (last + config.hidden_size * (width + keys_and_values))
    seen = 0
    for own, ancestors in zip(batch.lengths, Tree(batch.lengths, batch.parents).ancestors):
        seen += own * sum(batch.lengths[a] for a in ancestors) + own * (own + 1) // 2
    tokens, predicting = len(batch.input_ids), len(batch.predict_at)
    return (6 * tokens * body - 6 * (tokens - predicting) * last
            + 6 * predicting * config.hidden_size * config.vocab_size
            + 12 * config.num_hidden_layers * width * seen)


def prepare(args, folder: Path, batch_size: int, micro_batch_size: int, steps: int, *, rows=None,
            source: Path | None = None, tokenizer: Path | None = None) -> dict:
    """Weights, rows and the order in which everybody takes them, as a JSON-able job: generated rows, or those
    of a file `source` as `tokenizer` reads them. Runs in a child."""
    raw, model = dict(SHAPES[args.shape]), folder / "model"
    if source is None:
        word_tokenizer(model, raw["vocab_size"])
    else:
        model.mkdir(parents=True)
        for file in tokenizer.iterdir():
            if file.name.startswith(("tokenizer", "special_tokens", "chat_template")):
                (model / file.name).write_bytes(file.read_bytes())
        known = data.Tokenizer.from_pretrained(tokenizer)
        raw["vocab_size"] = len(known)
        examples = data.encode_dataset(source, known, "stepdpo", args.prompt, 1024)[0]
        rows = [example.row for example in examples][:batch_size * steps]
    write_jsonl(folder / "rows.jsonl", rows)
    job = {"folder": str(folder), "model": str(model), "rows": str(folder / "rows.jsonl"),
           "prompt": "raw" if source is None else args.prompt, "device": args.device,
           "precision": args.precision, "gradient_checkpointing": args.gradient_checkpointing,
           "batch_size": batch_size, "micro_batch_size": micro_batch_size, "vocab": raw["vocab_size"],
           **write_checkpoint(model, raw)}
    examples, config = examples_of(job), Config.from_dict(raw)
    plan = data.epoch_plan(examples, batch_size=batch_size, micro_batch_size=micro_batch_size,
                           micro_batch_tokens=8192)[:steps]
    passes = [step[0] for step in plan]                                 # [step][micro-batch][row]
    order = [examples[row] for step in passes for micro_batch in step for row in micro_batch]
    pad = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json")).id_to_token(0)
    in_steps = [sum(len(side) - example.start for side in example.sides) for example in order]
    return job | {
        "steps": len(plan), "pairs": [sum(map(len, step)) for step in passes], "rows_used": len(order),
        "micros": [micro_batch for step in passes for micro_batch in step], "pad_token": pad,
        "tokens": [[e.chosen[:e.start].tolist(), *(side[e.start:].tolist() for side in e.sides)]
                   for e in order],
        "both_sides": [sum(len(side) for rows in step for row in rows for side in examples[row].sides)
                       for step in passes],
        "flops": [sum(flops_of(data.collate(examples, rows), config) for rows in step) for step in passes],
        "mean_prefix": sum(example.start for example in order) / len(order),
        "mean_step": sum(in_steps) / (2 * len(order))}


# ----------------------------------------------------------------------------------------------------------
# the contestants; each function runs in a child

def train_ours(job: dict, precision: str, checkpointing: bool, micro: int | None = None) -> dict:
    """stepdpo.py as its command line runs it; the reference pass is timed by a wrapper around
    `stepdpo.score_tokens`."""
    scoring, score_tokens = [], stepdpo.score_tokens

    def timed(*args, **kwargs):
        result, seconds = clocked(job["device"], lambda: score_tokens(*args, **kwargs))
        scoring.append(seconds)
        return result

    stepdpo.score_tokens = timed
    out = Path(job["folder"]) / f"ours-{os.getpid()}"
    options = {"model": job["model"], "data": job["rows"], "out": out, "prompt": job["prompt"], "epochs": 1,
               "max_steps": job["steps"], "batch_size": job["batch_size"],
               "micro_batch_size": micro or job["micro_batch_size"], "lr": LR, "schedule": "linear",
               "warmup": 0, "beta": BETA, "precision": precision, "device": job["device"],
               "checkpoint_every": 0}
    command = ["stepdpo", *(f"--{name}={value}" for name, value in options.items())]
    status = stepdpo.main(command + ["--gradient_checkpointing"] * checkpointing)
    if status:
        raise RuntimeError(f"stepdpo.py ended with status {status}")
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {"losses": [step["loss"] for step in steps], "seconds": [step["seconds"] for step in steps],
            "score_seconds": sum(scoring), "peak": peak_memory(job["device"])}


# What makes TRL fastest was looked for on 2 cores. One pair at a time, accumulated to the same batch, wins by
# far on a CPU: it pads little. No gain: torch_compile (73 s to compile, then 10 % slower). No longer there:
# padding_free (TRL 1.16 warns and goes on without it) and use_logits_to_keep (its fused head took its place:
# on CUDA it computes response positions only, on a CPU all positions).
PRECOMPUTED = dict(precompute_ref_log_probs=True, gradient_checkpointing=False)
TRL_SETTINGS = {
    "TRL, its defaults": dict(),
    "TRL, reference precomputed, no checkpointing": PRECOMPUTED,
    "TRL, the same, one pair at a time": dict(PRECOMPUTED, micro_batch_size=1),
}


def train_trl(job: dict, precision: str, settings: dict) -> dict:
    """TRL's DPOTrainer. It is handed token ids instead of text (its own tokenisation adds an EOS to every
    response, which a step must not have)."""
    import datasets
    import transformers
    import trl
    datasets.disable_progress_bars()
    settings = dict(settings)
    micro = settings.pop("micro_batch_size", job["micro_batch_size"])
    if job["gradient_checkpointing"]:
        settings.pop("gradient_checkpointing", None)                    # TRL's default is on
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(Path(job["model"]) / "tokenizer.json"), pad_token=job["pad_token"],
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
        def _prepare_dataset(self, dataset, *_, **__):                  # the rows are tokens already
            return dataset

        def compute_ref_log_probs(self, *args, **kwargs):
            ours = super().compute_ref_log_probs
            logps, seconds = clocked(job["device"], lambda: ours(*args, **kwargs))
            scoring.append(seconds)
            return logps

    config = trl.DPOConfig(
        output_dir=str(Path(job["folder"]) / f"trl-{os.getpid()}"), per_device_train_batch_size=micro,
        gradient_accumulation_steps=job["batch_size"] // micro, max_steps=job["steps"], learning_rate=LR,
        lr_scheduler_type="linear", warmup_steps=0, beta=BETA, max_grad_norm=1.0, weight_decay=0.0,
        bf16=precision == "bf16", use_cpu=job["device"] == "cpu", seed=0, logging_steps=1, report_to="none",
        train_sampling_strategy="sequential", save_strategy="no", disable_tqdm=True, **settings)
    rows = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in job["tokens"]]
    trainer = Trainer(model=model, args=config, train_dataset=datasets.Dataset.from_list(rows),
                      processing_class=tokenizer, callbacks=[Clock()])
    collate = trainer.data_collator

    def counting(features):
        batch = collate(features)
        whole, answer = (batch[mask].sum(1).tolist() for mask in ("attention_mask", "completion_mask"))
        half = len(whole) // 2
        counts.extend([w - a, a, b] for w, a, b in zip(whole[:half], answer[:half], answer[half:]))
        return batch

    trainer.data_collator = counting
    trainer.train()
    same = counts[:len(job["tokens"])] == [[len(part) for part in row] for row in job["tokens"]]
    return {"losses": losses, "seconds": [b - a for a, b in zip(ends, ends[1:])],
            "score_seconds": sum(scoring) or None, "peak": peak_memory(job["device"]), "same_tokens": same}


# ----------------------------------------------------------------------------------------------------------
# the ideas, one by one

IDEAS = {"reference": "reference scored once, not at every update",
         "padding": "no padding: texts end to end",
         "prefix": "the shared prefix runs once a pair",
         "vocabulary": "only response tokens meet the vocabulary",
         "last": "nor do others meet the last block's MLP",
         "fused": "fused log-softmax and gather",
         "memory": "freed memory is reused (malloc)"}


def lay_out(examples: list[data.Example], rows: list[int], share: str, padded: bool = False) -> data.Batch:
    """Rows as one flat row of tokens that shares what begins alike in the whole micro-batch ("tree": the
    project's own layout), in the two sides of a pair ("pair"), or nowhere ("none"). padded: each pair, or
    each text, is filled up to the length of the longest."""
    if share == "tree":
        return data.collate(examples, rows)
    parts = [examples[row] for row in rows]
    if share == "none":
        parts = [dataclasses.replace(example, sides=[side], steps=[steps]) for example in parts
                 for side, steps in zip(example.sides, example.steps)]
    batches = [data.collate([part], [0]) for part in parts]
    if padded:
        width = max(len(batch.input_ids) for batch in batches)
        batches = [fill(batch, width - len(batch.input_ids)) for batch in batches]
    return end_to_end(batches, [examples[row] for row in rows], rows)


def fill(batch: data.Batch, count: int) -> data.Batch:
    """The batch with `count` tokens of padding behind it."""
    if count == 0:
        return batch
    padding = torch.arange(count)
    return dataclasses.replace(batch, input_ids=torch.cat((batch.input_ids, padding * 0)),
                               position_ids=torch.cat((batch.position_ids, padding)),
                               lengths=batch.lengths + [count], parents=batch.parents + [-1])


def end_to_end(batches: list[data.Batch], examples: list[data.Example], rows: list[int]) -> data.Batch:
    """Batches as one, nothing shared between them."""
    def joined(name: str, step=lambda batch: 0):
        """The values of a field, each batch's shifted by what the batches before it add up to."""
        parts, offset = [], 0
        for batch in batches:
            parts.append(getattr(batch, name) + offset)
            offset += step(batch)
        return torch.cat(parts)

    lengths, parents = [], []
    for batch in batches:
        parents += [parent if parent < 0 else parent + len(lengths) for parent in batch.parents]
        lengths += batch.lengths
    return data.Batch(
        joined("input_ids"), joined("position_ids"), lengths, parents,
        joined("predict_at", lambda batch: len(batch.input_ids)),
        joined("source", lambda batch: len(batch.predict_at)), joined("targets"),
        joined("response", lambda batch: batch.responses), joined("step"), torch.tensor(rows), examples,
        sum(batch.responses for batch in batches))


def token_logps(model: Llama, batch: data.Batch, on: set) -> torch.Tensor:
    """(M,) log-probs of the response tokens with the ideas in `on`; with all of them this is
    `stepdpo.Policy`."""
    source = batch.source
    if on.isdisjoint(("padding", "prefix")):                            # a rectangle, one text a row
        hidden = model.hidden_states(batch.input_ids.view(batch.responses, -1)).flatten(0, 1)
    else:
        early = batch.predict_at if {"vocabulary", "last"} <= on else None
        tree = Tree(batch.lengths, batch.parents)
        hidden = model.hidden_states(batch.input_ids[None], batch.position_ids, tree, early)[0]
    if "vocabulary" not in on:                                          # every position
        source = batch.predict_at[source]
    elif len(hidden) > len(batch.predict_at):
        hidden = hidden.index_select(0, batch.predict_at)
    if "fused" in on:
        return stepdpo.FusedLogProbs.apply(hidden, model.lm_head.weight, batch.targets, source)
    return model.lm_head(hidden).float().log_softmax(-1)[source, batch.targets]


def train_ideas(job: dict, on: list[str], repeats: int, share: str = "pair") -> dict:
    """Up to `repeats` updates on all micro-batches of the job with the ideas in `on`, after one on the first
    to warm up: seconds a pair, peak, losses; tokens, and log-probs before the first update."""
    on, device = set(on), torch.device(job["device"])
    if "memory" in on:
        keep_freed_memory()
    if "prefix" not in on:
        share = "none"
    examples = examples_of(job)
    model = Llama.from_pretrained(job["model"], device=device)
    model.gradient_checkpointing = job["gradient_checkpointing"]
    reference = model if "reference" in on else copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    args = SimpleNamespace(beta=BETA)

    def batch_of(rows):
        return lay_out(examples, rows, share, padded="padding" not in on).to(device)

    def logps(net, batch):
        with stepdpo.autocast(job["precision"], device):
            return token_logps(net, batch, on)

    def update(passes: list, scored: list) -> float:
        mean = 0.0
        for rows, ref in zip(passes, scored):
            batch = batch_of(rows)
            if "reference" not in on:
                with torch.no_grad():
                    ref = logps(reference, batch)
            losses, _ = stepdpo.preference_objective(logps(model, batch), ref, batch, args)
            loss = losses.sum() / sum(map(len, passes))
            loss.backward()
            mean += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return mean

    passes, scored, responses, tokens, predicting = job["micros"], [], {}, 0, 0
    with torch.no_grad():                                               # once a run: not part of an update
        for rows in passes:
            batch = batch_of(rows)
            scored.append(logps(model, batch))
            sums = stepdpo.response_logps(scored[-1], batch).view(-1, 2).tolist()
            responses.update(zip(rows, sums))
            tokens += len(batch.input_ids)
            predicting += len(batch.predict_at)
    update(passes[:1], scored)
    losses, seconds = [], []
    while len(seconds) < repeats and sum(seconds) < 4:
        loss, took = clocked(job["device"], lambda: update(passes, scored))
        losses.append(loss)
        seconds.append(took)
    pairs = sum(map(len, passes))
    return {"seconds": [took / pairs for took in seconds], "peak": peak_memory(job["device"]),
            "losses": losses, "logps": [responses[row] for row in sorted(responses)],
            "tokens": tokens, "predicting": predicting}


# ----------------------------------------------------------------------------------------------------------
# the parts

def per_pair(job: dict, seconds: list[float]) -> float:
    """Seconds a pair over all updates but the first."""
    return sum(seconds[1:]) / sum(job["pairs"][1:])


def peers(job: dict, rounds: int, trl: bool) -> dict:
    """Everybody in turn, `rounds` times: medians, and what the machine's matrix product did in the same
    minutes."""
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
            progress(f"round {turn + 1}: {name}: {said}")
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
            "seconds_per_pair": median(times), "fastest": times[0], "slowest": times[-1],
            "score_seconds_per_pair": median(scores) if scores else None,
            "peak_bytes": max(run["peak"] for run in found),
            "tokens_per_second": sum(job["both_sides"][1:]) / pairs / median(times),
            "flops_per_second": flops, "gemm_share": flops / rate["bf16" if "bf16" in name else precision],
            "losses": found[0]["losses"],
            "same_tokens": all(run.get("same_tokens", True) for run in found)}
    return {"gemm": rate, "contestants": out, "checks": check(out)}


def check(contestants: dict) -> dict:
    """Did all do the same work? Tokens, log 2 to begin with, and the losses of all updates (AdamW's first
    steps magnify rounding to about 1e-4)."""
    ran = {name: c for name, c in contestants.items() if "failed" not in c}
    own = ran.get("this project", {"losses": []})["losses"]
    near = {name: 5e-2 if "bf16" in name else 2e-3 for name in ran}
    return {"all_ran": len(ran) == len(contestants),
            "same_tokens": all(c["same_tokens"] for c in ran.values()),
            "log2_at_step_0": all(abs(c["losses"][0] - math.log(2)) < near[name] for name, c in ran.items()),
            "same_losses": all(abs(a - b) < near[name] for name, c in ran.items()
                               for a, b in zip(own, c["losses"]))}


def lengths_of(job: dict) -> str:
    return (f"prefix {job['mean_prefix']:.0f} and step {job['mean_step']:.0f} tokens on average, "
            f"vocabulary {job['vocab']:,}")


def peers_table(job: dict, report: dict, title: str, peak_tflops: float | None) -> str:
    ours, rows = report["contestants"]["this project"], []
    for name, c in report["contestants"].items():
        if "failed" in c:
            rows.append([f"{name}: {c['failed'][:80]}"] + [None] * 7)
            continue
        slower, memory = (c[key] / ours[key] if "failed" not in ours else None
                          for key in ("seconds_per_pair", "peak_bytes"))
        rows.append([name, c["seconds_per_pair"], slower, c["peak_bytes"] / 1e9, memory,
                     c["tokens_per_second"], c["score_seconds_per_pair"] or "in updates",
                     c["flops_per_second"] / (peak_tflops * 1e12) if peak_tflops else c["gemm_share"]])
    columns = {"": "", "s/pair": ".3f", "beside ours": ".2f", "peak GB": ".2f", "beside ours ": ".2f",
               "tokens/s": ",.0f", "scoring s/pair": ".3f", "MFU" if peak_tflops else "of GEMM": ".0%"}
    gemm = report["gemm"]
    checks = ", ".join(f"{fact.replace('_', ' ')} {yes(true)}" for fact, true in report["checks"].items())
    return table(title, columns, rows, [
        f"{job['rows_used']} pairs, {lengths_of(job)}, {job['parameters'] / 1e6:,.1f} M parameters, "
        f"{job['precision']};",
        f"{job['batch_size']} pairs an update, {job['micro_batch_size']} in one pass unless said otherwise. "
        "tokens/s: both whole sides, computed or shared.",
        f"Model FLOPs {sum(job['flops']) / sum(job['pairs']) / 1e9:,.1f} G a pair; GEMM "
        f"{gemm['fp32'] / 1e9:,.0f} GFLOP/s in fp32, {gemm['bf16'] / 1e9:,.0f} in bf16.",
        f"Checked: {checks}."])


def largest_difference(runs: list[dict]) -> float:
    """Of the log-probs of all responses, relative to those of the last run."""
    worst = 0.0
    for run in runs:
        for row, wanted in zip(run["logps"], runs[-1]["logps"], strict=True):
            worst = max(worst, *(abs(a - b) / abs(b) for a, b in zip(row, wanted)))
    return worst


def same_logps(job: dict, difference: float) -> bool:
    return difference < (1e-4 if job["precision"] == "fp32" else 2e-2)


def ideas(job: dict, repeats: int) -> dict:
    """From nothing to everything, cumulatively; and from everything, each idea switched off alone."""
    job = job | {"micros": job["micros"][:1]}
    names, runs = list(IDEAS), {}
    cumulative = [tuple(names[:i]) for i in range(len(names) + 1)]
    without = [tuple(other for other in names if other != name) for name in names]
    for on in dict.fromkeys(without + cumulative):
        runs[on] = must(f"ideas {on}", train_ideas, job, on, repeats)
        progress(f"{' + '.join(on) or 'plain'}: {min(runs[on]['seconds']):.3f} s a pair")

    def cost(on: tuple) -> dict:
        return {"seconds_per_pair": median(runs[on]["seconds"]), "peak_bytes": runs[on]["peak"]}

    worst = largest_difference(list(runs.values()))
    return {"plain": cost(()), "cumulative": dict(zip(names, map(cost, cumulative[1:]))),
            "without": dict(zip(names, map(cost, without))), "worst_relative_difference": worst,
            "checks": {"same_logps": same_logps(job, worst)}}


def ideas_table(report: dict) -> str:
    before, full = report["plain"], list(report["cumulative"].values())[-1]
    rows = [["plain", before["seconds_per_pair"], None, before["peak_bytes"] / 1e9, None, None]]
    for name, c in report["cumulative"].items():
        off = report["without"][name]
        rows.append([f"+ {IDEAS[name]}", c["seconds_per_pair"],
                     c["seconds_per_pair"] - before["seconds_per_pair"], c["peak_bytes"] / 1e9,
                     off["seconds_per_pair"] - full["seconds_per_pair"], off["peak_bytes"] / 1e9])
        before = c
    columns = {"": "", "s/pair": ".3f", "change": "+.3f", "peak GB": ".2f", "without it alone": "+.3f",
               "peak GB ": ".2f"}
    return table("One idea at a time", columns, rows, [
        "plain: two padded rows a pair, all tokens through lm_head, log_softmax + gather, the reference "
        "recomputed. The changes add up to this project.",
        "without it alone: everything else on, how much slower. The cached reference's one scoring pass "
        "(once a run) is not in these times.",
        f"Checked: all give the same log-probs, to {report['worst_relative_difference']:.0e} relative: "
        f"{yes(report['checks']['same_logps'])}."])


def prefix(job: dict, lengths: list[tuple[int, int]], repeats: int) -> dict:
    """The whole update with and without the shared prefix, for pairs of one prefix length P and one step
    length S."""
    config, out = Config.from_dict(json.loads((Path(job["model"]) / "config.json").read_text())), []
    for P, S in lengths:
        rows = Path(job["folder"]) / f"rows-{P}.jsonl"
        write_jsonl(rows, pair_rows(2, job["vocab"], (P, P), (S, S)))
        job = job | {"rows": str(rows), "prompt": "raw", "micros": [[0, 1]]}
        apart = [name for name in IDEAS if name != "prefix"]
        times = {}
        for name, on in {"apart": apart, "shared": list(IDEAS)}.items():
            times[name] = median(must(f"prefix {P}, {name}", train_ideas, job, on, repeats)["seconds"])
        examples = examples_of(job)
        flops = {share: flops_of(lay_out(examples, [0], share), config) for share in ("pair", "none")}
        out.append({"P": P, "S": S, "tokens": (P + 2 * S) / (2 * P + 2 * S), **times,
                    "flops": flops["pair"] / flops["none"], "time": times["shared"] / times["apart"]})
    return {"lengths": out}


def prefix_table(report: dict) -> str:
    columns = {"P": "", "S": "", "(P + 2S) / (2P + 2S)": ".2f", "model FLOPs": ".2f", "measured time": ".2f",
               "s/pair shared": ".3f", "apart": ".3f"}
    keys = ("S", "tokens", "flops", "time", "shared", "apart")
    rows = [[str(r["P"]), *(r[key] for key in keys)] for r in report["lengths"]]
    return table("The shared prefix: this much of the work and time of two separate rows", columns, rows, [
        "The time is that of a whole update; tokens that meet the vocabulary, and AdamW, do not shrink with "
        "the prefix."])


SHARING = {"none": "separate rows", "pair": "sharing within pairs", "tree": "tree"}


def tree(jobs: dict[str, dict], rounds: int) -> dict:
    """Rows of which several are of one problem, all in one update and in the same passes for all contestants:
    each text a row of its own, what a pair's sides share computed once, and what all rows of a pass share."""
    materials, checks = {}, {}
    for material, job in jobs.items():
        runs = {share: [] for share in SHARING}
        for turn in range(rounds):
            for share in SHARING:
                run = must(f"tree, {share}", train_ideas, job, list(IDEAS), 1, share)
                runs[share].append(run)
                progress(f"{material}, round {turn + 1}: {SHARING[share]}: {run['seconds'][0]:.3f} s a pair")
        first = [found[0] for found in runs.values()]
        losses = [run["losses"][0] for run in first]
        worst, apart = largest_difference(first), max(losses) - min(losses)
        ways = {}
        for share, found in runs.items():
            ways[share] = {"tokens": found[0]["tokens"], "predicting": found[0]["predicting"],
                           "seconds_per_pair": median(run["seconds"][0] for run in found),
                           "peak_bytes": max(run["peak"] for run in found)}
        checks[f"{material}: same_logps"] = same_logps(job, worst)
        checks[f"{material}: same_losses"] = apart < (2e-3 if job["precision"] == "fp32" else 5e-2)
        materials[material] = {
            "pairs": sum(job["pairs"]), "passes": len(job["micros"]), "lengths": lengths_of(job),
            "worst_relative_difference": worst, "worst_loss_difference": apart, "losses": losses,
            "ways": ways}
    return {"materials": materials, "checks": checks}


def tree_table(report: dict) -> str:
    columns = {"": "", "tokens": ",", "fewer": ".2f", "predicting": ",", "s/pair": ".3f", "faster": ".2f",
               "peak GB": ".2f"}
    rows = []
    notes = ["fewer, faster: how many times, beside sharing within pairs.",
             "predicting: hidden states that meet the vocabulary; one before a fork, or in a step that pairs "
             "share, does so once."]
    for material, m in report["materials"].items():
        pair = m["ways"]["pair"]
        rows.append([material] + [""] * 6)
        for share, c in m["ways"].items():
            rows.append([f"  {SHARING[share]}", c["tokens"], pair["tokens"] / c["tokens"], c["predicting"],
                         c["seconds_per_pair"], pair["seconds_per_pair"] / c["seconds_per_pair"],
                         c["peak_bytes"] / 1e9])
        notes += [f"{material}: {m['pairs']} pairs in one update of {m['passes']} passes, {m['lengths']};",
                  f"  log-probs equal to {m['worst_relative_difference']:.0e} relative, the loss after an "
                  f"update to {m['worst_loss_difference']:.0e}."]
    notes.append(f"Checked: the same log-probs and losses: {yes(all(report['checks'].values()))}.")
    return table("Several pairs of one problem", columns, rows, notes)


def profile(job: dict) -> dict:
    """Where the time of our own updates goes, by torch.profiler."""
    from torch.profiler import ProfilerActivity
    keep_freed_memory()
    examples, device = examples_of(job), torch.device(job["device"])
    policy = stepdpo.Policy(Llama.from_pretrained(job["model"], device=device))
    policy.model.gradient_checkpointing = job["gradient_checkpointing"]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, weight_decay=0.0, fused=True)
    args = SimpleNamespace(beta=BETA)
    reference = stepdpo.score_tokens(policy, examples, micro_batch_size=job["micro_batch_size"],
                                     precision=job["precision"])

    def update(rows):
        batch = data.collate(examples, rows).to(device)
        with stepdpo.autocast(job["precision"], device):
            logps = policy(batch)
        ref = torch.cat([reference[row] for row in rows])
        losses, _ = stepdpo.preference_objective(logps, ref, batch, args)
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    update(job["micros"][0])
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=activities) as trace:
        for rows in job["micros"]:
            update(rows)
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(trace.key_averages(), key=lambda e: -getattr(e, key))
    total = sum(getattr(e, key) for e in events)
    top = [{"name": e.key, "calls": e.count, "share": getattr(e, key) / total} for e in events[:12]]
    return {"seconds_per_pair": total / 1e6 / sum(job["pairs"]), "operations": top}


def profile_table(report: dict) -> str:
    title = (f"Where our own updates spend {report['seconds_per_pair']:.3f} s a pair (own time of an "
             "operation, without what it calls)")
    rows = [[o["name"], o["calls"], o["share"]] for o in report["operations"]]
    return table(title, {"operation": "", "calls": ",", "share": ".1%"}, rows)


# ----------------------------------------------------------------------------------------------------------
# command line

PARTS = {"peers": "this project beside TRL on generated rows",
         "real": "the same on real text (--data and --tokenizer, or ../shared/assets)",
         "ideas": "one idea at a time", "prefix": "the shared prefix against its formula",
         "tree": "several pairs of one problem, generated and real: separate rows, pairs shared, tree",
         "profile": "our own ten most expensive operations"}
DERIVED = ("qwen25math_derived_step_pairs.jsonl", "prm800k_derived_step_pairs.jsonl")
PAIRS_A_PASS = 8            # of the part `tree`, and
PAIRS_AN_UPDATE = 128       # at most: the paper's batch


def real_text(args) -> dict[str, tuple[Path, Path]]:
    """{name: (file of rows, folder of a tokenizer)}: those of the command line, else of ../shared/assets
    where it is."""
    files = [args.data] if args.data else [ASSETS / "prefs" / name for name in DERIVED]
    tokenizer = args.tokenizer or ASSETS / "tokenizers" / "tinyllama"
    return {f"{file.name}, tokenizer {tokenizer.name}": (file, tokenizer)
            for file in files if file.is_file() and tokenizer.is_dir()}


def parse(argv) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()),
                                epilog="Parts: " + "; ".join(f"{k}: {v}" for k, v in PARTS.items()) + ".")
    p.add_argument("--part", action="append", choices=PARTS,
                   help="only this part; may be repeated (default: peers, ideas, prefix, tree)")
    add_options(p, precision="of the arithmetic; weights are fp32", rounds=None)
    p.add_argument("--rounds", type=int,
                   help="how often each contestant of peers, real (default 2) and tree (default 1) runs")
    p.add_argument("--gradient_checkpointing", action="store_true", help="for all contestants")
    p.add_argument("--batch_size", type=int, default=4, help="pairs an update (default 4)")
    p.add_argument("--micro_batch_size", type=int, default=4,
                   help="pairs in one pass, where a contestant does not say otherwise (default 4)")
    p.add_argument("--steps", type=int, default=2,
                   help="updates, of which the first warms up and is not counted (default 2)")
    p.add_argument("--no_trl", action="store_true", help="leave TRL out, where it is installed")
    p.add_argument("--data", type=Path, metavar="FILE",
                   help="real rows, for the parts real and tree (default: ../shared/assets, where it is)")
    p.add_argument("--tokenizer", type=Path, metavar="FOLDER",
                   help="a real tokenizer for them (default: tinyllama's)")
    p.add_argument("--prompt", default="alpaca", choices=data.PROMPT_STYLES,
                   help="how their questions become prompts (default alpaca)")
    p.add_argument("--peak_tflops", type=float,
                   help="of the device, from its data sheet: MFU is printed, not the share of the GEMM rate")
    args = p.parse_args(argv)
    if args.steps < 2 or args.batch_size % args.micro_batch_size:
        p.error("--steps must be 2 or more, and --batch_size a multiple of --micro_batch_size")
    for path in (args.data, args.tokenizer):
        if path and not path.exists():
            p.error(f"{path}: is not there")
    args.part = args.part or ["peers", "ideas", "prefix", "tree"]
    if "real" in args.part and not real_text(args):
        p.error("--part real: give --data FILE and --tokenizer FOLDER; there is no ../shared/assets")
    if args.quick:
        args.shape, args.rounds, args.no_trl = "quick", 1, True
    return args


def main(argv=None) -> int:
    args = parse(argv)
    quick = args.quick
    trl = not args.no_trl and version("trl") is not None
    report = {"machine": machine(args.device, ("trl", "transformers", "accelerate") if trl else ()),
              "settings": {name: str(value) for name, value in vars(args).items()}}
    text = [machine_line(report["machine"]), ""]
    with tempfile.TemporaryDirectory() as folder:
        def job_of(name: str, *how, **source) -> dict:
            path = Path(folder) / str(len(list(Path(folder).iterdir())))
            path.mkdir()
            return must(name, lambda: prepare(args, path, *how, **source))

        vocab, repeats = SHAPES[args.shape]["vocab_size"], 1 if quick else 2
        usual = args.batch_size, args.micro_batch_size, args.steps
        lengths = ((12, 48), (4, 12)) if quick else ((120, 480), (20, 100))
        generated = job_of("generated rows", *usual, rows=pair_rows(usual[0] * usual[2], vocab, *lengths))
        gemm = {"gemm_size": 256 if quick else 2048 if args.device == "cpu" else 8192,
                "gemm_seconds": 0.1 if quick else 1.0}
        for part in args.part:
            if part in ("peers", "real"):
                job, title = generated, "Training beside TRL, generated rows"
                if part == "real":
                    (file, tokenizer), *_ = real_text(args).values()
                    job = job_of(part, *usual, source=file, tokenizer=tokenizer)
                    title = "Training beside TRL, real text"
                shown = {key: value for key, value in job.items()
                         if key not in ("tokens", "micros", "folder", "model", "rows")}
                report[part] = {"job": shown, **peers(job | gemm, args.rounds or 2, trl)}
                title += "" if trl else ": TRL is not installed, or left out"
                text.append(peers_table(job, report[part], title, args.peak_tflops))
            elif part == "ideas":
                report[part] = ideas(generated, repeats)
                text.append(ideas_table(report[part]))
            elif part == "prefix":
                pairs = [(24, 8)] if quick else [(60, 60), (240, 60), (960, 60)]
                report[part] = prefix(generated, pairs, repeats)
                text.append(prefix_table(report[part]))
            elif part == "tree":
                how = PAIRS_AN_UPDATE, PAIRS_A_PASS, 1
                lengths = ((10, 20), (4, 12)) if quick else ((60, 120), (20, 100))
                rows = grouped_rows(2, vocab, *lengths)
                jobs = {"generated rows": job_of(part, *how, rows=rows)}
                for name, (file, tokenizer) in {} if quick else real_text(args).items():
                    jobs[name] = job_of(name, *how, source=file, tokenizer=tokenizer)
                report[part] = tree(jobs, args.rounds or 1)
                text.append(tree_table(report[part]))
            else:
                report[part] = must(part, profile, generated)
                text.append(profile_table(report[part]))
    finish(report, "\n".join(text), args.json)
    return 0 if all(fact for part in args.part for fact in report[part].get("checks", {}).values()) else 1


if __name__ == "__main__":
    sys.exit(main())
