"""Step-DPO (Lai et al. 2024, arXiv 2406.18629) beside its baselines SFT and DPO: the losses and one training
loop.

    SFT        -log pi(y | x)                                                a mean over answer tokens
    DPO        -log sigmoid( beta [ log pi/ref (y_win | x)                   Eq. 1: whole answers
                                  - log pi/ref (y_lose | x) ] )
    Step-DPO   -log sigmoid( beta [ log pi/ref (s_win | x, s_1..s_{k-1})     Eq. 2: the first wrong step
                                  - log pi/ref (s_lose | x, s_1..s_{k-1}) ] )

with log pi/ref = log pi_theta - log pi_ref, and the log-probability of a text the SUM over its tokens. Eq. 2
is Eq. 1 with another split between what is given and what is judged: both call `dpo_loss`, and the difference
is in data.py, which decides where the prompt ends and whether an end token follows.

What is deliberately left out, and why nothing is missing:
 1. A second model in memory: the reference is the policy at step 0, so one scoring pass before the first
    update gives every reference term (`score_tokens`).
 2. A forward pass a text: what begins alike runs through the network once (`collate` in data.py, `Tree` in
    model.py).
 3. The (tokens x vocabulary) matrix of logits: only hidden states that predict a response token meet the
    vocabulary, each once, a chunk at a time (`FusedLogProbs`).
 4. A trainer class: the loop is `train`; a new method is a function like `preference_objective`, and `main`
    says what else it may bring along.

    python stepdpo.py stepdpo --model FOLDER --data pairs.jsonl --out OUT     one process, CPU or GPU
    torchrun --nproc_per_node 8 stepdpo.py stepdpo --model FOLDER ...         eight, the whole model on each;
                                                                              with --shard an eighth of it

Shapes: B rows of a micro-batch (pairs), R responses of them (2B; B in SFT), N tokens of its flat row, P
places in it that predict, M response tokens that they predict, C hidden size, V vocabulary. """
import argparse
import hashlib
import inspect
import json
import math
import os
import platform
import shutil
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

if __name__ == "__main__":      # python -P does not search a script's own folder
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import data
from data import Batch, DataError, Example
from model import (LORA_LAYERS, CheckpointError, Config, Llama, Tree, base_of, choose_device, fingerprint,
                   home_of, join_processes, keep_freed_memory, leave_processes, locked, own_rows, read_json,
                   resolve, sync, whole, writing, written)


# ----------------------------------------------------------------------------------------------------------
# the losses

def dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """Eq. 1 of the paper (DPO, Rafailov et al. 2023) on log-probs of whole answers; Eq. 2 (Step-DPO) on
    log-probs of single steps. All tensors (B,), in nats.

    Returns (losses, chosen_rewards, rejected_rewards), each (B,); the caller takes the mean. A reward is beta
    times the log-ratio of policy and reference; their difference is the margin. A larger beta makes the same
    change of log-probs count for more, so the policy stays nearer to the reference. At step 0 policy =
    reference: margin 0, loss -log sigmoid(0) = log 2 = 0.6931."""
    chosen_rewards = beta * (policy_chosen_logps - ref_chosen_logps)            # s_win
    rejected_rewards = beta * (policy_rejected_logps - ref_rejected_logps)      # s_lose
    return -F.logsigmoid(chosen_rewards - rejected_rewards), chosen_rewards, rejected_rewards


def response_logps(token_logps: torch.Tensor, batch: Batch) -> torch.Tensor:
    """(M,) -> (R,): log pi(response) = the sum over its tokens. Not the mean: the probability of a text is
    the product of its tokens' probabilities, and beta is calibrated to that. Prompt and prefix are not among
    the M tokens.

        tokens     a     b     c  |  d     e          response   0  0  0  1  1
        logps    -0.5  -1.0  -0.5 | -0.2  -0.3   ->   sums      [-2.0, -0.5]
    """
    return token_logps.new_zeros(batch.responses).index_add(0, batch.response, token_logps)


def sft_objective(token_logps, ref_token_logps, batch, args):
    """-log pi of every answer token: losses (M,), and no preference metrics."""
    return -token_logps, {}


def preference_objective(token_logps, ref_token_logps, batch, args):
    """DPO and Step-DPO: token_logps and ref_token_logps (M,) -> losses (B,) and metrics, each (B,).

    accuracy: does the policy, relative to the reference, favour the chosen side; margin = chosen_reward -
    rejected_reward. Only the margin is optimised: chosen_reward may fall below 0 as long as rejected_reward
    falls further, and neither says whether answers get better. chosen_logps is logged for that.

    Raises DataError where there is no reference: the loss was run on rows of SFT."""
    if ref_token_logps is None:
        raise DataError("this loss compares two responses with a reference: run it as dpo or stepdpo")
    policy_chosen_logps, policy_rejected_logps = response_logps(token_logps, batch).view(-1, 2).unbind(1)
    ref_chosen_logps, ref_rejected_logps = response_logps(ref_token_logps, batch).view(-1, 2).unbind(1)
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, args.beta)
    margin = chosen_rewards - rejected_rewards
    return losses, {"accuracy": (margin > 0).float(), "margin": margin,
                    "chosen_reward": chosen_rewards, "rejected_reward": rejected_rewards,
                    "chosen_logps": policy_chosen_logps, "rejected_logps": policy_rejected_logps}


OBJECTIVES = {"sft": sft_objective, "dpo": preference_objective, "stepdpo": preference_objective}


# ----------------------------------------------------------------------------------------------------------
# from tokens to log-probabilities

class Policy(nn.Module):
    """The model as the loop sees it: a batch in, the log-probability of every response token out. (A module,
    because DDP wraps modules.)"""

    def __init__(self, model: Llama):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> torch.Tensor:
        """-> (M,): log pi(targets[m] | all tokens before it)."""
        tree = Tree(batch.lengths, batch.parents)
        ids, positions = batch.input_ids[None], batch.position_ids
        hidden = self.model.hidden_states(ids, positions, tree, batch.predict_at)[0]                # (P, C)
        return FusedLogProbs.apply(hidden, self.model.lm_head.weight, batch.targets, batch.source)


# Elements of the one (chunk, V) buffer: 128 MB in fp32, 220 tokens of a 152k vocabulary. With half of it the
# matrix products were too thin.
LOGITS_AT_ONCE = 2**25


