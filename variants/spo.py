"""SPO, step-aware preference optimisation for diffusion models (Liang et al., arXiv 2406.04314, CVPR 2025).

    L = -log sigmoid( beta [ log p/ref (x_w | x_t, c) - log p/ref (x_l | x_t, c) ] )              Eq. 4-5

Step-DPO's idea for images: x_w and x_l are two candidates for x_{t-1}, drawn from one and the same x_t, so a
pair says what this one denoising step did well or badly, not what the whole picture is like. p is the density
of one step of stochastic DDIM, ref the network before training, c the prompt. A round of training:

 1. The sampler's first steps as usual. Then, at every step, K candidates from a shared x_t (`sample_pairs`).
 2. A preference model that knows t scores each candidate's predicted x_0: the one that the NEXT network call
    gives, with that call's timestep (`choose_pair`: best against worst).
 3. Go on from a candidate drawn uniformly, so that the next x_t is a fair sample of the policy.
 4. Updates on the pairs, each used once; then a fresh round under the new policy.

Two losses, by name. `paper`: as above; the log-density is a SUM over the dimensions of a latent, and no pair
is left out. `released`: what the authors' code computes; the MEAN over dimensions, each side's ratio clipped
to 1 +- eps, pairs kept where the softmax of the two scores differs by more than a threshold. A beta of 10
there weighs a step like 10 / dimensions in `paper`. The loss begins at log 2 = 0.693, and with the mean it
stays near there for long (users took that for a fault): watch `score`, the preference score of fresh samples.

What is whose, and how sure. The loss, K, best against worst, uniform continuation: the paper's text. Clip,
threshold, mean, beta 10, learning rates: the released code, run; with --pipeline they are the defaults. The
embedded task, its networks and its settings are ours: drawn shapes of 16 x 16 pixels, whose reward has a
layout part (how high the shape stands) and a detail part (the contrast of its stripes), measured exactly.

    python -m variants.spo --out OUT                                     embedded, minutes on one CPU core
    python -m variants.spo --out OUT --pipeline FOLDER --prompts prompts.txt --scorer my_scorer:score
    torchrun --nproc_per_node 8 -m variants.spo --out OUT --pipeline FOLDER --prompts ... --scorer ...

Shapes: B trajectories (each with its prompt), K candidates, M judged steps of a trajectory, S sides that have
an x_t of their own (1: it is shared, or 2), N pairs, *D the shape of a latent. """
import argparse
import copy
import hashlib
import importlib
import json
import math
import os
import shutil
import signal
import struct
import sys
import time
import zlib
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import stepdpo
from data import DataError, run_command
from model import (CheckpointError, choose_device, fingerprint, join_processes, keep_freed_memory,
                   leave_processes, locked, read_json, sync, writing, written)
from stepdpo import all_sum, barrier, dpo_loss, learning_rate, say


# ----------------------------------------------------------------------------------------------------------
# one step of the sampler, and its density

def ddim_step(x_t, output, alpha_bar, alpha_bar_prev, eta=1.0, predicts="epsilon"):
    """One step of stochastic DDIM (Song et al. 2021, Eq. 12 and 16): x_{t-1} ~ Normal(mean, sigma^2). Returns
    (the predicted x_0, mean, sigma).

    x_t and the network's output (..., *D); alpha_bar of t and of the next timestep broadcast over them. With
    eta = 0 sigma would be 0 and there would be no density: SPO needs eta > 0."""
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()                # x_t = signal x_0 + noise epsilon
    if predicts == "epsilon":
        x_0, epsilon = (x_t - noise * output) / signal, output
    elif predicts == "v_prediction":
        x_0, epsilon = signal * x_t - noise * output, signal * output + noise * x_t
    elif predicts == "sample":
        x_0, epsilon = output, (x_t - signal * output) / noise
    else:
        raise DataError(f"prediction_type {predicts!r}: expected epsilon, v_prediction or sample")
    sigma = eta * ((1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)).sqrt()
    mean = alpha_bar_prev.sqrt() * x_0 + (1 - alpha_bar_prev - sigma**2).sqrt() * epsilon
    return x_0, mean, sigma


def log_density(x, mean, sigma):
    """log Normal(x; mean, sigma^2), SUMMED over the dimensions of a latent: (N, *D) -> (N,), in nats. sigma
    broadcasts."""
    z = (x - mean) / sigma
    return (-0.5 * z**2 - sigma.log() - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)


@dataclass
class Sampler:
    """Which timesteps are taken, and how much of the picture is left at each."""
    alpha_bar: torch.Tensor             # (T,): share of signal in x_t, by timestep
    timesteps: list[int]                # falling
    eta: float = 1.0
    predicts: str = "epsilon"

    def step(self, x_t, output, t):
        """`ddim_step` at t (an int, or (N,) int64 for x_t (N, ..., *D)).

        The timestep after the last is clamped to 0 and not to "no noise left": so its sigma stays above 0."""
        t = torch.as_tensor(t, device=x_t.device)
        t = t.view(*t.shape, *[1] * (x_t.ndim - t.ndim))
        after = (t - len(self.alpha_bar) // len(self.timesteps)).clamp(min=0)
        return ddim_step(x_t, output, self.alpha_bar[t], self.alpha_bar[after], self.eta, self.predicts)


# ----------------------------------------------------------------------------------------------------------
# the losses

def paper_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """Eq. 4-5 of the paper. All tensors (N,): log-densities of x_{t-1} given x_t, SUMS over the dimensions.
    Returns (losses (N,), metrics, each (N,)). beta is per nat of a whole step, as in DPO."""
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    return losses, metrics_of(chosen_rewards, rejected_rewards, torch.zeros_like(losses))


def released_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta,
                  eps=0.1):
    """The authors' code. All tensors (N,): log-densities, MEANS over the dimensions. beta is per nat of one
    dimension, on average: with D dimensions beta here is D times what it is in `paper_loss`.

    The ratio of policy and reference is clipped to 1 +- eps, and a clipped side has no gradient. So the loss
    never falls below log(1 + ((1 - eps) / (1 + eps))^beta): 0.126 at beta 10, eps 0.1. And a pair that is
    ranked wrong beyond the band costs 2.13 and teaches nothing: watch `clipped`, the share of such sides."""
    chosen_ratio = (policy_chosen_logps - ref_chosen_logps).exp()
    rejected_ratio = (policy_rejected_logps - ref_rejected_logps).exp()
    clipped = sum(((ratio - 1).abs() > eps).to(ratio.dtype) / 2 for ratio in (chosen_ratio, rejected_ratio))
    chosen_rewards = beta * chosen_ratio.clamp(1 - eps, 1 + eps).log()
    rejected_rewards = beta * rejected_ratio.clamp(1 - eps, 1 + eps).log()
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return losses, metrics_of(chosen_rewards, rejected_rewards, clipped)


