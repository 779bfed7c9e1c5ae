"""Step-DPO (Lai et al. 2024, arXiv 2406.18629) beside its baselines SFT and DPO: the losses, the fused log-probabilities and one training loop.

    SFT        -log pi(y | x)                                                                              a mean over answer tokens
    DPO        -log sigmoid( beta [log pi/ref (y_win | x) - log pi/ref (y_lose | x)] )                     Eq. 1: whole answers
    Step-DPO   -log sigmoid( beta [log pi/ref (s_win | x, s_1..s_k-1) - log pi/ref (s_lose | same)] )      Eq. 2: one step, the first wrong one

with log pi/ref = log pi_theta - log pi_ref, and the log-probability of a text the SUM over its tokens. Eq. 2 is Eq. 1 with another split between what is
given and what is judged: both call `dpo_loss`, and the difference is in data.py, which decides where the prompt ends and whether an EOS follows.

What is deliberately left out, and why nothing is missing:
 1. A second model in memory: the reference is the policy at step 0, so one scoring pass before the first update gives every reference term.
 2. Two forward passes a pair: chosen and rejected share their prefix, which runs through the network once (model.py, `Tree`).
 3. The (tokens x vocabulary) matrix of logits: only response tokens meet the vocabulary, a chunk at a time (`FusedLogProbs`).
 4. A trainer class: the loop is `train`; a new method is a function (token_logps, batch, ref_logps, args) -> losses (B,) of the
    pairs (in SFT (M,), of the tokens) and metrics, of which the loop takes the global means.

    python stepdpo.py stepdpo --model FOLDER --data pairs.jsonl --out OUT                            one process, CPU or GPU
    torchrun --nproc_per_node 8 stepdpo.py stepdpo --model FOLDER --data pairs.jsonl --out OUT       eight, each with the whole model; with --shard an eighth

Shapes: B pairs of a micro-batch, N tokens of its flat row, M response tokens among them, R responses (2B, or B in SFT), C hidden size, V vocabulary.
"""
import argparse
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

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

import data
from data import Batch, DataError
from model import CheckpointError, Config, Llama, Tree, choose_device, fingerprint, keep_freed_memory, own_rows, read_json, resolve, sync, whole, writing, written


# ---------------------------------------------------------------------------------------------------------------------
# from hidden states to log-probabilities

LOGITS_AT_ONCE = 2**25      # elements of the one (chunk, V) buffer: 128 MB in fp32