class FusedLogProbs(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[targets], without ever holding the (P, V) matrix of logits, forward or
    backward.

    hidden (P, C), weight (V, C), targets (M,) int64, source (M,) int64 in [0, P): which hidden state predicts
    target m (by default P = M and each its own) -> (M,) fp32, or fp64 if hidden is.

    A chunk of hidden states at a time: logits z, then z[target] - logsumexp(z). The backward pass makes each
    chunk's logits once more (but the last's): with g_m the gradient of log-prob m,

        d loss / d z[p] = (sum of g_m over the targets of p) * -softmax(z[p]) + g_m at each target m of p

    The g_m are known only after the whole response has been summed and put through the sigmoid, which is why
    the forward pass cannot already do this work."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, source=None):
        source = torch.arange(len(targets), device=targets.device) if source is None else source
        kind = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        h, w = hidden.to(ctx.dtype), weight.to(ctx.dtype)
        rows = max(1, LOGITS_AT_ONCE // len(w))
        z, log_z, at_target = None, [], 0
        for start in range(0, len(h), rows):
            del z                                                       # never more than one chunk of logits
            z = logits_of(h[start:start + rows], w)                     # (chunk, V)
            at_target = at_target + of_chunk(z, start, source, targets)
            top = z.amax(-1)
            log_z.append(z.sub_(top[:, None]).exp_().sum(-1).log_() + top)      # logsumexp, in place
        log_z = torch.cat(log_z)
        ctx.save_for_backward(hidden, weight, targets, source, log_z)
        ctx.last = z, top                                           # the backward pass begins with this chunk
        return at_target - log_z[source]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden, weight, targets, source, log_z = ctx.saved_tensors
        (z, top), ctx.last = ctx.last, (None, None)                 # a second backward pass makes them again
        h, w = hidden.to(ctx.dtype), weight.to(ctx.dtype)
        of_place = grad.new_zeros(len(h)).index_add_(0, source, grad)     # (P,): the sums of g_m
        grad_hidden = torch.empty_like(h)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        rows = max(1, LOGITS_AT_ONCE // len(w))
        for start in reversed(range(0, len(h), rows)):
            s = slice(start, start + rows)
            if z is None:
                z = logits_of(h[s], w).sub_(log_z[s, None]).exp_().mul_(of_place[s, None])
            else:                                                   # exp(logits - top), from the forward pass
                z.mul_((of_place[s] * (top - log_z[s]).exp())[:, None])
            of_chunk(z, start, source, targets, subtract=grad)
            z = z.to(ctx.dtype)                                         # minus the gradient of the logits
            torch.mm(z, w, out=grad_hidden[s])
            if grad_weight is None:
                pass
            elif grad_weight.dtype == ctx.dtype:
                grad_weight.addmm_(z.T, h[s], alpha=-1)
            else:
                grad_weight -= z.T @ h[s]
            z = None
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden.neg_().to(hidden.dtype), grad_weight, None, None


def of_chunk(z: torch.Tensor, start: int, source: torch.Tensor, targets: torch.Tensor, subtract=None):
    """The entries z[source - start, targets] of one chunk of logits, (M,), 0 for targets of other chunks.
    With `subtract` (M,) these entries are lowered by it, in place. (All M are asked for, those of other
    chunks with weight 0: to pick them out would make a GPU wait for the CPU.)"""
    place = source - start
    here = (place >= 0) & (place < len(z))
    place = place.clamp(0, len(z) - 1)
    if subtract is None:
        return torch.where(here, z[place, targets], 0)
    z.index_put_((place, targets), torch.where(here, -subtract, 0), accumulate=True)


def logits_of(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """h (chunk, C) @ w.T (C, V) as fp32 at least: log-probabilities are small differences of large numbers.
    (bf16 inputs: CUDA gives the fp32 sums; a CPU rounds them to bf16 first, to about 0.06 at logits of
    20.)"""
    if h.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(h, w.T, out_dtype=torch.float32) if h.is_cuda else (h @ w.T).float()
    return h @ w.T


def autocast(precision: str, device: torch.device):
    """bf16 products over fp32 weights. The weights themselves stay fp32: at lr 5e-7 an update is far below
    the spacing of bf16 numbers (1e-4 near 0.02)."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


# ----------------------------------------------------------------------------------------------------------
# the reference: one scoring pass

@torch.no_grad()
def score_tokens(policy: Policy, examples: list[Example], *, micro_batch_size: int | None = None,
                 micro_batch_tokens: int = 8192, precision: str = "fp32",
                 what: str = "scoring") -> list[torch.Tensor]:
    """Of each example (tokens,) fp32: log pi of every token that is predicted in it, side by side, under
    `policy`.

    Under torchrun all processes call it and share the micro-batches; each example is scored by exactly one of
    them, so a sum over the processes assembles the whole. Draws no random numbers."""
    rank, world = processes()
    device = policy.model.lm_head.weight.device
    counts = [sum(len(tokens) for _, tokens in example.predicted) for example in examples]
    scored = torch.zeros(sum(counts), device=device).split(counts)                  # views of one buffer
    plan = data.epoch_plan(examples, batch_size=len(examples), order=range(len(examples)), world_size=world,
                           micro_batch_size=micro_batch_size, micro_batch_tokens=micro_batch_tokens)
    was_training = policy.training
    policy.eval()
    passes = equal_passes(plan[0], rank)
    pause = 0.5 if sys.stderr.isatty() else 30      # seconds between two signs of life: a log file wants few
    total = sum(len(rows) for rows, _ in passes)
    with tqdm(total=total, desc=what, unit=" rows", disable=rank > 0, leave=False, mininterval=pause,
              delay=pause) as bar:
        for rows, weight in passes:
            batch = data.collate(examples, rows).to(device)
            with autocast(precision, device):
                token_logps = policy(batch)
            for row, part in zip(rows, token_logps.split([counts[row] for row in rows])):
                scored[row].add_(part, alpha=weight)
            bar.update(len(rows))
    policy.train(was_training)
    return list(all_sum(torch.cat(scored)).split(counts))


def score(policy: Policy, examples: list[Example], **how) -> torch.Tensor:
    """(n, K) fp32 on the CPU: log pi of each example's K responses; of a pair chosen and rejected. how: as
    `score_tokens`."""
    sums = []
    for example, token_logps in zip(examples, score_tokens(policy, examples, **how)):
        parts = token_logps.cpu().split([len(tokens) for _, tokens in example.predicted])
        sums.append(torch.stack([part.sum() for part in parts]))
    return torch.stack(sums)


def log_probs(folder, rows: list[dict], method: str = "stepdpo", prompt: str = "chat", *,
              device: str | None = None, **how) -> torch.Tensor:
    """(n, K) fp32: log pi of the responses of rows (as in a training file) under the checkpoint in `folder`,
    a folder or hub id. how: as `score_tokens`. Raises DataError where a row cannot be trained on, since none
    is left out."""
    tokenizer = data.Tokenizer.from_pretrained(resolve(folder))
    named = [(f"row {i}", row) for i, row in enumerate(rows)]
    examples, report = data.encode_dataset(named, tokenizer, method, prompt)
    if report.kept < report.rows:
        raise DataError(f"log_probs: not every row can be scored\n{report}")
    return score(Policy(Llama.from_pretrained(folder, device=choose_device(device))), examples, **how)


# ----------------------------------------------------------------------------------------------------------
# the training loop

@dataclass
class Run:
    """A training run that has been opened: what stays the same from step to step."""
    args: argparse.Namespace
    objective: object                       # a function like `preference_objective`
    order: object                           # see `main`; None for the shuffled order
    before_update: object                   # see `main`; None in most methods
    out: Path
    rank: int
    world: int
    device: torch.device
    tokenizer: data.Tokenizer
    policy: Policy
    examples: list[Example]
    held_out: list[Example]
    reference: list[torch.Tensor] | None = None             # of each example, (tokens,); None without one
    held_out_reference: list[torch.Tensor] | None = None

    def score(self, examples: list[Example]) -> torch.Tensor:
        """(n, K) log-probs under the policy as it is now; all processes call it together."""
        return score(self.policy, examples, precision=self.args.precision, what="policy", **self.how)

    @property
    def how(self) -> dict:
        """How a pass over examples is cut, for `score_tokens` and `data.epoch_plan`."""
        return {"micro_batch_size": self.args.micro_batch_size,
                "micro_batch_tokens": self.args.micro_batch_tokens}


def train(args, objective, encode=data.encode_dataset, order=None, before_update=None) -> int:
    """Train `args.model` on `args.data` (see `main`); returns the exit status. A variant of several stages
    calls it for each, with a copy of the arguments that `parser` gave and `settle` has completed.

    The loss is the mean over the global batch of pairs (of answer tokens in SFT), however the batch is cut
    into micro-batches and processes."""
    device = choose_device(args.device)
    rank, world = join_processes()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    keep_freed_memory()
    torch.manual_seed(args.seed)            # nothing here draws from it; a variant may
    out = Path(args.out)
    check_out(out, args)
    with locked(out):
        run = open_run(args, objective, encode, order, before_update, out, rank, world, device)
        if run is None:
            say(f"{out}: this run is complete; --restart would begin it anew")
            return 0
        find_reference(run)
        return loop(run)


def loop(run: Run) -> int:
    """The updates, and what happens once in a while between them."""
    args, rank, world, out, model = run.args, run.rank, run.world, run.out, run.policy.model
    model.gradient_checkpointing = args.gradient_checkpointing
    replicated = world > 1 and not args.shard
    learner = run.policy.train()
    if replicated:
        learner = nn.parallel.DistributedDataParallel(learner, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=args.lr, betas=(0.9, 0.999), eps=1e-8,
                                  weight_decay=0.0, fused=True)
    done = load_checkpoint(out / "checkpoint", model, optimizer)
    per_epoch = math.ceil(len(run.examples) / args.batch_size)
    total = min(args.epochs * per_epoch, args.max_steps or sys.maxsize)
    screen = Screen(run, done, total, per_epoch)
    epoch, plan = None, None
    with StopSignal() as stop:
        for step in range(done, total):
            # ---- once in a while
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                plan = plan_of_epoch(run, epoch)
                if step == done:
                    screen.opening(plan)
            if run.held_out and args.eval_every and step % args.eval_every == 0:
                evaluate(run, step)
            batch_of_step = plan[step % per_epoch]                          # [rank][micro-batch][row]
            rows = [row for of_rank in batch_of_step for micro_batch in of_rank for row in micro_batch]
            units = sum(run.examples[row].units for row in rows)            # the mean's denominator
            passes = equal_passes(batch_of_step, rank)
            begun = time.perf_counter()
            if run.before_update is not None:
                run.before_update([run.examples[row] for row in rows], run.score)

            # ---- one update
            lr = learning_rate(step, total, args.lr, args.warmup, args.schedule)
            for group in optimizer.param_groups:
                group["lr"] = lr
            sums = Sums(run.device)
            for i, (micro_batch, weight) in enumerate(passes):
                batch = data.collate(run.examples, micro_batch).to(run.device)
                # DDP averages gradients over the ranks in a backward pass: that of the last micro-batch is
                # enough. (A sharded model scatters them in every pass: no rank has room for the whole
                # gradient.)
                with learner.no_sync() if replicated and i + 1 < len(passes) else nullcontext():
                    losses, metrics = forward(learner, run, run.reference, micro_batch, batch)
                    (losses.sum() * (weight * world / units)).backward()    # DDP and FSDP divide by world
                sums.add(weight, len(batch.input_ids), {"loss": losses, **metrics})
            grad_norm = float(whole(nn.utils.clip_grad_norm_(model.parameters(), args.clip)))
            mean, tokens, signalled = sums.over_all_processes(units, stop.number)
            check(run, step, mean, grad_norm, rows)                         # before the weights are touched
            optimizer.step()
            optimizer.zero_grad()

            # ---- say it, keep it
            seconds = time.perf_counter() - begun
            screen.record({"step": step, **mean, "grad_norm": grad_norm, "lr": lr,
                           "tokens_per_second": round(tokens / seconds, 1), "seconds": round(seconds, 4)})
            due = args.checkpoint_every and (step + 1) % args.checkpoint_every == 0
            if step + 1 < total and (signalled or due):
                save_checkpoint(out / "checkpoint", step + 1, model, optimizer, rank)
                if signalled:
                    number = stop.number or signal.SIGTERM
                    name = signal.Signals(number).name
                    say(f"stopped by {name} after step {step}; the same command continues from here")
                    return 128 + number
    if run.held_out:
        evaluate(run, total)
    close_run(run)
    return 0


def trained(model: Llama) -> dict[str, nn.Parameter]:
    """What the optimizer holds, by name: every parameter, or with --lora the adapter's."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def forward(policy, run: Run, reference: list | None, rows: list[int], batch: Batch):
    """One micro-batch through policy and objective: (losses, metrics)."""
    with autocast(run.args.precision, run.device):
        token_logps = policy(batch)
    ref_token_logps = None if reference is None else torch.cat([reference[row] for row in rows])
    return run.objective(token_logps, ref_token_logps, batch, run.args)


def learning_rate(step: int, total: int, peak: float, warmup: float, schedule: str) -> float:
    """lr of update `step` (0-based) out of `total`: a linear rise over the first `warmup` share of updates,
    then a linear or cosine fall towards 0, or none (constant). A pure function of the step, so a resumed run
    needs no scheduler state. The first update already moves (HF's schedulers begin at exactly 0)."""
    rise = math.ceil(total * warmup)
    if step < rise:
        return peak * (step + 1) / rise
    progress = (step - rise) / max(1, total - rise)
    shares = {"linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress)), "constant": 1.0}
    return peak * shares[schedule]


class Sums:
    """The metrics of a step, summed over micro-batches and processes in fp64."""

    def __init__(self, device: torch.device):
        self.values, self.tokens, self.device = {}, 0.0, device

    def add(self, weight: float, tokens: int, values: dict[str, torch.Tensor]):
        for name, value in values.items():
            self.values[name] = self.values.get(name, 0) + weight * value.detach().double().sum()
        self.tokens += weight * tokens

    def over_all_processes(self, units: int, signal_number: int = 0) -> tuple[dict[str, float], float, bool]:
        """(the global means, tokens, whether any process has caught a signal), in one all-reduce."""
        extra = torch.tensor([self.tokens, float(signal_number)], device=self.device, dtype=torch.float64)
        *sums, tokens, signals = all_sum(torch.cat([torch.stack(list(self.values.values())), extra])).tolist()
        return {name: value / units for name, value in zip(self.values, sums)}, tokens, signals > 0


def check(run: Run, step: int, mean: dict[str, float], grad_norm: float, rows: list[int]):
    """FloatingPointError where the numbers of a step say that something is wrong; the weights were not
    touched yet."""
    if not (math.isfinite(mean["loss"]) and math.isfinite(grad_norm)):
        places = ", ".join(run.examples[row].where for row in sorted(rows))
        raise FloatingPointError(f"step {step}: loss {mean['loss']}, gradient norm {grad_norm}; the weights "
                                 f"were not touched. Rows of the batch: {places}")
    if step == 0 and run.objective is preference_objective and not run.args.reference:
        # Policy and reference are one model here, but their sums were batched otherwise: in fp32 log-probs of
        # a long answer then differ by up to about 1e-3, in bf16 by about 0.1; twice that, times beta, is let
        # pass.
        rounding = max(1.0, run.args.beta) * (2e-3 if run.args.precision == "fp32" else 0.25)
        if abs(mean["margin"]) > rounding:
            raise FloatingPointError(f"step 0: margin {mean['margin']:.4f} instead of 0, loss "
                                     f"{mean['loss']:.4f} where log 2 = 0.6931 is expected: the "
                                     "reference's log-probs are not this model's")


@torch.no_grad()
def evaluate(run: Run, step: int):
    """Held-out loss, margin and preference accuracy (Fig. 2 of the paper) after `step` updates: a line of
    eval.jsonl."""
    run.policy.eval()
    if run.before_update is not None:
        run.before_update(run.held_out, run.score)
    sums = Sums(run.device)
    plan = data.epoch_plan(run.held_out, batch_size=len(run.held_out), world_size=run.world,
                           order=range(len(run.held_out)), **run.how)
    for rows, weight in equal_passes(plan[0], run.rank):
        batch = data.collate(run.held_out, rows).to(run.device)
        losses, metrics = forward(run.policy, run, run.held_out_reference, rows, batch)
        sums.add(weight, len(batch.input_ids), {"loss": losses, **metrics})
    run.policy.train()
    mean, _, _ = sums.over_all_processes(sum(example.units for example in run.held_out))
    if run.rank == 0:
        append(run.out / "eval.jsonl", {"step": step, **mean})
    shown = ", ".join(f"{name} {mean[name]:.4f}" for name in ("loss", "accuracy", "margin") if name in mean)
    say(f"held out, after {step} updates: {shown}")


def plan_of_epoch(run: Run, epoch: int) -> list:
    """[step][rank][micro-batch][row]. A variant's order is kept beside the checkpoint: a run that goes on in
    mid-epoch has another policy than the one that gave the order."""
    order = None
    if run.order is not None:
        kept = run.out / "checkpoint" / f"order-{epoch}.json"
        if all_sum(torch.tensor(float(run.rank == 0 and kept.exists()), device=run.device)):
            with reading(kept):
                order = json.loads(kept.read_text())
        else:
            of_policy = lambda: run.score(run.examples)
            order = [int(row) for row in run.order(epoch, run.examples, of_policy)]
            if sorted(order) != list(range(len(run.examples))):
                raise DataError(f"order of epoch {epoch}: expected every row of {len(run.examples)} once")
            if run.rank == 0:
                write_json(kept, order)
            barrier()
    args = run.args
    return data.epoch_plan(run.examples, batch_size=args.batch_size, world_size=run.world, seed=args.seed,
                           epoch=epoch, order=order, group_by_prompt=args.group_by_prompt, **run.how)


class Screen:
    """metrics.jsonl, and the table on the screen: a line a step in short runs, one every 5 seconds in long
    ones."""

    def __init__(self, run: Run, done: int, total: int, per_epoch: int):
        self.run, self.done, self.total, self.per_epoch = run, done, total, per_epoch
        self.columns, self.begun, self.spoke = None, time.perf_counter(), -math.inf
        if run.rank == 0:
            keep_lines(run.out / "metrics.jsonl", done)
            keep_lines(run.out / "eval.jsonl", done)

    def opening(self, plan: list):
        run, args = self.run, self.run.args
        sharded = ", sharded" if args.shard and run.world > 1 else ""
        parameters = f"{sum(p.numel() for p in run.policy.model.parameters()):,} parameters"
        if args.lora:
            count = sum(p.numel() for p in trained(run.policy.model).values())
            parameters = f"LoRA of rank {args.lora}, {count:,} of {parameters}"
        beta = f", beta {args.beta:g}" if args.beta is not None else ""
        continued = f"; continuing after step {self.done - 1}" if self.done else ""
        say(f"{args.method}: {parameters} on {run.world} x {run.device.type}{sharded}, "
            f"{args.precision}; {len(run.examples):,} rows, batch {args.batch_size}, {self.total} steps "
            f"({args.epochs} epochs of {self.per_epoch}); lr {args.lr:g} {args.schedule}, "
            f"warmup {args.warmup:.0%}{beta}{continued}")
        micro_batches = [rows for step in plan for rank in step for rows in rank]
        say(data.tokens_shared(run.examples, micro_batches))

    def record(self, record: dict):
        step = record["step"]
        if self.run.rank == 0:
            append(self.run.out / "metrics.jsonl", record)
        now = time.perf_counter()
        if not (self.total <= 30 or step in (self.done, self.total - 1) or now - self.spoke > 5):
            return
        self.spoke = now
        if self.columns is None:                            # a variant's metrics are columns too
            hidden = ("chosen_logps", "rejected_logps", "tokens_per_second", "seconds")
            self.columns = [name for name in record if name not in hidden]
            say("  ".join(f"{name:>{max(8, len(name))}}" for name in self.columns) + "     tok/s  time left")
        cells = []
        for name in self.columns:
            shape = "d" if name == "step" else ".3g" if name == "lr" else ".4f"
            cells.append(f"{record.get(name, math.nan):>{max(8, len(name))}{shape}}")
        left = (now - self.begun) / (step + 1 - self.done) * (self.total - step - 1)
        say("  ".join(cells) + f"  {record['tokens_per_second']:>8,.0f}  {timedelta(seconds=round(left))}")


class StopSignal:
    """SIGINT and SIGTERM set a flag; the loop finishes its step, saves and exits with the status that such a
    signal usually gives. Ctrl-C twice is a kill."""

    def __enter__(self):
        self.number = 0
        self.before = {s: signal.signal(s, self.catch) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def catch(self, number, frame):
        if self.number == signal.SIGINT == number:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.number = number

    def __exit__(self, *_):
        for s, handler in self.before.items():
            signal.signal(s, handler)


# ----------------------------------------------------------------------------------------------------------
# opening a run, and closing it

def open_run(args, objective, encode, order, before_update, out: Path, rank: int, world: int,
             device) -> Run | None:
    """Read rows and model, check that they belong together and that OUT is this run's; None if it is
    complete."""
    folder = resolve(args.model)
    tokenizer = data.Tokenizer.from_pretrained(folder, system=args.system, template_args=args.template_args,
                                               base=args.base)
    settings = home_of(folder, args.base) / "config.json"
    config = Config.from_dict(read_json(settings), str(settings))
    max_length = min(args.max_length, config.max_position_embeddings)

    def read(source) -> list[Example]:
        examples, report = encode(source, tokenizer, args.method, args.prompt, max_length)
        say(report)
        if max_length < args.max_length and any("longer than" in reason for reason in report.dropped):
            say(f"--max_length {args.max_length}: the model's positions end at {max_length}")
        return examples

    examples = read(args.data)
    held_out = read(args.eval_data) if args.eval_data else []
    policy = load_policy(args.model, args, world, device, args.base)
    check_vocabulary(examples + held_out, policy.model, folder)
    if args.reference:
        check_reference(args.reference, policy.model, tokenizer)
    variant = objective not in OBJECTIVES.values() or encode is not data.encode_dataset or order is not None
    identity = identity_of(args, objective, folder, examples, held_out, variant)
    if variant:
        identity |= {"encode": name_of(encode), "order": name_of(order)}
    same_everywhere("model, data and settings", identity, device)
    finished = torch.tensor(int(rank == 0 and prepare_out(out, args, identity)), device=device)
    if all_sum(finished):
        return None
    same_everywhere(f"{out}/checkpoint", sorted(p.name for p in (out / "checkpoint").glob("*")), device)
    return Run(args, objective, order, before_update, out, rank, world, device, tokenizer, policy, examples,
               held_out)


def find_reference(run: Run):
    """Fill in the reference's log-probs, where a loss asks for them: of the model before the first update,
    unless --reference names another. They are kept beside the checkpoints."""
    if not any(example.reference for example in run.examples):
        return
    kept = run.out / "checkpoint" / "reference.safetensors"
    if kept.exists():
        with reading(kept):
            table = load_file(kept, device=str(run.device))
            run.reference = split_like(table["train"], run.examples)
            run.held_out_reference = split_like(table["held_out"], run.held_out)
        return
    policy = run.policy
    if run.args.reference:
        policy = load_policy(run.args.reference, run.args, run.world, run.device, trains=False)
    how = {"precision": run.args.precision, "what": "reference", **run.how}
    run.reference = score_tokens(policy, run.examples, **how)
    run.held_out_reference = score_tokens(policy, run.held_out, **how) if run.held_out else []
    if run.rank == 0:
        joined = lambda parts: torch.cat(parts).cpu() if parts else torch.zeros(0)
        with written(kept) as aside:
            save_file({"train": joined(run.reference), "held_out": joined(run.held_out_reference)}, aside)


def split_like(flat: torch.Tensor, examples: list[Example]) -> list[torch.Tensor]:
    return list(flat.split([sum(len(tokens) for _, tokens in example.predicted) for example in examples]))


def close_run(run: Run):
    """Write OUT as a checkpoint folder, with --lora as an adapter's. A step teaches no end, so after Step-DPO
    no end token is added to its config."""
    args, out = run.args, run.out
    if run.rank == 0 or (args.shard and run.world > 1):
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.save_dtype]
        eos_ids = () if args.method == "stepdpo" else run.tokenizer.stop_ids(args.prompt)
        with writing(out / "model.safetensors"):
            run.policy.model.save_pretrained(out, dtype=dtype, eos_ids=eos_ids)
    if run.rank == 0:
        write_json(out / "run.json", {**json.loads((out / "run.json").read_text()), "finished": True})
        shutil.rmtree(out / "checkpoint", ignore_errors=True)
        say(f"saved {out}")
    barrier()


# What does not decide a run's numbers. (Of files the content is compared, not the name; how a batch is cut
# changes sums in their last bits only.)
HARMLESS = ("out", "model", "base", "reference", "data", "eval_data", "default_lr", "device",
            "micro_batch_size", "micro_batch_tokens", "gradient_checkpointing", "compile", "shard",
            "checkpoint_every", "eval_every", "save_dtype", "restart", "debug")


def identity_of(args, objective, folder: Path, examples: list, held_out: list, variant: bool) -> dict:
    """What decides a run's numbers: settings, the content of the model's files and of the encoded rows. A
    continued run must have the same. variant: its loss may read any column of a row."""
    def content(examples: list) -> str:
        rows = hashlib.sha256()
        for example in examples:
            for side, (places, tokens) in zip(example.sides, example.predicted):
                rows.update(f"{len(side)} {len(tokens)} ".encode() + side.tobytes())
                rows.update(places.astype(np.int64).tobytes() + tokens.astype(np.int64).tobytes())
            if variant:
                rows.update(json.dumps(example.row, default=str, sort_keys=True).encode())
        return rows.hexdigest()

    settings = {name: value for name, value in vars(args).items() if name not in HARMLESS}
    identity = {**settings, "objective": name_of(objective),
                "model": fingerprint(folder, args.base),
                "data": content(examples), "eval_data": content(held_out),
                "reference": args.reference and fingerprint(resolve(args.reference))}
    return json.loads(json.dumps(identity, default=str))                # as run.json will give it back


def name_of(hook) -> str:
    return getattr(hook, "__qualname__", type(hook).__name__)


def check_out(out: Path, args):
    """Refuse a folder that this run may not or cannot write into; nothing is touched."""
    nearest = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise DataError(f"{nearest}: is a file; --out is a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise DataError(f"{nearest}: is not writable; choose another --out, or repair its permissions")
    of_a_model = [out / "config.json", out / "adapter_config.json", out / "metrics.jsonl", out / "checkpoint",
                  *out.glob("*.safetensors")]
    if not (out / "run.json").exists() and (found := next((p for p in of_a_model if p.exists()), None)):
        raise DataError(f"{out}: holds {found.name} and no run.json of an earlier run; choose another --out")
    for source, base in ((args.model, args.base), (args.reference, None)):
        if source and Path(source).is_dir() and out.exists():
            names = source, base_of(Path(source), base)
            if any(Path(name).exists() and out.samefile(name) for name in names):
                raise DataError(f"{out}: --model or --reference is read from it, or a base of theirs; choose "
                                "another --out")


def prepare_out(out: Path, args, identity: dict) -> bool:
    """Rank 0 makes the run's folder, or checks that it holds this very run. True if that is already
    complete."""
    checkpoint, removed = out / "checkpoint", out / "checkpoint.removed"
    shutil.rmtree(removed, ignore_errors=True)
    if args.restart and checkpoint.exists():
        os.replace(checkpoint, removed)     # in one go: half a checkpoint must not be taken for a whole one
        shutil.rmtree(removed)
    if (out / "run.json").exists() and not args.restart:
        with reading(out / "run.json"):
            run = json.loads((out / "run.json").read_text())
            before, finished = run["identity"], run["finished"]
        short = lambda value: value[:12] if isinstance(value, str) and len(value) == 64 else value
        changed = [f"{name}: {short(before.get(name))!r} then, {short(value)!r} now"
                   for name, value in identity.items() if before.get(name) != value]
        if changed:
            raise DataError(f"{out}: holds a run that was started differently ({'; '.join(changed)}); choose "
                            "another --out, or begin anew with --restart")
        if finished:
            shutil.rmtree(checkpoint, ignore_errors=True)
        return finished
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    write_json(out / "run.json", {
        "finished": False, "settings": settings, "identity": identity, "versions": versions,
        "processes": processes()[1], "command": [Path(sys.argv[0]).name, *sys.argv[1:]]})
    for name in ("metrics.jsonl", "eval.jsonl"):
        (out / name).unlink(missing_ok=True)
    return False


def check_vocabulary(examples: list, model: Llama, folder: Path):
    largest = max(int(part.max()) for example in examples for part in example.sides)
    if largest >= model.config.vocab_size:
        raise CheckpointError(f"{folder}: tokenizer.json gives token {largest}, config.json says vocab_size "
                              f"{model.config.vocab_size}: they do not belong together")


def check_reference(source: str, model: Llama, tokenizer: data.Tokenizer):
    """CheckpointError where --reference would give the same tokens another meaning."""
    if Llama.skeleton(source).config.vocab_size < model.config.vocab_size:
        raise CheckpointError(f"--reference {source}: its vocabulary is smaller than the model's "
                              f"({model.config.vocab_size})")
    if Llama.skeleton(source).file("tokenizer.json").is_file():
        theirs = data.Tokenizer.from_pretrained(resolve(source)).backend.get_vocab()
        for token, number in sorted(tokenizer.backend.get_vocab().items()):
            if theirs.get(token, number) != number:
                raise CheckpointError(f"--reference {source}: its tokenizer.json numbers tokens otherwise: "
                                      f"{token!r} is {theirs[token]}, the model's {number}")


# ----------------------------------------------------------------------------------------------------------
# processes: everything here is also right for one process without torchrun

def processes() -> tuple[int, int]:
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def say(*words):
    """Print, once for all processes."""
    if processes()[0] == 0:
        print(*words, flush=True)


def all_sum(x: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def barrier():
    if dist.is_initialized():
        dist.barrier()


def same_everywhere(what: str, value, device: torch.device):
    """Every rank must have read the same `what`, a JSON value: they compare the first 60 bits of its hash."""
    digest = hashlib.sha256(json.dumps(value).encode()).hexdigest()
    mine = torch.tensor([int(digest[:15], 16)], device=device)
    if dist.is_initialized():
        high, low = mine.clone(), mine.clone()
        dist.all_reduce(high, dist.ReduceOp.MAX)
        dist.all_reduce(low, dist.ReduceOp.MIN)
        if high != low:
            raise DataError(f"the processes do not read the same {what}: check that all machines see the "
                            "same files, and were given the same command")


def equal_passes(plan: list, rank: int) -> list[tuple[list[int], float]]:
    """plan[rank] as (micro-batch, 1.0), then a row with weight 0 for every micro-batch that the busiest rank
    has more: a pass of a sharded model, and the last backward pass of a replicated one, is made by all ranks
    together."""
    idle = max(map(len, plan)) - len(plan[rank])
    any_row = next(micro_batches for micro_batches in plan if micro_batches)[-1][-1:]
    return [(rows, 1.0) for rows in plan[rank]] + [(any_row, 0.0)] * idle


def load_policy(source, args, world: int, device: torch.device, base=None, trains: bool = True) -> Policy:
    """The policy of a checkpoint: whole on every process, or with --shard cut by rows over all of them
    (torch's FSDP2; ZeRO-3, Rajbhandari et al. 2020).

    Sharded, a process keeps 1/world of every weight, gradient and AdamW moment (16 bytes a parameter) and
    reads only that from the files. A block's weights are gathered when it is about to run, forward or
    backward, and dropped right after; gradients leave as a sum that is scattered the same way. What runs
    outside the blocks (embedding, last norm, lm_head) is the root's, so `Policy.forward` finds lm_head.weight
    whole.

    With --lora an adapter is trained, and the weights are frozen: in bf16 arithmetic they stay in the dtype
    in which they are stored (else fp32), and an adapter stays beside them."""
    model = Llama.skeleton(source, base)
    as_stored = args.lora and args.precision == "bf16"
    if args.lora and trains:
        adapt(model, args)
    elif as_stored and model.adapter:
        model.add_lora(*model.adapter.kind)
    policy = Policy(model)
    if args.shard and world > 1:
        # With --precision bf16 the weights are gathered in bf16: matrices would be cast by autocast anyway,
        # embedding and norms are rounded in sharded runs only. As in an unsharded run, the residual stream
        # stays fp32 (inputs are not cast, and what the embedding gives is cast back), and so do sums of
        # gradients.
        dtypes = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if args.precision == "bf16" else None,
                                      reduce_dtype=torch.float32, cast_forward_inputs=False)
        how = dict(mesh=init_device_mesh(device.type, (world,)), reshard_after_forward=True, mp_policy=dtypes)
        for block in policy.model.model.layers:
            fully_shard(block, **how)
        fully_shard(policy, **how)
    residual = lambda module, ids, x: x.to(torch.promote_types(x.dtype, torch.float32))
    model.model.embed_tokens.register_forward_hook(residual)         # whatever the embedding is stored in
    model.read_weights(None if as_stored else torch.float32, device, args.seed)
    if args.compile:        # attention is one kernel already, and around it every batch has another shape
        for block in policy.model.model.layers:
            for part in (block.input_layernorm, block.post_attention_layernorm, block.mlp):
                part.compile(dynamic=True)
    return policy


def adapt(model: Llama, args):
    """The skeleton of a policy under --lora: with a new adapter, or with the one that it came as, which is
    then trained on. (On top of a merged one, OUT would be an adapter of a model that is stored nowhere.)"""
    kind, theirs = (args.lora, args.lora_alpha, LORA_LAYERS), model.adapter
    if theirs is not None and theirs.kind != kind:
        raise CheckpointError(f"--model {args.model}: a LoRA adapter of rank {theirs.rank}, alpha "
                              f"{theirs.alpha:g}, on {' '.join(theirs.layers)}; --lora trains on with one of "
                              f"its own rank {args.lora} and alpha {args.lora_alpha:g} on all layers of a "
                              f"block: name its numbers, or merge it first (python model.py merge "
                              f"{args.model} --out FOLDER)")
    if args.lora > model.config.hidden_size:
        raise DataError(f"--lora {args.lora}: a rank above the model's hidden_size "
                        f"{model.config.hidden_size} has more to train than the weights: leave --lora out, "
                        "or lower it")
    model.add_lora(*kind)


# ----------------------------------------------------------------------------------------------------------
# checkpoints: what is needed to go on, in safetensors and JSON only

def write_json(path: Path, value):
    with written(path) as aside:
        aside.write_text(json.dumps(value, indent=2) + "\n")


def append(path: Path, record: dict):
    with writing(path), open(path, "a") as f:
        f.write(json.dumps(record) + "\n")


@contextmanager
def reading(path: Path):
    """What a run should have left and has not ends in one error that names the file."""
    try:
        yield
    except (OSError, SafetensorError, ValueError, TypeError, LookupError, RuntimeError) as e:
        raise CheckpointError(f"{path}: is damaged ({e}); begin anew with --restart") from e


def keep_lines(path: Path, below: int):
    """Drop the lines of steps that will be run again, and a last line that was cut off by a kill."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] < below:
                kept.append(line)
        except ValueError:
            pass
    with written(path) as aside:
        aside.write_text("".join(line + "\n" for line in kept))


# One format for all runs: a set of safetensors files, each with some rows of every tensor it names; in the
# order of the file names the rows add up to the tensor. A whole model is the case of one process. So a run
# may go on under another number of processes, sharded or not. (torch.distributed.checkpoint could do this as
# well, but keeps its table of contents as a pickle.)

def own_slice(t: torch.Tensor) -> torch.Tensor:
    """What this process holds of t, sharing memory."""
    return t.detach().to_local() if isinstance(t, DTensor) else t.detach()


def save_checkpoint(folder: Path, step: int, model: Llama, optimizer: torch.optim.Optimizer, rank: int):
    """checkpoint/step-N/{model,optimizer}-RANK-LAYER.safetensors, written under another name and renamed when
    complete; then the older ones go. Called by all processes; each writes what only it has. Small files, so
    that never more than one layer's share waits in CPU memory."""
    aside, final = folder / "writing", folder / f"step-{step:08d}"
    if rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
    barrier()
    files: dict[str, dict] = {}
    for k, p in trained(model).items():
        if rank == 0 or isinstance(p, DTensor):
            layer = k.split(".")[2] if k.startswith("model.layers.") else "rest"
            files.setdefault(f"model-{rank:05d}-{layer}", {})[k] = p
            moments = files.setdefault(f"optimizer-{rank:05d}-{layer}", {})
            for kind in ("exp_avg", "exp_avg_sq"):
                moments[f"{kind}.{k}"] = optimizer.state[p][kind]
    for name, tensors in files.items():
        with written(aside / f"{name}.safetensors") as path:
            save_file({k: own_slice(t).cpu().contiguous() for k, t in tensors.items()}, path)
    barrier()
    if rank == 0:
        for log in folder.parent.glob("*.jsonl"):
            sync(log)
        with writing(final):
            os.replace(aside, final)
        for old in folder.glob("step-*"):
            if old != final:
                shutil.rmtree(old)


def load_checkpoint(folder: Path, model: Llama, optimizer: torch.optim.Optimizer) -> int:
    """Restore the newest complete checkpoint, however many processes wrote it; returns the number of updates
    it holds, 0 if there is none."""
    found = sorted(folder.glob("step-[0-9]*"))
    if not found:
        return 0
    step = int(found[-1].name.removeprefix("step-"))
    pieces: dict[str, list] = {}                    # tensor -> its files in order, and how many rows each has
    for path in sorted(found[-1].glob("*.safetensors")):
        with reading(path), safe_open(path, framework="pt") as f:
            for key in f.keys():
                pieces.setdefault(key, []).append((path, f.get_slice(key).get_shape()[0]))

    def restore(key: str, t: torch.Tensor):
        (first, last), begin, here = own_rows(t), 0, own_slice(t)
        for path, rows in pieces.get(key, []):
            a, b = max(first, begin), min(last, begin + rows)
            if a < b:
                with reading(path), safe_open(path, framework="pt") as f:
                    here[a - first:b - first] = f.get_slice(key)[a - begin:b - begin].to(here.device)
            begin += rows
        if begin != len(t):
            raise CheckpointError(f"{found[-1]}: is damaged ({begin} of {len(t)} rows of {key}); begin anew "
                                  "with --restart")

    for k, p in trained(model).items():
        restore(k, p)
        moments = {kind: torch.zeros_like(p, requires_grad=False) for kind in ("exp_avg", "exp_avg_sq")}
        for kind, t in moments.items():
            restore(f"{kind}.{k}", t)
        optimizer.state[p] = {"step": torch.tensor(float(step), device=p.device), **moments}
    return step


# ----------------------------------------------------------------------------------------------------------
# command line

PREFERENCE = dict(lr=5e-7, epochs=8, batch_size=128, warmup=0.10, schedule="cosine", beta=0.4,
                  max_length=1024)
DEFAULTS = {        # the paper's settings for 7B models (appendix)
    "sft": dict(lr=5e-6, epochs=3, batch_size=256, warmup=0.03, schedule="linear", max_length=1024),
    "dpo": PREFERENCE, "stepdpo": PREFERENCE}
METHODS = {         # title, rows that it takes
    "sft": ("supervised fine-tuning on whole (chosen) answers",
            "rows with prompt, response; or with the columns of Math-Step-DPO-10K"),
    "dpo": ("DPO on whole answers, Eq. 1",
            "rows with the columns of Math-Step-DPO-10K; or prompt, chosen, rejected"),
    "stepdpo": ("Step-DPO on single steps, Eq. 2",
                "rows with prompt, initial_reason_steps, chosen, rejected")}


def parser(options=None, manual: str | None = None, defaults: dict | None = None) -> argparse.ArgumentParser:
    """The command line. A variant adds its `options`, its own text as `manual`, and the settings of its paper
    as `defaults`."""
    top = argparse.ArgumentParser(
        prog=f"python -m variants.{Path(sys.argv[0]).stem}" if manual else "stepdpo.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=manual or "Train a Llama / Qwen / Mistral checkpoint with SFT, DPO or Step-DPO.",
        epilog="One method's options: METHOD --help, as in: python stepdpo.py stepdpo --help")
    methods = top.add_subparsers(dest="method", required=True, metavar="{sft,dpo,stepdpo}")
    for method, (title, rows) in METHODS.items():
        about = (f"{title[0].upper()}{title[1:]}. Writes OUT as a Hugging Face checkpoint folder, or with "
                 "--lora as a PEFT adapter's. After any interruption (Ctrl-C, kill, power cut), run the same "
                 "command again.")
        own = DEFAULTS[method] | (defaults or {})
        add_options(methods.add_parser(method, help=title, description=about), method, rows, options, own)
    return top


def add_options(p: argparse.ArgumentParser, method: str, rows: str, options, d: dict):
    preference, papers = method != "sft", d == DEFAULTS[method]         # papers: not a variant's own settings
    group = p.add_argument_group("what")
    add = group.add_argument
    add("--model", required=True, metavar="FOLDER",
        help="checkpoint folder in Hugging Face layout, or a hub id; in DPO also the reference. A LoRA "
             "adapter's folder is one too: with --lora it is trained on, without it is merged first")
    add("--data", required=True, metavar="FILE", help=f".jsonl, .json, .parquet or a hub dataset id: {rows}")
    add("--out", required=True, metavar="OUT",
        help="folder for the trained checkpoint, metrics.jsonl and run.json")
    add("--prompt", default="chat", choices=data.PROMPT_STYLES,
        help="how a question becomes a prompt; chat (default): the checkpoint's own template; raw: the text "
             "as it stands")
    data.add_chat_options(group)
    add("--seed", type=int, default=0,
        help="of the order of the rows, and of a new --lora adapter (default 0)")
    add("--restart", action="store_true", help="begin anew where OUT holds an earlier run")

    add = p.add_argument_group("optimisation (defaults: the paper's, for 7B models)").add_argument
    larger = f"; the paper takes {4 if preference else 2} above 30B" if papers else ""
    add("--epochs", type=int, default=d["epochs"], help=f"default {d['epochs']}{larger}")
    add("--batch_size", type=int, default=d["batch_size"],
        help=f"rows an update, over all processes (default {d['batch_size']})")
    add("--group_by_prompt", action="store_true",
        help="shuffle problems instead of rows, so that rows of one problem meet in an update and share more "
             "of their computation; such batches are more correlated than shuffled rows")
    add("--lora", type=int, metavar="R",
        help="train a LoRA adapter of rank R beside all linear layers of the blocks, and nothing else: the "
             "weights are frozen, and take 2 bytes each where --precision and the checkpoint are bf16, else "
             "4. OUT is the adapter, as PEFT has it; python model.py merge makes a checkpoint of it")
    add("--lora_alpha", type=float, metavar="A",
        help="the adapter counts A / R times (default 2 R, as in LLaMA-Factory, and in TRL with its 32 for "
             "rank 16; PEFT by itself takes 8, whatever R)")
    add("--lr", type=float,
        help=f"peak learning rate of AdamW (default {d['lr']:g}; with --lora ten times that, "
             f"{10 * d['lr']:g})")
    p.set_defaults(default_lr=d["lr"])
    add("--warmup", type=float, default=d["warmup"],
        help=f"share of the updates in which lr rises (default {d['warmup']:g})")
    add("--schedule", choices=("linear", "cosine", "constant"), default=d["schedule"],
        help=f"how lr falls afterwards (default {d['schedule']})")
    add("--clip", type=float, default=1.0,
        help="largest gradient norm (default 1.0: the trainer of the authors' code; the paper does not say)")
    add("--max_steps", type=int, help="end after so many updates (the schedule then ends there too)")
    if preference:
        larger = "; the paper takes 0.5 for 72B" if papers else ""
        add("--beta", type=float, default=d["beta"],
            help=f"weight of the log-ratio (default {d['beta']:g}{larger})")
        add("--reference", metavar="FOLDER",
            help="another checkpoint as reference; by default it is the policy at step 0")
    else:
        p.set_defaults(beta=None, reference=None)

    add = p.add_argument_group("size and speed").add_argument
    add("--max_length", type=int, default=d["max_length"],
        help="tokens of prompt and answer; longer rows are dropped, never cut (default "
             f"{d['max_length']}: the paper's)")
    add("--micro_batch_size", type=int,
        help="most rows in one forward pass of a process (default: as many as --micro_batch_tokens takes)")
    add("--micro_batch_tokens", type=int, default=8192,
        help="most tokens in one forward pass of a process, a longer row apart (default 8192)")
    add("--precision", choices=("fp32", "bf16"),
        help="of the arithmetic; what is trained is fp32 either way (default bf16 on CUDA, fp32 on CPU)")
    add("--gradient_checkpointing", action="store_true",
        help="recompute activations in the backward pass: a third more time, far less memory")
    add("--compile", action="store_true",
        help="torch.compile the blocks' norms and MLPs: on a CPU 2 %% (fp32) to 8 %% (bf16) faster after "
             "half a minute of compiling with a C++ compiler; not measured on a GPU")
    add("--shard", action="store_true",
        help="spread weights, gradients and AdamW's moments over all processes (FSDP): for models beyond one "
             "GPU's memory, 16 bytes a parameter; on one process it changes nothing")
    add("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")

    add = p.add_argument_group("bookkeeping").add_argument
    add("--checkpoint_every", type=int, default=100, metavar="STEPS",
        help="how often to save what is needed to continue (default 100; 0: never)")
    add("--save_dtype", choices=("fp32", "bf16"), default="fp32",
        help="of the weights in OUT (default fp32, as trained; bf16 halves the files)")
    add("--eval_data", metavar="FILE",
        help="held-out rows, scored at the end; with --eval_every also before training and on the way")
    add("--eval_every", type=int, default=0, metavar="STEPS", help="default 0: only at the end")
    add("--debug", action="store_true", help="show the traceback of an error")
    if options is not None:
        options(p.add_argument_group("of this variant"))


def settle(args):
    """Fill in what depends on the machine; DataError where a number cannot be meant."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        args.restart = False            # torchrun --max-restarts started us again: go on
    if args.precision is None:
        on_gpu = torch.cuda.is_available() and not (args.device or "").startswith("cpu")
        args.precision = "bf16" if on_gpu else "fp32"
    if args.lr is None:                 # ten times: "LoRA Without Regret" (Thinking Machines 2025)
        args.lr = args.default_lr * (10 if args.lora else 1)
    if args.lora_alpha is None and args.lora:
        args.lora_alpha = 2.0 * args.lora
    above_0 = ("epochs", "batch_size", "lr", "lora", "lora_alpha", "beta", "micro_batch_size",
               "micro_batch_tokens", "max_length", "max_steps", "clip")
    for name in above_0:
        value = getattr(args, name)
        finite = value is None or math.isfinite(value) or name == "clip"            # --clip inf: no clipping
        if value is not None and not (value > 0 and finite):
            raise DataError(f"--{name} is {value}: expected a number above 0")
    for name in ("eval_every", "checkpoint_every", "seed"):
        if getattr(args, name) < 0:
            raise DataError(f"--{name} is {getattr(args, name)}: expected 0 or more")
    if args.lora_alpha is not None and args.lora is None:
        raise DataError(f"--lora_alpha {args.lora_alpha:g}: is the weight of a LoRA adapter; give its rank "
                        "with --lora R, or leave it out")
    if not 0 <= args.warmup <= 1:
        raise DataError(f"--warmup is {args.warmup}: expected a share from 0 to 1")


def main(argv: list[str] | None = None, objective=None, *, options=None, encode=data.encode_dataset,
         order=None, before_update=None, defaults: dict | None = None) -> int:
    """The command line; returns the exit status. A variant is a call of this with any of

    objective   (token_logps, ref_token_logps, batch, args) -> losses, metrics: see `preference_objective`.
                The losses of all micro-batches are added and divided by the sum of the examples' `units`.
    options     (group): adds the variant's own flags with group.add_argument. They are in --help, in `args`,
                and among what a continued run must have the same.
    encode      (source, tokenizer, method, prompt style, max_length) -> (examples, report): other rows.
    order       (epoch, examples, score) -> row indices, each once: in which order an epoch takes the rows.
                score() gives (n, K) log-probs under the policy as it then is.
    before_update (examples, score): called before every update, with the whole global batch, for numbers that
                no micro-batch knows. score(examples) gives (n, K) log-probs under the policy.
    defaults    other defaults of lr, epochs, batch_size, warmup, schedule, beta or max_length."""
    manual = None
    if objective is not None or options is not None or encode is not data.encode_dataset or order is not None:
        own = next(hook for hook in (objective, options, order, encode) if hook is not None)
        manual = inspect.getdoc(inspect.getmodule(own)) or "a variant of stepdpo.py"
    args = parser(options, manual, defaults).parse_args(argv)

    def run() -> int:
        settle(args)
        try:
            return train(args, objective or OBJECTIVES[args.method], encode, order, before_update)
        except RuntimeError as e:
            if args.compile and "Inductor" in type(e).__name__ and not args.debug:
                raise DataError(f"--compile: torch.compile fails here ({str(e).splitlines()[0]}); leave it "
                                "out, or see more with --debug") from e
            raise
    return data.run_command(run, args.debug)


if __name__ == "__main__":
    sys.exit(leave_processes(main()))