def metrics_of(chosen_rewards, rejected_rewards, clipped):
    margin = chosen_rewards - rejected_rewards
    return {"accuracy": (margin > 0).to(margin.dtype), "margin": margin, "chosen_reward": chosen_rewards,
            "rejected_reward": rejected_rewards, "clipped": clipped}


METRICS = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "clipped")


# ----------------------------------------------------------------------------------------------------------
# pairs

def choose_pair(scores, threshold):
    """Best against worst: scores (K, B) -> (win (B,), lose (B,), kept (B,) bool).

    Kept where the softmax of these two scores alone differs by more than `threshold`: 0.3 is a difference of
    0.62 in score. 0, the paper's, leaves out ties only."""
    ranked, which = scores.sort(dim=0, descending=True, stable=True)
    best, worst = ranked[[0, -1]].softmax(0)
    return which[0], which[-1], best - worst > threshold


class Noise(NamedTuple):
    """All that is random in a round of sampling."""
    start: torch.Tensor         # (B, *D)
    steps: list[torch.Tensor]   # of each step: (1, B, *D) before the candidates part, (K, B, *D) from there
    go_on: torch.Tensor         # (comparisons, B): candidates drawn uniformly


class Pairs(NamedTuple):
    """What a round of sampling leaves: M steps of B trajectories, each with a chosen (0) and a rejected side
    (1)."""
    t: torch.Tensor             # (M,) int64
    x_t: torch.Tensor           # (M, B, S, *D)
    x_prev: torch.Tensor        # (M, B, 2, *D): the two x_{t-1}
    kept: torch.Tensor          # (M, B) bool
    scores: torch.Tensor        # (comparisons, K, B), of all candidates


def uniform(drawn, win, lose):
    """Which candidate a trajectory goes on from, (B,). The paper's ablation: from the winner is worst."""
    return drawn


@torch.no_grad()
def sample_pairs(denoise: Callable, score: Callable, sampler: Sampler, noise: Noise, *, first_steps: int,
                 inner_steps: int = 1, threshold: float = 0.0, go_on: Callable = uniform) -> Pairs:
    """One round of sampling. denoise(x (k, B, *D), t) gives the network's output, score(x_0 (K, B, *D), t)
    the preference scores (K, B). Candidates part after `first_steps`, and are compared every `inner_steps`.

        steps            i = 0 .. first_steps - 1 |  first_steps  ...
        x_t, shape (k, B, *D)         k = 1       |  k = 1, + noise (K, B, *D)  ->  K candidates
        next network call                         |  k = K: their x_0, scores, the pair; one of them goes on
    """
    x, path, done, all_scores = noise.start[None], [], [], []

    def compare(x_0, t):
        scores = score(x_0, t)
        win, lose, kept = choose_pair(scores, threshold)
        all_scores.append(scores)
        for at, before, after in path:                              # the steps since the last comparison
            sides = [win] if inner_steps == 1 else [win, lose]      # x_t is shared, or each has its own
            x_t = torch.stack([pick(before, side) for side in sides], 1)
            done.append((at, x_t, torch.stack([pick(after, win), pick(after, lose)], 1), kept))
        path.clear()
        return win, lose

    for i, t in enumerate(sampler.timesteps):
        output = denoise(x, t)
        if i > first_steps and (i - first_steps) % inner_steps == 0:
            win, lose = compare(sampler.step(x, output, t)[0], t)
            chosen = go_on(noise.go_on[len(all_scores) - 1], win, lose)
            x, output = pick(x, chosen)[None], pick(output, chosen)[None]
        _, mean, sigma = sampler.step(x, output, t)
        following = mean + sigma * noise.steps[i]                   # (1, B, *D) + (K, B, *D): candidates
        if i >= first_steps:
            path.append((t, x.expand_as(following), following))
        x = following
    compare(x, 0)                                                   # the last candidates are pictures
    at, x_t, x_prev, kept = zip(*done)
    return Pairs(torch.tensor(at, device=x.device), torch.stack(x_t), torch.stack(x_prev), torch.stack(kept),
                 torch.stack(all_scores))


def pick(x, which):
    """(K, B, *D), (B,) -> (B, *D): of each trajectory one candidate."""
    return x[which, torch.arange(x.shape[1], device=x.device)]