class FusedLogProbs(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[targets], without ever holding the (M, V) matrix of logits, forward or backward.

    hidden (M, C), weight (V, C), targets (M,) int64 -> (M,) fp32 (fp64 if hidden is). A chunk of tokens at a time: logits z, then z[target] - logsumexp(z).
    The backward pass makes each chunk's logits once more (but the last's): d logp / d z = onehot(target) - softmax(z), times the token's own gradient. That is
    known only after the whole step has been summed and put through the sigmoid, which is why the forward pass cannot already do this work."""

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else hidden.dtype
        h, w = hidden.to(dtype), weight.to(dtype)
        logps, log_z = [], []
        rows = max(1, LOGITS_AT_ONCE // len(w))
        z = None
        for part, at in zip(h.split(rows), targets.split(rows)):
            del z                                                               # before the next is made: there is never more than one
            z = logits_of(part, w)                                              # (chunk, V)
            top, picked = z.amax(-1), z.gather(1, at[:, None])[:, 0]
            log_z.append(z.sub_(top[:, None]).exp_().sum(-1).log_() + top)      # logsumexp, in place
            logps.append(picked - log_z[-1])
        ctx.save_for_backward(hidden, weight, targets, torch.cat(log_z))
        ctx.last = z.mul_((top - log_z[-1]).exp_()[:, None])                    # softmax of the last chunk: the backward pass begins with it
        ctx.dtype = dtype
        return torch.cat(logps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden, weight, targets, log_z = ctx.saved_tensors
        h, w = hidden.to(ctx.dtype), weight.to(ctx.dtype)
        weighted = (h * grad[:, None]).to(ctx.dtype)                            # each token's own gradient goes to the (M, C) side of both products
        grad_hidden = torch.empty_like(h)
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        rows = max(1, LOGITS_AT_ONCE // len(w))
        z, ctx.last = ctx.last, None
        for start in reversed(range(0, len(h), rows)):
            s = slice(start, start + rows)
            if z is None:
                z = logits_of(h[s], w).sub_(log_z[s, None]).exp_()              # softmax
            z.scatter_add_(1, targets[s, None], z.new_full((len(z), 1), -1.0))  # softmax - onehot(target)
            z = z.to(ctx.dtype)
            torch.mm(z, w, out=grad_hidden[s])
            if grad_weight.dtype == ctx.dtype:
                grad_weight.addmm_(z.T, weighted[s], alpha=-1)
            else:
                grad_weight -= z.T @ weighted[s]
            z = None
        return grad_hidden.mul_(-grad[:, None]).to(hidden.dtype), grad_weight.to(weight.dtype), None


def logits_of(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """h (chunk, C) @ w.T (C, V) as fp32 at least: log-probabilities are small differences of large numbers. (bf16 inputs: CUDA gives the fp32 sums; a CPU
    rounds them to bf16 first, to about 0.06 at logits of 20.)"""
    if h.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(h, w.T, out_dtype=torch.float32) if h.is_cuda else (h @ w.T).float()
    return h @ w.T


class Policy(nn.Module):
    """The model as the loop sees it: a batch in, the log-probability of every response token out. (A module, because DDP wraps modules.)"""

    def __init__(self, model: Llama):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> torch.Tensor:
        """-> (M,): log pi(targets[m] | all tokens before it). The hidden state at predict_at[m] scores the NEXT token, targets[m]."""
        hidden = self.model.hidden_states(batch.input_ids[None], batch.position_ids, Tree(batch.lengths, batch.parents), batch.predict_at)[0]   # (M, C)
        return FusedLogProbs.apply(hidden, self.model.lm_head.weight, batch.targets)


def response_logps(token_logps: torch.Tensor, batch: Batch) -> torch.Tensor:
    """(M,) -> (R,): log pi(response) = the sum over its tokens. Not the mean: the probability of a text is the product of its tokens' probabilities, and
    beta is calibrated to that. Prompt, prefix and padding are not among the M tokens, so they carry no loss.

        tokens     a     b     c  |  d     e          response   0  0  0  1  1
        logps    -0.5  -1.0  -0.5 | -0.2  -0.3   ->   sums      [-2.0, -0.5]
    """
    responses = int(batch.response[-1]) + 1
    return token_logps.new_zeros(responses).index_add(0, batch.response, token_logps)


# ---------------------------------------------------------------------------------------------------------------------
# the losses

def dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """Eq. 1 of the paper (DPO, Rafailov et al. 2023) on log-probs of whole answers; Eq. 2 (Step-DPO) on log-probs of single steps. All tensors (B,).

    Returns (losses, chosen_rewards, rejected_rewards), each (B,); the caller takes the mean. A reward is beta times the log-ratio of policy and reference;
    their difference is the margin. A larger beta makes the same change of log-probs count for more, so the policy stays nearer to the reference.
    At step 0 policy = reference: margin 0, loss -log sigmoid(0) = log 2 = 0.6931."""
    chosen_rewards = beta * (policy_chosen_logps - ref_chosen_logps)            # s_win
    rejected_rewards = beta * (policy_rejected_logps - ref_rejected_logps)      # s_lose
    return -F.logsigmoid(chosen_rewards - rejected_rewards), chosen_rewards, rejected_rewards


def sft_objective(token_logps, batch, ref_logps, args):
    """-log pi of every answer token: losses (M,), and no preference metrics."""
    return -token_logps, {}


def preference_objective(token_logps, batch, ref_logps, args):
    """DPO and Step-DPO: losses (B,) and metrics, each (B,), under the names of the field.

    accuracy: does the policy, relative to the reference, favour the chosen side; margin = chosen_reward - rejected_reward. Only the margin is optimised:
    chosen_reward may fall below 0 as long as rejected_reward falls further, and neither says whether answers get better. chosen_logps is logged for that."""
    chosen_logps, rejected_logps = response_logps(token_logps, batch).chunk(2)                 # chosen of pair i at i, rejected at B + i
    losses, chosen_rewards, rejected_rewards = dpo_loss(chosen_logps, rejected_logps, ref_logps[:, 0], ref_logps[:, 1], args.beta)
    margin = chosen_rewards - rejected_rewards
    return losses, {"accuracy": (margin > 0).float(), "margin": margin, "chosen_reward": chosen_rewards, "rejected_reward": rejected_rewards,
                    "chosen_logps": chosen_logps, "rejected_logps": rejected_logps}


OBJECTIVES = {"sft": sft_objective, "dpo": preference_objective, "stepdpo": preference_objective}


def learning_rate(step: int, total: int, peak: float, warmup: float, schedule: str) -> float:
    """lr of update `step` (0-based) out of `total`: a linear rise over the first `warmup` share of updates, then a linear or cosine fall towards 0.
    A pure function of the step, so a resumed run needs no scheduler state. The first update already moves (HF's schedulers begin at exactly 0)."""
    rise = math.ceil(total * warmup)
    if step < rise:
        return peak * (step + 1) / rise
    progress = (step - rise) / max(1, total - rise)
    return peak * ((1 - progress) if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))


# ---------------------------------------------------------------------------------------------------------------------
# processes: everything here is also right for one process without torchrun

def distributed(device: str | None) -> tuple[int, int, torch.device]:
    """(rank, world size, device), joining the process group that torchrun announces. nccl on CUDA, gloo on CPU."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        # torchrun --max-restarts keeps one store for all starts, where new processes would find the addresses of dead ones. So each start puts a prefix of its
        # own before its keys. (On one machine only: the agents of several may count starts differently. There, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives each
        # start a new store.)
        store, starts = None, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        if starts != "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("LOCAL_WORLD_SIZE") == str(world):
            store = dist.PrefixStore(f"start {starts}", dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(hours=2))
    return rank, world, device


def all_sum(x: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def load_policy(source, args, world: int, device: torch.device) -> Policy:
    """The policy of a checkpoint: whole on every process, or with --shard cut by rows over all of them (torch's FSDP2; ZeRO-3, Rajbhandari et al. 2020).

    Sharded, a process keeps 1/world of every weight, gradient and AdamW moment (16 bytes a parameter) and reads only that from the files. A block's weights
    are gathered when it is about to run, forward or backward, and dropped right after; gradients leave as a sum that is scattered the same way. What runs
    outside the blocks (embedding, last norm, lm_head) is the root's, so `Policy.forward` finds lm_head.weight whole."""
    policy = Policy(Llama.skeleton(source))
    if args.shard and world > 1:
        # With --precision bf16 the weights are gathered in bf16: matrices would be cast by autocast anyway, embedding and norms are rounded in sharded runs only.
        # As in an unsharded run, the residual stream stays fp32 (inputs are not cast, and what the embedding gives is cast back), and so do sums of gradients.
        bf16 = args.precision == "bf16"
        how = dict(mesh=init_device_mesh(device.type, (world,)), reshard_after_forward=True,
                   mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False))
        for block in policy.model.model.layers:
            fully_shard(block, **how)
        fully_shard(policy, **how)
        policy.model.model.embed_tokens.register_forward_hook(lambda module, ids, x: x.float())
    policy.model.read_weights(device=device)
    if args.compile:             # attention is one kernel already, and everything around it changes its shape with every batch
        for block in policy.model.model.layers:
            for part in (block.input_layernorm, block.post_attention_layernorm, block.mlp):
                part.compile(dynamic=True)
    return policy


def in_step(plan: list, rank: int) -> list:
    """plan[rank] as (micro-batch, 1.0), then a row with weight 0 for every micro-batch that the busiest rank has more: a pass of a sharded model, and the
    last backward pass of a replicated one, is made by all ranks together, so all must make equally many."""
    idle = max(map(len, plan)) - len(plan[rank])
    row = next(micros for micros in plan if micros)[-1][-1:]
    return [(rows, 1.0) for rows in plan[rank]] + [(row, 0.0)] * idle


def same_everywhere(what: str, value, device: torch.device):
    """Every rank must have read the same `what`, a JSON value: they compare the first 60 bits of its hash."""
    mine = torch.tensor([int(hashlib.sha256(json.dumps(value).encode()).hexdigest()[:15], 16)], device=device)
    if dist.is_initialized():
        high, low = mine.clone(), mine.clone()
        dist.all_reduce(high, dist.ReduceOp.MAX)
        dist.all_reduce(low, dist.ReduceOp.MIN)
        if high != low:
            raise DataError(f"the processes do not read the same {what}: check that all machines see the same files, and were given the same command")


class StopSignal:
    """SIGINT and SIGTERM set a flag; the loop finishes its step, saves and exits with the status that such a signal usually gives. Ctrl-C twice is a kill."""

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


# ---------------------------------------------------------------------------------------------------------------------
# the reference: one scoring pass

@torch.no_grad()
def score(policy: Policy, examples: list, args, rank: int, world: int, device: torch.device, what: str) -> torch.Tensor:
    """(n, 2) fp32: log pi(chosen), log pi(rejected) of every pair under `policy`. Ranks share the micro-batches; each pair is scored by exactly one of them,
    so a sum over ranks assembles the table. Draws no random numbers."""
    table = torch.zeros(len(examples), 2, device=device)
    micros = in_step(scoring_plan(examples, args, world), rank)
    policy.eval()
    with tqdm(total=sum(len(rows) for rows, _ in micros), desc=what, unit="pair", disable=rank != 0 or not sys.stderr.isatty(), leave=False) as bar:
        for rows, weight in micros:
            batch = data.collate(examples, rows).to(device)
            with autocast(args, device):
                logps = response_logps(policy(batch), batch)
            table[batch.rows] += weight * torch.stack(logps.chunk(2), dim=1)
            bar.update(len(rows))
    policy.train()
    return all_sum(table)


def scoring_plan(examples: list, args, world: int) -> list:
    """[rank][micro-batch][row]: all examples once."""
    return data.epoch_plan([e.length for e in examples], batch_size=len(examples), micro_batch_size=args.micro_batch_size,
                           micro_batch_tokens=args.micro_batch_tokens, world_size=world)[0]


def judge(policy, objective, batch: Batch, ref_logps: torch.Tensor | None, args, device):
    """One micro-batch through policy and objective: (losses, metrics)."""
    with autocast(args, device):
        token_logps = policy(batch)
    return objective(token_logps, batch, None if ref_logps is None else ref_logps[batch.rows], args)


def autocast(args, device):
    """bf16 products over fp32 weights. The weights themselves stay fp32: at lr 5e-7 an update is far below the spacing of bf16 numbers (1e-4 near 0.02)."""
    return torch.autocast(device.type, torch.bfloat16) if args.precision == "bf16" else nullcontext()


# ---------------------------------------------------------------------------------------------------------------------
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
    except (OSError, SafetensorError, ValueError, TypeError, LookupError) as e:
        raise CheckpointError(f"{path}: is damaged ({e}); begin anew with --restart") from e