def generator_of(*key) -> torch.Generator:
    """A stream of random numbers of its own for every key, on the CPU: the same on any device."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def draw_noise(key: tuple, trajectories, shape: tuple, device, *, steps: int, first_steps: int,
               inner_steps: int, candidates: int) -> Noise:
    """A trajectory's noise is a function of (key, its number in the round): however many processes share the
    round, they draw the same."""
    comparisons = math.ceil((steps - first_steps) / inner_steps)
    start, sequence, go_on = [], [], []
    for trajectory in trajectories:
        g = generator_of(*key, trajectory)
        start.append(torch.randn(shape, generator=g))
        sequence.append([torch.randn(1 if i < first_steps else candidates, *shape, generator=g)
                         for i in range(steps)])
        go_on.append(torch.randint(candidates, (comparisons,), generator=g))
    return Noise(torch.stack(start).to(device), [torch.stack(z, 1).to(device) for z in zip(*sequence)],
                 torch.stack(go_on, 1).to(device))


# ----------------------------------------------------------------------------------------------------------
# the step-aware preference model

def preference_loss(winner_scores, loser_scores, pairs_of_prompt):
    """Of the preference model, all (N,): cross-entropy of the softmax over the two scores. As in the authors'
    code, a prompt with several pairs counts once: each is weighted by 1 / their number."""
    weights = 1 / pairs_of_prompt
    return (-F.logsigmoid(winner_scores - loser_scores) * weights).sum() / weights.sum()


@torch.no_grad()
def as_seen_at(images, t, noise, predict, sampler: Sampler):
    """What the preference model is trained on: the x_0 (N, *D) that the diffusion model predicts in one step
    for `images` (N, *D) with noise added. Both sides of a pair get the same t and the same noise, so what
    differs is what the pictures differ in, as far as it can be seen at t."""
    alpha_bar = sampler.alpha_bar[t].view(-1, *[1] * (images.ndim - 1))
    x_t = alpha_bar.sqrt() * images + (1 - alpha_bar).sqrt() * noise
    return sampler.step(x_t, predict(x_t, t), t)[0]


# ----------------------------------------------------------------------------------------------------------
# the loop

def train(args, task, out: Path, *, collect: Callable = sample_pairs, watch: Callable | None = None) -> int:
    """Train task.policy in `out`; returns the exit status. A task is an object like `Shapes` or `Pipeline`:
    networks, sampler, prompts and scorer. collect: another way to make a round's pairs. watch(round): called
    before each round and after the last."""
    rank, world = stepdpo.processes()
    trained = Trained(task.policy)
    parameters = [p for _, p in trained.named_parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay)
    done, updates = restore(out, trained, optimizer)
    count = sum(p.numel() for p in parameters)
    continued = f"; continuing after round {done - 1}" if done else ""
    say(f"SPO ({args.loss} loss): {count:,} trained parameters on {world} x {task.device.type}; "
        f"{args.rounds} rounds of {args.prompts_per_round} prompts, {args.candidates} candidates a step, "
        f"{args.batch_size} pairs an update; lr {args.lr:g}, beta {args.beta:g}{continued}")
    screen = Screen(args.rounds, done)
    with stepdpo.StopSignal() as stop:
        for round in range(done, args.rounds):
            if watch is not None:
                watch(round)
            begun = time.perf_counter()

            # ---- fresh pairs under the policy as it is now
            mine = list(range(rank, args.prompts_per_round, world))
            rows = [prompt_of(args.seed, round * args.prompts_per_round + i, task.prompts) for i in mine]
            rows = torch.tensor(rows, device=task.device)
            pairs = collect_pairs(args, task, round, mine, rows, collect)
            batches, kept = shuffled(args, round, mine, pairs)

            # ---- updates: every pair once
            lr = learning_rate(round, args.rounds, args.lr, args.warmup, args.schedule)
            for group in optimizer.param_groups:
                group["lr"] = lr
            sums, norms = torch.zeros(len(METRICS), dtype=torch.float64, device=task.device), []
            for batch in batches:
                sums += backward(args, task, pairs, batch, rows, parameters)
                norms.append(float(nn.utils.clip_grad_norm_(parameters, args.clip)))
                if not math.isfinite(norms[-1]):
                    raise FloatingPointError(f"round {round}: gradient norm {norms[-1]}; this update was not "
                                             "made. Lower --lr or --beta, or use --precision fp32")
                optimizer.step()
            updates += len(batches)

            # ---- say it, keep it
            signalled = all_sum(torch.tensor(float(stop.number), device=task.device)) > 0
            found, totals = sum(map(len, batches)), all_sum(sums).tolist()
            score, score_sd = mean_and_sd(pairs.scores, args.prompts_per_round)
            record = {"step": round, "updates": updates, "score": score, "score_sd": score_sd, "pairs": found,
                      "kept": kept}
            record |= {name: total / found if found else None for name, total in zip(METRICS, totals)}
            record |= {"grad_norm": sum(norms) / len(norms) if norms else None, "lr": lr,
                       "seconds": time.perf_counter() - begun}
            if rank == 0:
                stepdpo.append(out / "metrics.jsonl", record)
            screen.show(record)
            due = args.checkpoint_every and (round + 1) % args.checkpoint_every == 0
            if round + 1 < args.rounds and (signalled or due):
                if updates:                         # before the first update there is nothing to keep
                    stepdpo.save_checkpoint(out / "checkpoint", round + 1, trained, optimizer, rank)
                if signalled:
                    say(f"stopped after round {round}; the same command continues from here")
                    return 128 + (stop.number or signal.SIGTERM)
    if watch is not None:
        watch(args.rounds)
    return 0


def collect_pairs(args, task, round: int, mine: list[int], rows, collect: Callable) -> Pairs:
    """This process's share of a round: trajectories `mine`, with prompts `rows` (B,)."""
    def denoise(x, t):                                              # (k, B, *D) -> (k, B, *D)
        times = torch.full((x.shape[0] * x.shape[1],), t, device=task.device)
        predict = lambda *part: task.predict(task.policy, *part)
        return in_parts(predict, args, x.flatten(0, 1), times, rows.repeat(len(x))).view_as(x)

    def score(x_0, t):                                              # (K, B, *D) -> (K, B)
        scorer = lambda *part: task.score(*part, t)
        return in_parts(scorer, args, x_0.flatten(0, 1), rows.repeat(len(x_0))).view(x_0.shape[:2])

    how = dict(first_steps=args.first_steps, inner_steps=args.inner_steps)
    noise = draw_noise((args.seed, round), mine, task.shape, task.device, steps=args.steps,
                       candidates=args.candidates, **how)
    pairs = collect(denoise, score, task.sampler, noise, threshold=args.threshold, **how)
    if not pairs.scores.isfinite().all():
        raise FloatingPointError(f"round {round}: the preference scores are not all numbers")
    return pairs


def shuffled(args, round: int, mine: list[int], pairs: Pairs) -> tuple[list[torch.Tensor], float]:
    """(the batches of a round, (n, 2) each: step and trajectory of its pairs; the share that was kept). The
    same on every process, whichever of them holds a pair. Batches are equal but for one pair: a short one
    would be a full step on few pairs."""
    kept = torch.zeros(len(pairs.t), args.prompts_per_round, device=pairs.kept.device)
    kept[:, mine] = pairs.kept.to(kept.dtype)
    found = all_sum(kept).nonzero()                                 # (N, 2)
    order = torch.randperm(len(found), generator=generator_of(args.seed, round, "order")).to(found.device)
    batches = found[order].tensor_split(math.ceil(len(found) / args.batch_size)) if len(found) else []
    return list(batches), len(found) / kept.numel()