# One format for all runs: a set of safetensors files, each with some rows of every tensor it names; in the order of the file names the rows add up to the
# tensor. A whole model is the case of one process. So a run may go on under another number of processes, sharded or not. (torch.distributed.checkpoint could
# do this as well, but keeps its table of contents as a pickle.)

def own_slice(t: torch.Tensor) -> torch.Tensor:
    """What this process holds of t, sharing memory."""
    return t.detach().to_local() if isinstance(t, DTensor) else t.detach()


def save_checkpoint(folder: Path, step: int, model: Llama, optimizer: torch.optim.Optimizer, rank: int):
    """checkpoint/step-N/{model,optimizer}-RANK-LAYER.safetensors, written under another name and renamed when complete; then the older ones go. Called by all
    processes; each writes what only it has. Small files, so that never more than one layer's share waits in CPU memory."""
    aside, final = folder / "writing", folder / f"step-{step:08d}"
    if rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
    barrier()
    files: dict[str, dict] = {}
    for k, p in model.named_parameters():
        if rank == 0 or isinstance(p, DTensor):
            layer = k.split(".")[2] if k.startswith("model.layers.") else "rest"
            files.setdefault(f"model-{rank:05d}-{layer}", {})[k] = p
            for kind in ("exp_avg", "exp_avg_sq"):
                files.setdefault(f"optimizer-{rank:05d}-{layer}", {})[f"{kind}.{k}"] = optimizer.state[p][kind]
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
    """Restore the newest complete checkpoint, however many processes wrote it; returns the number of updates it holds, 0 if there is none."""
    found = sorted(folder.glob("step-[0-9]*"))
    if not found:
        return 0
    step = int(found[-1].name.removeprefix("step-"))
    pieces: dict[str, list] = {}                                              # tensor -> its files in order, and how many rows each has
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
            raise CheckpointError(f"{found[-1]}: is damaged ({begin} of {len(t)} rows of {key}); begin anew with --restart")

    for k, p in model.named_parameters():
        restore(k, p)
        moments = {kind: torch.zeros_like(p, requires_grad=False) for kind in ("exp_avg", "exp_avg_sq")}
        for kind, t in moments.items():
            restore(f"{kind}.{k}", t)
        optimizer.state[p] = {"step": torch.tensor(float(step), device=p.device), **moments}
    return step


def identity_of(args, objective, folder: Path, examples: list, held_out: list) -> dict:
    """What decides a run's numbers: settings, the content of the model's files and of the encoded rows. A continued run must have the same."""
    def content(examples: list) -> str:
        rows = hashlib.sha256()
        for e in examples:
            for part in e.sides:
                rows.update(f"{e.start} {e.shared} {len(part)} ".encode() + part.tobytes())
        return rows.hexdigest()

    settings = {k: getattr(args, k, None) for k in ("method", "seed", "prompt", "epochs", "batch_size", "lr", "warmup", "schedule", "beta", "clip",
                                                    "max_length", "precision", "max_steps")}
    return {**settings, "objective": getattr(objective, "__qualname__", type(objective).__name__), "model": fingerprint(folder),
            "reference": args.reference and fingerprint(resolve(args.reference)), "data": content(examples), "eval_data": content(held_out)}


def check_out(out: Path, args):
    """Refuse a folder that this run may not or cannot write into; nothing is touched."""
    nearest = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise DataError(f"{nearest}: is a file; --out is a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise DataError(f"{nearest}: is not writable for you; choose another --out, or repair its permissions")
    if out.exists() and not (out / "run.json").exists() and any(p.name != "run.json.tmp" for p in out.iterdir()):
        raise DataError(f"{out}: is not empty and holds no run.json of an earlier run; choose another --out")
    if any(source and Path(source).exists() and out.exists() and out.samefile(source) for source in (args.model, args.reference)):
        raise DataError(f"{out}: is the folder that --model or --reference is read from; choose another --out")


def prepare_out(out: Path, args, identity: dict) -> bool:
    """Rank 0 makes the run's folder, or checks that it holds this very run. True if that is already complete."""
    checkpoint, removed = out / "checkpoint", out / "checkpoint.removed"
    shutil.rmtree(removed, ignore_errors=True)
    if args.restart and checkpoint.exists():
        os.replace(checkpoint, removed)                     # in one go: half of a checkpoint must not be taken for a whole one
        shutil.rmtree(removed)
    if (out / "run.json").exists() and not args.restart:
        with reading(out / "run.json"):
            run = json.loads((out / "run.json").read_text())
            before, finished = run["identity"], run["finished"]
        short = lambda v: v[:12] if isinstance(v, str) and len(v) == 64 else v                       # of a hash
        changed = [f"{k}: {short(before.get(k))!r} then, {short(v)!r} now" for k, v in identity.items() if before.get(k) != v]
        if changed:
            raise DataError(f"{out}: holds a run that was started differently ({'; '.join(changed)}); choose another --out, or begin anew with --restart")
        if finished:
            shutil.rmtree(checkpoint, ignore_errors=True)
        return finished
    settings = {k: v for k, v in vars(args).items() if not callable(v)}
    write_json(out / "run.json", {"finished": False, "settings": settings, "identity": identity, "versions":
                                  {"python": platform.python_version(), "torch": torch.__version__}, "command": [Path(sys.argv[0]).name, *sys.argv[1:]]})
    for name in ("metrics.jsonl", "eval.jsonl"):
        (out / name).unlink(missing_ok=True)
    return False


# ---------------------------------------------------------------------------------------------------------------------
# the training loop

def train(args, objective) -> int:
    """Train `args.model` on `args.data` with `objective` (see `preference_objective`); returns the exit status.

    The loss is the mean over the global batch of pairs (of answer tokens in SFT), however the batch is cut into micro-batches and processes."""
    rank, world, device = distributed(args.device)
    say = print if rank == 0 else (lambda *_, **__: None)
    keep_freed_memory()
    torch.manual_seed(args.seed)          # nothing here draws from it; a variant may
    out = Path(args.out)
    check_out(out, args)
    folder = resolve(args.model)
    tokenizer = data.Tokenizer.from_pretrained(folder)
    max_length = min(args.max_length, Config.from_dict(read_json(folder / "config.json"), str(folder / "config.json")).max_position_embeddings)
    if max_length < args.max_length:
        say(f"--max_length {args.max_length}: the model's positions end at {max_length}, so longer rows are dropped")
    examples, report = data.encode_dataset(args.data, tokenizer, args.method, args.prompt, max_length)
    say(report)
    held_out = []
    if args.eval_data:
        held_out, report = data.encode_dataset(args.eval_data, tokenizer, args.method, args.prompt, max_length)
        say(report)

    policy = load_policy(folder, args, world, device)
    model = policy.model
    check_vocabulary(examples + held_out, model, folder)
    if args.reference:                                                                                      # checked before OUT is made
        if Llama.skeleton(args.reference).config.vocab_size < model.config.vocab_size:
            raise CheckpointError(f"--reference {args.reference}: its vocabulary is smaller than the model's ({model.config.vocab_size})")
        if (resolve(args.reference) / "tokenizer.json").is_file():
            theirs, ours = (t.backend.get_vocab() for t in (data.Tokenizer.from_pretrained(resolve(args.reference)), tokenizer))
            if odd := next((token for token, id in sorted(ours.items()) if theirs.get(token, id) != id), None):
                raise CheckpointError(f"--reference {args.reference}: its tokenizer.json numbers tokens otherwise: {odd!r} is {theirs[odd]}, the model's {ours[odd]}")
    identity = identity_of(args, objective, folder, examples, held_out)
    same_everywhere("model, data and settings", identity, device)
    finished = torch.tensor(int(rank == 0 and prepare_out(out, args, identity)), device=device)
    if all_sum(finished):
        say(f"{out}: this run is complete; --restart would begin it anew")
        return 0
    same_everywhere(f"{out}/checkpoint", sorted(p.name for p in (out / "checkpoint").glob("*")), device)

    # The reference is the model before the first update, unless --reference names another. Its log-probs are kept beside the checkpoints.
    ref_logps = ref_held_out = None
    if args.method != "sft":
        cached = out / "checkpoint" / "reference.safetensors"
        if cached.exists():
            with reading(cached):
                table = load_file(cached, device=str(device))
        else:
            reference = policy
            if args.reference:
                reference = load_policy(args.reference, args, world, device)
            table = {"train": score(reference, examples, args, rank, world, device, "reference"),
                     "held_out": score(reference, held_out, args, rank, world, device, "reference") if held_out else torch.zeros(0, 2)}
            del reference
            if rank == 0:
                with written(cached) as aside:
                    save_file({k: v.cpu() for k, v in table.items()}, aside)
        ref_logps, ref_held_out = table["train"], table["held_out"]

    model.gradient_checkpointing = args.gradient_checkpointing
    replicated = world > 1 and not args.shard
    learner = nn.parallel.DistributedDataParallel(policy.train(), gradient_as_bucket_view=True) if replicated else policy.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)
    done = load_checkpoint(out / "checkpoint", model, optimizer)

    lengths = [e.length for e in examples]
    plan = lambda epoch: data.epoch_plan(lengths, batch_size=args.batch_size, micro_batch_size=args.micro_batch_size,
                                         micro_batch_tokens=args.micro_batch_tokens, world_size=world, seed=args.seed, epoch=epoch)
    per_epoch = math.ceil(len(examples) / args.batch_size)
    total = min(args.epochs * per_epoch, args.max_steps or sys.maxsize)
    if rank == 0:
        keep_lines(out / "metrics.jsonl", done)
        keep_lines(out / "eval.jsonl", done)
    say(f"{args.method}: {sum(p.numel() for p in model.parameters()):,} parameters on {world} x {device.type}"
        f"{', sharded' * (args.shard and world > 1)}, {args.precision}; {len(examples):,} rows, "
        f"batch {args.batch_size}, {total} steps ({args.epochs} epochs of {per_epoch}); lr {args.lr:g} {args.schedule}, warmup {args.warmup:.0%}"
        + (f", beta {args.beta:g}" if args.method != "sft" else "") + (f"; continuing after step {done - 1}" if done else ""))
    columns = ["step", "loss"] + ["accuracy", "margin", "chosen_reward", "rejected_reward"] * (args.method != "sft") + ["grad_norm", "lr"]
    say("  ".join(f"{c:>{max(8, len(c))}}" for c in columns) + "     tok/s  time left")

    epoch, steps, begun, spoke = None, None, time.perf_counter(), -math.inf
    with StopSignal() as stop:
        for step in range(done, total):
            # ---- once in a while
            if held_out and args.eval_every and step % args.eval_every == 0:
                evaluate(policy, held_out, ref_held_out, objective, args, rank, world, device, step, out)
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                steps = plan(epoch)
            batch_of_step = steps[step % per_epoch]                                                      # [rank][micro-batch][row]
            # The mean's denominator, known to every rank in advance: pairs, or in SFT answer tokens.
            rows = [row for micros in batch_of_step for micro in micros for row in micro]
            units = len(rows) if args.method != "sft" else sum(len(examples[row].chosen) - examples[row].start for row in rows)
            micros = in_step(batch_of_step, rank)
            clock = time.perf_counter()

            # ---- one update
            lr = learning_rate(step, total, args.lr, args.warmup, args.schedule)
            for group in optimizer.param_groups:
                group["lr"] = lr
            sums: dict[str, torch.Tensor] = {}
            tokens = 0
            for i, (micro, weight) in enumerate(micros):
                batch = data.collate(examples, micro).to(device)
                # Gradients are averaged over ranks in the last micro-batch's backward pass; in the others that would be wasted traffic. (Not so where the
                # model is sharded: no rank has room for the whole gradient, so every pass scatters it.)
                with learner.no_sync() if replicated and i + 1 < len(micros) else nullcontext():
                    losses, metrics = judge(learner, objective, batch, ref_logps, args, device)
                    (losses.sum() * (weight * world / units)).backward()                                 # x world: DDP and FSDP divide by it
                for k, v in {"loss": losses, **metrics}.items():
                    sums[k] = sums.get(k, 0) + weight * v.detach().double().sum()
                tokens += weight * len(batch.input_ids)
            grad_norm = whole(nn.utils.clip_grad_norm_(model.parameters(), args.clip))

            # ---- the numbers of the whole batch, in one all-reduce
            values = all_sum(torch.stack([*sums.values(), torch.tensor(float(tokens), device=device, dtype=torch.float64),
                                          torch.tensor(float(stop.number), device=device, dtype=torch.float64)])).tolist()
            signalled = values.pop()
            tokens = values.pop()
            mean = {k: v / units for k, v in zip(sums, values)}
            if not (math.isfinite(mean["loss"]) and math.isfinite(grad_norm)):
                raise FloatingPointError(f"step {step}: loss {mean['loss']}, gradient norm {float(grad_norm)}; the weights were not touched. Rows of the batch: "
                                         + ", ".join(examples[row].where for row in sorted(rows)))
            rounding = max(1.0, args.beta or 0.0) * (2e-3 if args.precision == "fp32" else 0.25)             # of sums over tokens that were batched otherwise
            if step == 0 and objective is preference_objective and not args.reference and abs(mean["margin"]) > rounding:
                raise FloatingPointError(f"step 0: margin {mean['margin']:.4f} instead of 0, loss {mean['loss']:.4f} (in DPO and Step-DPO log 2 = 0.6931 is expected): "
                                         "the reference's log-probs are not this model's")
            optimizer.step()
            optimizer.zero_grad()

            # ---- say it
            seconds = time.perf_counter() - clock
            record = {"step": step, **mean, "grad_norm": float(grad_norm), "lr": lr, "tokens_per_second": round(tokens / seconds, 1), "seconds": round(seconds, 4)}
            if rank == 0:
                append(out / "metrics.jsonl", record)
            if total <= 30 or step in (done, total - 1) or time.perf_counter() - spoke > 5:
                spoke = time.perf_counter()
                left = timedelta(seconds=round((spoke - begun) / (step + 1 - done) * (total - step - 1)))
                cells = [f"{step:>8}" if c == "step" else f"{record.get(c, math.nan):>{max(8, len(c))}{'.3g' if c == 'lr' else '.4f'}}" for c in columns]
                say("  ".join(cells) + f"  {record['tokens_per_second']:>8,.0f}  {left}", flush=True)
            if step + 1 < total and (signalled or args.checkpoint_every and (step + 1) % args.checkpoint_every == 0):
                save_checkpoint(out / "checkpoint", step + 1, model, optimizer, rank)
                if signalled:
                    number = stop.number or signal.SIGTERM
                    say(f"stopped by {signal.Signals(number).name} after step {step}; the same command continues from here")
                    return 128 + number

    # ---- the end
    if held_out:
        evaluate(policy, held_out, ref_held_out, objective, args, rank, world, device, total, out)
    if rank == 0 or not replicated:
        with writing(out / "model.safetensors"):
            model.save_pretrained(out, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[args.save_dtype],
                                  eos_ids=() if args.method == "stepdpo" else tokenizer.stop_ids(args.prompt))     # a step teaches no end
    if rank == 0:
        write_json(out / "run.json", {**json.loads((out / "run.json").read_text()), "finished": True})
        shutil.rmtree(out / "checkpoint", ignore_errors=True)
        say(f"saved {out}")
    barrier()
    return 0