def backward(args, task, pairs: Pairs, batch, rows, parameters: list) -> torch.Tensor:
    """The gradient of the mean loss over `batch` (n, 2), in every process; the sums of METRICS over the pairs
    of this one."""
    rank, world = stepdpo.processes()
    sums = torch.zeros(len(METRICS), dtype=torch.float64, device=task.device)
    for p in parameters:
        p.grad = torch.zeros_like(p)                                # a process may hold none of the pairs
    own = batch[batch[:, 1] % world == rank]
    for part in own.split(args.micro_batch_size) if len(own) else ():
        losses, metrics = losses_of(args, task, pairs, part[:, 0], part[:, 1] // world, rows)
        (losses.sum() / len(batch)).backward()
        sums += torch.stack([value.detach().double().sum() for value in (losses, *metrics.values())])
    for p in parameters:
        all_sum(p.grad)
    return sums


def mean_and_sd(scores, prompts: int) -> tuple[float, float]:
    """Of the scores (comparisons, K, B) of all processes, which share `prompts` trajectories."""
    scores, count = scores.double(), scores[:, :, 0].numel() * prompts
    total, squares = all_sum(torch.stack([scores.sum(), scores.square().sum()])).tolist()
    return total / count, max(0.0, squares / count - (total / count)**2)**0.5


def losses_of(args, task, pairs: Pairs, at, which, rows):
    """(losses, metrics), each (n,), of the pairs that steps `at` (n,) of trajectories `which` (n,) left.
    Where the two sides share x_t, one network call gives the mean and sigma of both."""
    t = pairs.t[at]                                                                 # (n,)
    x_t, x_prev = pairs.x_t[at, which], pairs.x_prev[at, which]                     # (n, S, *D), (n, 2, *D)
    sides = x_t.shape[1]
    times, prompts = t.repeat_interleave(sides), rows[which].repeat_interleave(sides)

    def step_logps(network):                                                        # -> (2, n)
        output = task.predict(network, x_t.flatten(0, 1), times, prompts).view_as(x_t)
        _, mean, sigma = task.sampler.step(x_t, output, t)
        mean, sigma = (v.expand(-1, 2, *v.shape[2:]).flatten(0, 1) for v in (mean, sigma))
        return log_density(x_prev.flatten(0, 1), mean, sigma).view(-1, 2).T

    with torch.no_grad():
        ref_logps = step_logps(task.reference)
    policy_logps = step_logps(task.policy)
    if args.loss == "paper":
        return paper_loss(*policy_logps, *ref_logps, args.beta)
    dimensions = x_prev[0, 0].numel()
    return released_loss(*policy_logps / dimensions, *ref_logps / dimensions, args.beta, args.eps)


def in_parts(function, args, *tensors):
    """function, without gradient, on --micro_batch_size rows of the tensors at a time."""
    parts = zip(*(t.split(args.micro_batch_size) for t in tensors))
    with torch.no_grad():
        return torch.cat([function(*part) for part in parts])


def prompt_of(seed: int, place: int, prompts: int) -> int:
    """Which of the prompts comes at a place of the endless sequence: they are shuffled anew each time all
    have had their turn."""
    turn, at = divmod(place, prompts)
    return int(torch.randperm(prompts, generator=generator_of(seed, turn, "prompts"))[at])


class Trained:
    """What of a network is trained, for `stepdpo.save_checkpoint`."""

    def __init__(self, network: nn.Module):
        self.network = network

    def named_parameters(self):
        return [(name, p) for name, p in self.network.named_parameters() if p.requires_grad]


def restore(out: Path, trained: Trained, optimizer) -> tuple[int, int]:
    """(rounds, updates) that the newest checkpoint holds."""
    done = stepdpo.load_checkpoint(out / "checkpoint", trained, optimizer)
    if stepdpo.processes()[0] == 0:
        stepdpo.keep_lines(out / "metrics.jsonl", done)
    barrier()
    if done == 0:
        return 0, 0
    with stepdpo.reading(out / "metrics.jsonl"):
        updates = json.loads((out / "metrics.jsonl").read_text().splitlines()[done - 1])["updates"]
    for _, p in trained.named_parameters():             # AdamW counts updates, a checkpoint rounds
        optimizer.state[p]["step"].fill_(updates)
    return done, updates


class Screen:
    """A line a round in short runs, one every 5 seconds in long ones."""
    COLUMNS = {"step": ("round", "d"), "updates": ("updates", "d"), "score": ("score", ".4f"),
               "pairs": ("pairs", "d"), "kept": ("kept", ".1%"), "loss": ("loss", ".4f"),
               "accuracy": ("accuracy", ".1%"), "margin": ("margin", ".4f"), "clipped": ("clipped", ".1%"),
               "grad_norm": ("grad norm", ".3g"), "lr": ("lr", ".2e")}

    def __init__(self, total: int, done: int):
        self.total, self.done, self.begun, self.spoke = total, done, time.perf_counter(), -math.inf

    def show(self, record: dict):
        now, step = time.perf_counter(), record["step"]
        if self.total > 30 and step not in (self.done, self.total - 1) and now - self.spoke < 5:
            return
        if self.spoke == -math.inf:
            say("".join(f"{title:>10}" for title, _ in self.COLUMNS.values()) + "  time left")
        self.spoke = now
        cells = ["-" if record[name] is None else format(record[name], form)
                 for name, (_, form) in self.COLUMNS.items()]
        left = (now - self.begun) / (step + 1 - self.done) * (self.total - step - 1)
        say("".join(f"{cell:>10}" for cell in cells) + f"  {timedelta(seconds=round(left))}")


# ----------------------------------------------------------------------------------------------------------
# the embedded task: drawn shapes, and a reward that can be measured exactly

SIZE, KINDS = 16, ("disc", "square", "diamond")


def draw_shapes(kinds, g: torch.Generator):
    """One picture for each of `kinds` (N,): (N, 3, 16, 16) in [-1, 1]. A shape stands in one of four
    quarters, has any hue, and is striped: every other column is darker by a share that is drawn too."""
    n = len(kinds)
    quarter = torch.randint(2, (n, 2), generator=g)
    y, x = (4 + 7 * quarter + 2 * torch.rand(n, 2, generator=g) - 1).T                      # its centre
    hue, contrast = torch.rand(n, generator=g), torch.rand(n, generator=g)
    columns = torch.arange(SIZE)
    dy, dx = (columns - y[:, None]).abs()[:, :, None], (columns - x[:, None]).abs()[:, None]
    distance = torch.stack([(dx**2 + dy**2).sqrt(), torch.maximum(dx, dy) + 0.4, 0.8 * (dx + dy)], 1)
    inside = (3.5 - distance[torch.arange(n), kinds]).clamp(0, 1)                           # (N, 16, 16)
    inside = inside * (1 - contrast[:, None, None] * (columns % 2))
    rgb = 0.5 + 0.5 * torch.cos(2 * math.pi * (hue[:, None] - torch.arange(3) / 3))         # sums to 1.5
    return 2 * inside[:, None] * rgb[:, :, None, None] - 1


def brightness(pictures):
    """(N, 3, 16, 16) in [-1, 1] -> (N, 16, 16) from 0."""
    return ((pictures + 1) / 2).mean(1).clamp(min=0)


def layout(pictures):
    """(N,) in [0, 1]: how high the shape stands; 1 in the upper quarters, 0 in the lower."""
    light = (brightness(pictures) - 0.05).clamp(min=0)
    y = (light.sum(2) * torch.arange(SIZE, device=light.device)).sum(1) / (light.sum((1, 2)) + 1e-3)
    return ((11 - y) / 7).clamp(0, 1)


def detail(pictures):
    """(N,) in [0, 1]: contrast of the stripes, (bright - dark) / (bright + dark) columns."""
    light = brightness(pictures)
    bright, dark = light[:, :, 0::2].sum((1, 2)), light[:, :, 1::2].sum((1, 2))
    return ((bright - dark) / (bright + dark + 1)).clamp(min=0)


class Block(nn.Module):
    """Two convolutions, between them a norm whose scale and shift depend on (t, kind): adaptive, and at first
    the identity, as in the authors' preference model."""

    def __init__(self, channels: int, out: int, width: int):
        super().__init__()
        self.norm_in, self.conv_in = nn.GroupNorm(8, channels), nn.Conv2d(channels, out, 3, padding=1)
        self.norm_out, self.conv_out = nn.GroupNorm(8, out), nn.Conv2d(out, out, 3, padding=1)
        self.adapt = nn.Linear(width, 2 * out)
        self.skip = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()
        nn.init.zeros_(self.adapt.weight)
        nn.init.zeros_(self.adapt.bias)

    def forward(self, x, condition):
        h = self.conv_in(F.silu(self.norm_in(x)))
        scale, shift = self.adapt(condition)[:, :, None, None].chunk(2, 1)
        return self.skip(x) + self.conv_out(F.silu(self.norm_out(h) * (1 + scale) + shift))


class Condition(nn.Module):
    """(t, kind) -> (N, width). blind: t is not told (the control of the experiment)."""

    def __init__(self, width: int, blind: bool = False):
        super().__init__()
        self.blind, self.kind = blind, nn.Embedding(len(KINDS), width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        frequencies = torch.exp(-math.log(1e4) * torch.arange(width // 2) / (width // 2))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, t, kinds):
        angles = (t * (not self.blind)).float()[:, None] * self.frequencies
        return F.silu(self.time(torch.cat([angles.cos(), angles.sin()], 1)) + self.kind(kinds))


class Denoiser(nn.Module):
    """(x_t, t, kind) -> the noise in x_t, (N, 3, 16, 16). A small U-Net over squares of 2 x 2 pixels."""

    def __init__(self, channels: int = 32, width: int = 64):
        super().__init__()
        self.condition = Condition(width)
        self.inner = nn.ModuleList([Block(channels, channels, width), Block(channels, channels, width)])
        self.first, self.down = nn.Conv2d(12, channels, 3, padding=1), Block(channels, channels, width)
        self.shrink, self.up = nn.Conv2d(channels, channels, 3, 2, 1), Block(2 * channels, channels, width)
        self.last = nn.Sequential(nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, 12, 3, padding=1))

    def forward(self, x, t, kinds):
        condition = self.condition(t, kinds)
        fine = self.down(self.first(F.pixel_unshuffle(x, 2)), condition)            # (N, channels, 8, 8)
        coarse = self.shrink(fine)                                                  # (N, channels, 4, 4)
        for block in self.inner:
            coarse = block(coarse, condition)
        both = torch.cat([F.interpolate(coarse, scale_factor=2.0), fine], 1)
        return F.pixel_shuffle(self.last(self.up(both, condition)), 2)


class PreferenceModel(nn.Module):
    """(predicted x_0, t, kind) -> a score, (N,): scale * cosine(picture's features at t, kind's features), as
    in PickScore and CLIP. So a score is bounded, whatever the policy shows it."""

    def __init__(self, channels: int = 32, width: int = 64, blind: bool = False):
        super().__init__()
        self.condition = Condition(width, blind)
        self.first, self.fine = nn.Conv2d(12, channels, 3, padding=1), Block(channels, channels, width)
        self.shrink, self.coarse = nn.Conv2d(channels, channels, 3, 2, 1), Block(channels, channels, width)
        self.picture, self.kind = nn.Linear(16 * channels, 32), nn.Embedding(len(KINDS), 32)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, x_0, t, kinds):
        condition = self.condition(t, kinds)
        fine = self.fine(self.first(F.pixel_unshuffle(x_0, 2)), condition)
        features = self.picture(self.coarse(self.shrink(fine), condition).flatten(1))
        return self.log_scale.exp() * F.cosine_similarity(features, self.kind(kinds))


def alpha_bars(device=None):
    """(1000,): Stable Diffusion's noise schedule, `scaled_linear`, which the embedded task uses too."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32)**2
    return (1 - betas).cumprod(0).to(device)


def evenly(steps: int, eta: float = 1.0, device=None) -> Sampler:
    """`steps` timesteps of 1000, as Stable Diffusion takes them: 951, 901, ..., 1 for 20."""
    timesteps = [1 + i * (1000 // steps) for i in reversed(range(steps))]
    return Sampler(alpha_bars(device), timesteps, eta)


TASTE = 0.1     # of the drawn judge: P(a is preferred to b) = sigmoid((reward a - reward b) / TASTE)


def fit(network: nn.Module, loss: Callable, updates: int, peak: float, what: str) -> nn.Module:
    """Train from scratch: loss(update) gives a scalar."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=peak, weight_decay=0.0)
    begun = time.perf_counter()
    for update in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(update, updates, peak, 0.05, "cosine")
        value = loss(update)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if update % max(1, updates // 5) == 0 or update == updates - 1:
            print(f"{what}: update {update:>5} of {updates}, loss {value.item():.4f}, "
                  f"{time.perf_counter() - begun:.0f} s", flush=True)
    return network.requires_grad_(False)


@dataclass(frozen=True)
class Size:
    base: int = 700             # updates of the diffusion model
    preference: int = 200       # updates of the preference model
    batch: int = 64             # pictures an update, so half as many pairs


class Shapes:
    """The embedded task. Networks are made in `folder`, each written whole, or found there."""
    prompts, shape = len(KINDS), (3, SIZE, SIZE)

    def __init__(self, folder: Path, seed: int, *, size: Size = Size(), steps: int = 20, eta: float = 1.0,
                 device=torch.device("cpu"), blind: bool = False):
        self.device, self.sampler, self.size, self.seed = device, evenly(steps, eta, device), size, seed
        self.reference = self.made(folder / "base.safetensors", Denoiser, self.denoising_loss,
                                   size.base, 3e-3, "diffusion model")
        name = "blind" if blind else "preference"
        self.scorer = self.made(folder / f"{name}.safetensors", lambda: PreferenceModel(blind=blind),
                                self.preference_loss, size.preference, 2e-3, f"{name} model")
        self.policy = copy.deepcopy(self.reference).requires_grad_(True)

    def made(self, path: Path, make: Callable, loss: Callable, updates: int, peak: float, what: str):
        """The network in `path`, which process 0 first trains where there is none."""
        if stepdpo.processes()[0] == 0 and not path.exists():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                network = make().to(self.device)
            of_update = lambda update: loss(network, generator_of(self.seed, what, update))
            fit(network, of_update, updates, peak, what)
            save_weights(network, path)
        barrier()
        network = make().to(self.device)
        with stepdpo.reading(path):
            network.load_state_dict(load_file(path, device=str(self.device)))
        return network.requires_grad_(False)

    def drawn(self, count: int, g: torch.Generator):
        """(pictures, their kinds, t, noise) of `count` shapes."""
        kinds = torch.randint(len(KINDS), (count,), generator=g)
        pictures, t = draw_shapes(kinds, g), torch.randint(1000, (count,), generator=g)
        noise = torch.randn(pictures.shape, generator=g)
        return tuple(x.to(self.device) for x in (pictures, kinds, t, noise))

    def denoising_loss(self, network, g: torch.Generator):
        pictures, kinds, t, noise = self.drawn(self.size.batch, g)
        alpha_bar = self.sampler.alpha_bar[t].view(-1, 1, 1, 1)
        x_t = alpha_bar.sqrt() * pictures + (1 - alpha_bar).sqrt() * noise
        return F.mse_loss(network(x_t, t, kinds), noise)

    def preference_loss(self, network, g: torch.Generator):
        """Two pictures of one kind, the same t and noise; the judge knows the true reward, but errs."""
        a, kinds, t, noise = self.drawn(self.size.batch // 2, g)
        b = draw_shapes(kinds.cpu(), g).to(self.device)
        p = ((reward(a) - reward(b)) / TASTE).sigmoid()
        prefers_a = torch.rand(len(t), generator=g).to(self.device) < p
        predict = lambda x_t, t: self.predict(self.reference, x_t, t, kinds)
        of_a, of_b = (network(as_seen_at(x, t, noise, predict, self.sampler), t, kinds) for x in (a, b))
        winner, loser = torch.where(prefers_a, of_a, of_b), torch.where(prefers_a, of_b, of_a)
        return preference_loss(winner, loser, torch.ones_like(winner))

    def predict(self, network, x_t, t, kinds):
        return network(x_t, t, kinds)

    def score(self, x_0, kinds, t: int):
        return self.scorer(x_0, torch.full_like(kinds, t), kinds)

    @torch.no_grad()
    def sample(self, network, count: int, key) -> torch.Tensor:
        """(count, 3, 16, 16): pictures of all kinds in turn, from noise that depends on the key alone."""
        steps, kinds = len(self.sampler.timesteps), torch.arange(count, device=self.device) % len(KINDS)
        noise = draw_noise((key,), range(count), self.shape, self.device, steps=steps, first_steps=steps,
                           inner_steps=1, candidates=1)
        x = noise.start
        for t, z in zip(self.sampler.timesteps, noise.steps):
            output = network(x, torch.full_like(kinds, t), kinds)
            _, mean, sigma = self.sampler.step(x, output, t)
            x = mean + sigma * z[0]
        return x

    def save(self, out: Path):
        save_weights(self.policy, out / "policy.safetensors")
        before, after = (self.sample(network, 72, "sheet") for network in (self.reference, self.policy))
        blocks = [x.view(6, 12, *self.shape) for x in (before, after)]
        contact_sheet(torch.stack(blocks), out / "sheet.png")
        for name, x in (("before", before), ("after", after)):
            say(f"{name}: detail {detail(x).mean():.3f}, layout {layout(x).mean():.3f} (72 pictures)")
        say(f"{out / 'sheet.png'}: before on the left, after on the right, from the same noise")


def save_weights(network: nn.Module, path: Path):
    with written(path) as aside:
        save_file(network.state_dict(), aside)


def reward(pictures):
    """(N,): what the drawn judge goes by."""
    return layout(pictures) + detail(pictures)


def contact_sheet(pictures, path: Path, zoom: int = 4):
    """A PNG of pictures (blocks, rows, columns, 3, H, W) in [-1, 1]: the blocks side by side."""
    pixels = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
    pixels = pixels.repeat_interleave(zoom, 4).repeat_interleave(zoom, 5)
    pixels = F.pad(pixels, (1, 1, 1, 1), value=70)                                  # a line around each
    blocks = [block.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1) for block in pixels]
    gap = torch.full((len(blocks[0]), 4 * zoom, 3), 255, dtype=torch.uint8)
    image = torch.cat([part for block in blocks for part in (gap, block)][1:], 1)   # (height, width, 3)
    height, width, _ = image.shape
    lines = b"".join(b"\0" + line.numpy().tobytes() for line in image)             # 0: a line as it stands

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)                  # 8 bits, RGB
    with written(path) as aside:
        aside.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
                          + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b""))


# ----------------------------------------------------------------------------------------------------------
# appendix: real pipelines

KINDS_OF_PIPELINE = {"StableDiffusionPipeline": "sd", "StableDiffusionXLPipeline": "sdxl"}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
KEPT_PROMPTS = 256              # encoded prompts that are kept for their next turn


def optional(name: str):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise DataError(f"--pipeline needs the package {name}: pip install {name}") from None


def kind_of(folder: Path) -> tuple[str, tuple[int, int, int]]:
    """(sd or sdxl, the shape of its latents) of a folder in the layout of diffusers."""
    found = read_json(folder / "model_index.json").get("_class_name")
    if found not in KINDS_OF_PIPELINE:
        raise DataError(f"{folder / 'model_index.json'}: _class_name {found!r}; SPO here trains "
                        f"{' and '.join(KINDS_OF_PIPELINE)}")
    config = read_json(folder / "unet" / "config.json")
    if config.get("in_channels") != config.get("out_channels"):
        raise DataError(f"{folder / 'unet' / 'config.json'}: in_channels {config.get('in_channels')} and "
                        f"out_channels {config.get('out_channels')}; expected the same (text to image)")
    return KINDS_OF_PIPELINE[found], (config["in_channels"], config["sample_size"], config["sample_size"])


def read_prompts(path: Path) -> list[str]:
    """One prompt a line."""
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompts {path}: {error}; expected a UTF-8 text file, one prompt a line") from None
    if not prompts:
        raise DataError(f"--prompts {path}: holds no prompt; expected one a line")
    return prompts