@torch.no_grad()
def evaluate(policy: Policy, examples: list, ref_logps, objective, args, rank, world, device, step: int, out: Path):
    """Held-out loss, margin and preference accuracy (Fig. 2 of the paper) after `step` updates: one line of eval.jsonl."""
    policy.eval()
    sums: dict[str, torch.Tensor] = {}
    for rows, weight in in_step(scoring_plan(examples, args, world), rank):
        losses, metrics = judge(policy, objective, data.collate(examples, rows).to(device), ref_logps, args, device)
        for k, v in {"loss": losses, **metrics}.items():
            sums[k] = sums.get(k, 0) + weight * v.double().sum()
    policy.train()
    means = (all_sum(torch.stack(list(sums.values()))) / len(examples)).tolist()
    record = {"step": step, **dict(zip(sums, means))}
    if rank == 0:
        append(out / "eval.jsonl", record)
        print(f"held out, after {step} updates: " + ", ".join(f"{k} {record[k]:.4f}" for k in ("loss", "accuracy", "margin") if k in record), flush=True)


def barrier():
    if dist.is_initialized():
        dist.barrier()


def keep_lines(path: Path, below: int):
    """Drop the lines of steps that will be run again, and a last line that was cut off by a kill."""
    if path.exists():
        kept = []
        for line in path.read_text().splitlines():
            try:
                kept += [line] if json.loads(line)["step"] < below else []
            except ValueError:
                pass
        with written(path) as aside:
            aside.write_text("".join(line + "\n" for line in kept))