def load_scorer(name: str) -> tuple[Callable, str]:
    """(the function that MODULE:FUNCTION names, a hash of its module's source)."""
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
        return getattr(found, function), hashlib.sha256(Path(found.__file__).read_bytes()).hexdigest()
    except (ImportError, AttributeError, ValueError) as error:
        raise DataError(f"--scorer {name}: {error}; expected a MODULE:FUNCTION that can be imported from "
                        "here") from None
    finally:
        sys.path.pop(0)


class Pipeline:
    """The UNet of a Stable Diffusion 1.5 or SDXL pipeline, trained whole or by LoRA on its attention. Text
    encoders and VAE stay as they are.

    Policy and reference both predict with classifier-free guidance, in sampling and in training alike: the
    density that is trained is that of the sampler that will be used. The scorer sees pictures:
    scorer(pictures (n, 3, H, W) fp32 in [0, 1], prompts (a list of n), t (an int)) -> (n,), with the scale of
    its logits already in (for PickScore about 100 * cosine)."""

    def __init__(self, args, shape: tuple, prompts: list[str], scorer: Callable, device: torch.device):
        diffusers = optional("diffusers")
        self.args, self.shape, self.texts, self.scorer, self.device = args, shape, prompts, scorer, device
        self.prompts, self.encoded = len(prompts), {}
        try:                                            # safetensors only: a pickle would be executed
            pipe = diffusers.DiffusionPipeline.from_pretrained(args.pipeline, use_safetensors=True,
                                                               local_files_only=True)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{args.pipeline}: {str(error).splitlines()[0]}; expected a folder as "
                                  "diffusers' save_pretrained writes it, with safetensors") from None
        config = pipe.scheduler.config
        if config.get("thresholding"):
            raise DataError(f"{args.pipeline}/scheduler/scheduler_config.json: thresholds the predicted x_0, "
                            "which is wrong for latents; set thresholding to false")
        scheduler = diffusers.DDIMScheduler.from_config(config, clip_sample=False)
        scheduler.set_timesteps(args.steps)
        self.sampler = Sampler(scheduler.alphas_cumprod.to(device), scheduler.timesteps.tolist(), args.eta,
                               scheduler.config.prediction_type)
        self.pipe, self.wide = pipe, "text_encoder_2" in pipe.components
        for name in ("vae", "unet", "text_encoder", *["text_encoder_2"] * self.wide):
            getattr(pipe, name).to(device).requires_grad_(False).eval()
        self.policy, self.reference = pipe.unet, copy.deepcopy(pipe.unet)
        if args.lora:
            peft = optional("peft")
            with torch.random.fork_rng(devices=[]):     # rank r, B = 0: at first the adapter changes nothing
                torch.manual_seed(args.seed)
                lora = peft.LoraConfig(r=args.lora, lora_alpha=args.lora, target_modules=ATTENTION,
                                       init_lora_weights="gaussian")
                self.policy.add_adapter(lora)
            self.policy.to(device)
        else:
            self.policy.requires_grad_(True)
        if args.gradient_checkpointing:
            self.policy.enable_gradient_checkpointing()

    @torch.no_grad()
    def conditions(self, rows) -> list[torch.Tensor]:
        """What the UNet gets of prompts `rows` (n,), empty prompts first: hidden states (2n, L, C), and in
        SDXL pooled ones (2n, C')."""
        asked = set(rows.tolist())
        if len(self.encoded.keys() | asked) > KEPT_PROMPTS:
            self.encoded.clear()
        for row in asked - self.encoded.keys():
            found = self.pipe.encode_prompt(self.texts[row], device=self.device, num_images_per_prompt=1,
                                            do_classifier_free_guidance=True)
            self.encoded[row] = found                   # text, empty; in SDXL also pooled text, pooled empty
        parts = [torch.cat(part) for part in zip(*(self.encoded[row] for row in rows.tolist()))]
        return [torch.cat([empty, text]) for text, empty in zip(parts[::2], parts[1::2])]

    def predict(self, network, x_t, t, rows):
        """The network's guided output, (n, *D) fp32."""
        hidden, *pooled = self.conditions(rows)
        more = {}
        if self.wide:                                   # original size, crop at 0, target size
            pixels = [side * self.pipe.vae_scale_factor for side in self.shape[1:]]
            sizes = torch.tensor([[*pixels, 0, 0, *pixels]], device=self.device, dtype=torch.float32)
            sizes = sizes.expand(2 * len(x_t), -1)
            more = {"added_cond_kwargs": {"text_embeds": pooled[0], "time_ids": sizes}}
        with stepdpo.autocast(self.args.precision, self.device):
            both = network(torch.cat([x_t, x_t]), torch.cat([t, t]), hidden, **more).sample
        empty, text = both.float().chunk(2)
        return empty + self.args.guidance * (text - empty)

    @torch.no_grad()
    def score(self, x_0, rows, t: int):
        """Decoded in fp32: SDXL's VAE overflows in half precision."""
        pictures = self.pipe.vae.decode(x_0 / self.pipe.vae.config.scaling_factor).sample
        scores = self.scorer((pictures / 2 + 0.5).clamp(0, 1), [self.texts[row] for row in rows.tolist()], t)
        if not isinstance(scores, torch.Tensor) or scores.shape != (len(x_0),):
            found = getattr(scores, "shape", type(scores).__name__)
            raise DataError(f"--scorer {self.args.scorer} returned {found} for {len(x_0)} pictures; expected "
                            "a tensor of so many scores")
        return scores.to(self.device, torch.float32)

    def save(self, out: Path):
        """OUT/lora for pipeline.load_lora_weights, or OUT/pipeline for DiffusionPipeline.from_pretrained."""
        aside, final = out / "writing", out / ("lora" if self.args.lora else "pipeline")
        shutil.rmtree(aside, ignore_errors=True)
        with writing(final):
            if self.args.lora:
                convert = importlib.import_module("diffusers.utils").convert_state_dict_to_diffusers
                weights = convert(optional("peft").get_peft_model_state_dict(self.policy))
                self.pipe.save_lora_weights(aside, unet_lora_layers=weights)
            else:
                self.pipe.save_pretrained(aside, safe_serialization=True)
            for path in aside.rglob("*.*"):
                if path.is_file():
                    sync(path)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(aside, final)
        say(f"saved {final}")