def check_vocabulary(examples: list, model: Llama, folder: Path):
    largest = max(int(part.max()) for e in examples for part in e.sides)
    if largest >= model.config.vocab_size:
        raise CheckpointError(f"{folder}: tokenizer.json gives token {largest}, config.json says vocab_size {model.config.vocab_size}: they do not belong together")


# ---------------------------------------------------------------------------------------------------------------------
# command line

DEFAULTS = {   # the paper's settings for 7B models (appendix)
    "sft": dict(lr=5e-6, epochs=3, batch_size=256, warmup=0.03, schedule="linear"),
    "dpo": dict(lr=5e-7, epochs=8, batch_size=128, warmup=0.10, schedule="cosine"),
    "stepdpo": dict(lr=5e-7, epochs=8, batch_size=128, warmup=0.10, schedule="cosine"),
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="stepdpo.py", description="Train a Llama / Qwen / Mistral checkpoint with SFT, DPO or Step-DPO.",
                                  epilog="One method's options: python stepdpo.py stepdpo --help")
    methods = top.add_subparsers(dest="method", required=True, metavar="{sft,dpo,stepdpo}")
    about = {"sft": ("supervised fine-tuning on whole (chosen) answers", "rows with prompt, response; or with the columns of Math-Step-DPO-10K"),
             "dpo": ("DPO on whole answers, Eq. 1", "rows with the columns of Math-Step-DPO-10K; or prompt, chosen, rejected"),
             "stepdpo": ("Step-DPO on single steps, Eq. 2", "rows with prompt, initial_reason_steps, chosen, rejected")}
    for method, (title, rows) in about.items():
        d = DEFAULTS[method]
        p = methods.add_parser(method, help=title, description=title[0].upper() + title[1:] + ". Writes OUT as a Hugging Face checkpoint folder. "
                               "Interrupted (Ctrl-C, kill, power cut), the same command continues.")
        g = p.add_argument_group("what")
        g.add_argument("--model", required=True, metavar="FOLDER", help="checkpoint folder in Hugging Face layout, or a hub id; in DPO also the reference")
        g.add_argument("--data", required=True, metavar="FILE", help=f".jsonl, .json, .parquet or a hub dataset id: {rows}")
        g.add_argument("--out", required=True, metavar="OUT", help="folder for the trained checkpoint, metrics.jsonl and run.json")
        g.add_argument("--prompt", default="chat", choices=data.PROMPT_STYLES,
                       help="how a question becomes a prompt; chat (default): the checkpoint's own template; raw: the text as it stands")
        g.add_argument("--seed", type=int, default=0, help="of the order of the rows (default 0)")
        g.add_argument("--restart", action="store_true", help="begin anew where OUT holds an earlier run")
        g = p.add_argument_group("optimisation (defaults: the paper's, for 7B models)")
        g.add_argument("--epochs", type=int, default=d["epochs"], help=f"default {d['epochs']}; the paper takes {'2' if method == 'sft' else '4'} above 30B")
        g.add_argument("--batch_size", type=int, default=d["batch_size"], help=f"rows an update, over all processes (default {d['batch_size']})")
        g.add_argument("--lr", type=float, default=d["lr"], help=f"peak learning rate of AdamW (default {d['lr']:g})")
        g.add_argument("--warmup", type=float, default=d["warmup"], help=f"share of the updates in which lr rises (default {d['warmup']:g})")
        g.add_argument("--schedule", choices=("linear", "cosine"), default=d["schedule"], help=f"how lr falls afterwards (default {d['schedule']})")
        g.add_argument("--clip", type=float, default=1.0, help="largest gradient norm (default 1.0: the trainer of the authors' code; the paper does not say)")
        g.add_argument("--max_steps", type=int, help="end after so many updates (the schedule then ends there too)")
        if method != "sft":
            g.add_argument("--beta", type=float, default=0.4, help="weight of the log-ratio (default 0.4; the paper takes 0.5 for 72B)")
            g.add_argument("--reference", metavar="FOLDER", help="another checkpoint as reference; by default it is the policy at step 0")
        else:
            p.set_defaults(beta=None, reference=None)
        g = p.add_argument_group("size and speed")
        g.add_argument("--max_length", type=int, default=1024, help="tokens of prompt and answer; longer rows are dropped, never cut (default 1024: the paper's)")
        g.add_argument("--micro_batch_size", type=int, default=16, help="most rows in one forward pass of a process (default 16)")
        g.add_argument("--micro_batch_tokens", type=int, default=8192, help="most tokens in one forward pass of a process, a longer row apart (default 8192)")
        g.add_argument("--precision", choices=("fp32", "bf16"), help="of the arithmetic; weights are fp32 either way (default bf16 on CUDA, fp32 on CPU)")
        g.add_argument("--gradient_checkpointing", action="store_true", help="recompute activations in the backward pass: a third more time, far less memory")
        g.add_argument("--compile", action="store_true", help="torch.compile the blocks' norms and MLPs: on a CPU 2 %% (fp32) to 8 %% (bf16) faster after half a "
                       "minute of compiling with a C++ compiler; not measured on a GPU")
        g.add_argument("--shard", action="store_true", help="spread weights, gradients and AdamW's moments over all processes (FSDP): for models beyond one GPU's "
                       "memory, 16 bytes a parameter; on one process it changes nothing")
        g.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
        g = p.add_argument_group("bookkeeping")
        g.add_argument("--checkpoint_every", type=int, default=100, metavar="STEPS", help="how often to save what is needed to continue (default 100; 0: never)")
        g.add_argument("--save_dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights in OUT (default fp32, as trained; bf16 halves the files)")
        if method != "sft":
            g.add_argument("--eval_data", metavar="FILE", help="held-out pairs, scored at the end; with --eval_every also before training and on the way")
            g.add_argument("--eval_every", type=int, default=0, metavar="STEPS", help="default 0: only at the end")
        else:
            p.set_defaults(eval_data=None, eval_every=0)
        g.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return top