# ----------------------------------------------------------------------------------------------------------
# command line

RELEASED = dict(candidates=4, inner_steps=1, threshold=0.3, lr=6e-5, prompts_per_round=40, batch_size=40,
                weight_decay=1e-4, micro_batch_size=8, lora=4, guidance=5.0, gradient_checkpointing=False)
DEFAULTS = {
    "shapes": RELEASED | dict(lr=2e-5, prompts_per_round=16, batch_size=64, micro_batch_size=512),
    "sd": RELEASED,
    "sdxl": RELEASED | dict(candidates=2, inner_steps=4, threshold=0.4, lr=1e-5, prompts_per_round=8,
                            batch_size=16, lora=64, micro_batch_size=2)}


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m variants.spo", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    of = lambda name: " / ".join(f"{defaults[name]:g}" for defaults in DEFAULTS.values())
    p.epilog = ("Defaults that read a / b / c: embedded task / Stable Diffusion 1.5 / SDXL. After any "
                "interruption, run the same command again.")
    add = p.add_argument_group("what").add_argument
    add("--out", required=True, type=Path, metavar="OUT",
        help="folder for the result, metrics.jsonl and run.json")
    add("--seed", type=int, default=0, help="of all noise and of the prompts' order (default 0)")
    add("--restart", action="store_true", help="begin anew where OUT holds an earlier run")

    add = p.add_argument_group("real pipelines").add_argument
    add("--pipeline", type=Path, metavar="FOLDER",
        help="Stable Diffusion 1.5 or SDXL in the layout of diffusers (default: the embedded task)")
    add("--prompts", type=Path, metavar="FILE", help="to train on, one a line")
    add("--scorer", metavar="MODULE:FUNCTION",
        help="preference model: (pictures (n, 3, H, W) in [0, 1], prompts, t) -> (n,) scores, as logits")
    add("--lora", type=int, metavar="RANK",
        help="train adapters on the attention of this rank; 0 trains all weights (default 4 / 64)")
    add("--guidance", type=float,
        help="scale of classifier-free guidance, in sampling and training (default 5)")
    add("--precision", choices=("fp32", "bf16"),
        help="of the UNet's arithmetic; trained weights are fp32 (default bf16 on CUDA, fp32 on CPU)")
    add("--gradient_checkpointing", action="store_true", default=None,
        help="recompute activations in the backward pass: more time, far less memory")

    add = p.add_argument_group("method").add_argument
    add("--loss", choices=("released", "paper"), default="released",
        help="released: mean over dimensions, clipped; paper: sum, not clipped (default released)")
    add("--beta", type=float, help="default 10; with --loss paper 10 / dimensions, which weighs a step alike")
    add("--eps", type=float, default=0.1, help="released loss: half width of the clip (default 0.1)")
    add("--threshold", type=float, help="least difference of the softmax of best and worst score (default "
        f"{of('threshold')}; with --loss paper 0: only ties are left out)")
    add("--candidates", type=int, metavar="K", help=f"drawn from each x_t (default {of('candidates')})")
    add("--steps", type=int, default=20, help="of the sampler (default 20)")
    add("--first_steps", type=int, default=4,
        help="of them without candidates, nor trained (default 4 of 20: t <= 751 is trained)")
    add("--inner_steps", type=int, metavar="J",
        help=f"steps that one comparison judges: each candidate goes on alone (default {of('inner_steps')})")
    add("--eta", type=float, default=1.0, help="share of DDPM's noise in a step (default 1)")

    add = p.add_argument_group("optimisation").add_argument
    add("--rounds", type=int, help="of sampling (default 20; with --pipeline 10 passes over the prompts)")
    add("--prompts_per_round", type=int, metavar="B",
        help=f"trajectories a round, over all processes (default {of('prompts_per_round')})")
    add("--batch_size", type=int, help=f"pairs an update, over all processes (default {of('batch_size')})")
    add("--lr", type=float, help=f"of AdamW (default {of('lr')})")
    add("--warmup", type=float, default=0.0, help="share of the rounds in which lr rises (default 0)")
    add("--schedule", choices=("linear", "cosine", "constant"), default="constant", help="default constant")
    add("--weight_decay", type=float, help="default 1e-4")
    add("--clip", type=float, default=1.0, help="largest gradient norm (default 1)")

    add = p.add_argument_group("size and bookkeeping").add_argument
    add("--micro_batch_size", type=int,
        help=f"most pictures in one network call of a process (default {of('micro_batch_size')})")
    add("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    add("--checkpoint_every", type=int, default=10, metavar="ROUNDS", help="default 10; 0: never")
    add("--debug", action="store_true", help="show the traceback of an error")
    return p


def settle(args, kind: str, shape: tuple, prompts: int):
    """Fill in what depends on the task. DataError where a number cannot be meant."""
    of_pipelines = ("prompts", "scorer", "lora", "guidance", "precision", "gradient_checkpointing")
    for name in of_pipelines if kind == "shapes" else ():
        if getattr(args, name) is not None:
            raise DataError(f"--{name}: is of real pipelines; give --pipeline too, or leave it out")
    if args.loss == "paper":
        args.threshold = 0.0 if args.threshold is None else args.threshold
    if args.beta is None:
        args.beta = 10.0 / math.prod(shape) if args.loss == "paper" else 10.0
    for name, value in DEFAULTS[kind].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.rounds is None:
        args.rounds = 20 if kind == "shapes" else math.ceil(10 * prompts / args.prompts_per_round)
    for name in ("beta", "lr", "clip", "rounds", "prompts_per_round", "batch_size", "micro_batch_size",
                 "inner_steps"):
        if not getattr(args, name) > 0:
            raise DataError(f"--{name} is {getattr(args, name)}: expected a number above 0")
    for name in ("seed", "lora", "weight_decay", "checkpoint_every"):
        if not getattr(args, name) >= 0:
            raise DataError(f"--{name} is {getattr(args, name)}: expected 0 or more")
    if not 0 < args.eta <= 1:
        raise DataError(f"--eta is {args.eta}: expected above 0 (without noise there is no density), up to 1")
    if not 0 < args.eps < 1:
        raise DataError(f"--eps is {args.eps}: expected between 0 and 1")
    if not (0 <= args.warmup <= 1 and 0 <= args.threshold < 1):
        raise DataError(f"--warmup is {args.warmup}, --threshold {args.threshold}: expected shares, 0 to 1")
    if args.candidates < 2:
        raise DataError(f"--candidates is {args.candidates}: a pair needs 2")
    if not 0 <= args.first_steps < args.steps <= 500:
        raise DataError(f"--first_steps {args.first_steps} of --steps {args.steps}: expected 0 or more, and "
                        "fewer than the steps; of these 500 at most")


# What does not decide a run's numbers. (Of files the content is compared, not the name.)
HARMLESS = ("out", "device", "pipeline", "prompts", "micro_batch_size", "checkpoint_every", "restart",
            "debug", "gradient_checkpointing")


def run(args) -> int:
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        args.restart = False                # torchrun --max-restarts started us again: go on
    keep_freed_memory()
    device, (rank, world) = choose_device(args.device), join_processes()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    kind, shape, content = "shapes", Shapes.shape, None
    if args.pipeline is not None:
        if args.prompts is None or args.scorer is None:
            raise DataError("--pipeline needs --prompts FILE and --scorer MODULE:FUNCTION")
        (kind, shape), prompts = kind_of(args.pipeline), read_prompts(args.prompts)
        scorer, source = load_scorer(args.scorer)
        if args.precision is None:
            args.precision = "bf16" if device.type == "cuda" else "fp32"
        parts = sorted(path for path in args.pipeline.iterdir() if path.is_dir())
        content = {"pipeline": {part.name: fingerprint(part) for part in parts}, "prompts": prompts,
                   "scorer": source}
    settle(args, kind, shape, len(prompts) if content else Shapes.prompts)
    if args.prompts_per_round < world:
        raise DataError(f"--prompts_per_round {args.prompts_per_round}: each of {world} processes needs one")
    stepdpo.check_out(args.out, argparse.Namespace(model=args.pipeline, base=None, reference=None))
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    settings = {name: value for name, value in vars(args).items() if name not in HARMLESS}
    identity = settings | {"content": digest}
    with locked(args.out):
        stepdpo.same_everywhere("pipeline, prompts and settings", identity, device)
        complete = rank == 0 and stepdpo.prepare_out(args.out, args, identity)
        if all_sum(torch.tensor(float(complete), device=device)):
            say(f"{args.out}: this run is complete; --restart would begin it anew")
            return 0
        if content:
            task = Pipeline(args, shape, prompts, scorer, device)
        else:
            if rank == 0 and args.restart:
                shutil.rmtree(args.out / "networks", ignore_errors=True)
            task = Shapes(args.out / "networks", args.seed, steps=args.steps, eta=args.eta, device=device)
        status = train(args, task, args.out)
        if status == 0 and rank == 0:
            task.save(args.out)
            record = json.loads((args.out / "run.json").read_text())
            stepdpo.write_json(args.out / "run.json", {**record, "finished": True})
            shutil.rmtree(args.out / "checkpoint", ignore_errors=True)
        barrier()
        return status


def main(argv=None) -> int:
    args = arguments().parse_args(argv)
    return run_command(lambda: run(args), args.debug)


if __name__ == "__main__":
    sys.exit(leave_processes(main()))