def main(argv: list[str] | None = None, objective=None) -> int:
    """The command line; returns the exit status. A variant passes its own `objective` (see `preference_objective`) and keeps everything else."""
    args = parser().parse_args(argv)
    try:
        for name in ("epochs", "batch_size", "lr", "beta", "micro_batch_size", "micro_batch_tokens", "max_length", "max_steps", "clip"):
            if (value := getattr(args, name)) is not None and not (value > 0 and (name == "clip" or math.isfinite(value))):      # --clip inf: no clipping
                raise DataError(f"--{name} is {value}: expected a number above 0")
        for name in ("eval_every", "checkpoint_every", "seed"):
            if getattr(args, name) < 0:
                raise DataError(f"--{name} is {getattr(args, name)}: expected 0 or more")
        if not 0 <= args.warmup <= 1:
            raise DataError(f"--warmup is {args.warmup}: expected a share from 0 to 1")
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":       # torchrun --max-restarts started us again: go on, do not begin anew once more
            args.restart = False
        if args.precision is None:
            args.precision = "bf16" if torch.cuda.is_available() and not (args.device or "").startswith("cpu") else "fp32"
        return train(args, objective or OBJECTIVES[args.method])
    except KeyboardInterrupt:
        print("interrupted outside the updates; the same command goes on from the last checkpoint, or begins again where there is none", file=sys.stderr)
        return 130
    except (DataError, CheckpointError, FloatingPointError, OSError, torch.cuda.OutOfMemoryError) as e:
        if args.debug:
            raise
        message = str(e)
        if isinstance(e, torch.cuda.OutOfMemoryError):
            message = f"out of GPU memory ({message.splitlines()[0]}); lower --micro_batch_tokens or --max_length, or add --gradient_checkpointing"
        if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(e, OSError):      # once a machine, not once a process; but a disk may be full for one only
            sys.stderr.write(f"error: {message}\n")
        return 2
    except RuntimeError as e:
        if args.compile and "Inductor" in type(e).__name__ and not args.debug:
            sys.stderr.write(f"error: --compile: torch.compile fails here ({str(e).splitlines()[0]}); leave it out, or see more with --debug\n")
            return 2
        if args.debug or not dist.is_initialized() or "onnection" not in str(e):
            raise
        if os.environ.get("LOCAL_RANK", "0") == "0":
            sys.stderr.write("error: another process of this run has ended; if it failed, it says why. The same command continues\n")
        return 2


if __name__ == "__main__":
    status = main()
    if dist.is_initialized() and status != 2:      # after an error the others may not be there to say goodbye to
        dist.destroy_process_group()
    sys.exit(status)
