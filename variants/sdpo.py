"""sDPO (Kim et al. 2024, arXiv 2403.19270v2): don't use your data all at once. DPO, or Step-DPO, in T stages
of one source of pairs each, where every stage starts from, and is held against, what the last one left:

    M_0 = S,    M_t = argmin  E_{D_t} [ -log sigmoid( beta [gamma_theta - gamma_{M_{t-1}}] ) ]
    gamma_pi(x, y_w, y_l) = log pi(y_w | x) - log pi(y_l | x)

The loss of a stage is plain DPO's. What is new is the reference: gamma_{M_{t-1}} is the bound that the target
must exceed, and it rises from stage to stage. So every stage begins at margin 0, loss log 2 = 0.6931; a
target that began at S would begin above it.

Order (the paper's second version): the sources by their reward accuracy under S, descending: easy first. One
source is one stage; single pairs are not sorted. --random_split pools the sources and cuts the pool into
parts of the same sizes (the paper's "Rand.", which does not beat plain DPO there); --as_given keeps your
order.

Ours: reward accuracy is read as log pi_S(y_w | x) > log pi_S(y_l | x), since the DPO reward of S against
itself is 0 everywhere. KL(M_t || S), which no stage controls, is estimated on samples after each stage:
chained optima multiply, M_T ~ S exp(sum_t r_t / beta_t), so compare with DPO at a smaller beta, of equal KL.
The loss is certain (the paper was read); lr, schedule, batch, epochs and beta are those of Tunstall et al.
2023, whom the paper says that it follows without printing them. No code was released.

    python -m examples.siblings --method sdpo --out runs/siblings --seeds 0,1,2,3,4       the embedded task
    python -m variants.sdpo dpo --model SFT --data orca.jsonl --more_data feedback.jsonl --out OUT     one GPU
    torchrun --nproc_per_node 8 -m variants.sdpo dpo --model SFT --data orca.jsonl \\
        --more_data feedback.jsonl --gradient_checkpointing --shard --out OUT

OUT becomes M_T; OUT/stage1 .. hold M_1 .. M_(T-1), OUT/sdpo.json what is printed about the stages. Killed at
any moment, the same command goes on.

Shapes: n pairs of a stage, K responses of an example. """
import argparse
import copy
import math
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

import data
import stepdpo
from data import DataError, Example
from model import (Llama, choose_device, fingerprint, home_of, join_processes, leave_processes, locked,
                   read_json, resolve, samples)

# Tunstall et al. 2023 (Zephyr), Section 4.3
DEFAULTS = dict(lr=5e-7, epochs=3, batch_size=32, warmup=0.10, schedule="linear", beta=0.1)


def options(group):
    add = group.add_argument
    add("--more_data", nargs="+", default=[], metavar="FILE", help="the other sources, beside --data")
    how = group.add_mutually_exclusive_group()
    how.add_argument("--random_split", action="store_true",
                     help="stages of randomly chosen pairs instead of one source each, of the same sizes")
    how.add_argument("--as_given", action="store_true", help="keep the sources' order, not easy first")
    add("--kl_samples", type=int, metavar="N",
        help="prompts on which KL(M_t || S) is estimated after each stage (default 128; 0: not at all, which "
             "is the default with --shard, as a sharded model cannot sample)")


def chain(args) -> int:
    """All stages; the exit status of the last one that ran."""
    out, device = Path(args.out), choose_device(args.device)
    join_processes()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    stepdpo.check_out(out, args)
    plan = read_plan(out, args, device)
    stages = plan["stages"]
    reference = args.model                                                      # M_(t-1); M_0 = S
    for t, stage in enumerate(stages, 1):
        target = out if t == len(stages) else out / f"stage{t}"                 # where M_t goes
        examples = encoded(data.read_rows(stage["file"]), args)
        if "gamma_of_reference" not in stage:
            stage["reference"] = fingerprint(resolve(reference), base_of(reference, args))
            stage |= gamma_figures("reference", gammas(reference, examples, args, device))
            keep(out, plan)
        stepdpo.say(
            f"\n---- stage {t} of {len(stages)}: {stage['file']}, {len(examples):,} pairs -> {target}\n"
            f"start and reference: {reference} (sha256 {stage['reference'][:12]}); on these pairs gamma "
            f"{stage['gamma_of_reference']:+.2f}, reward accuracy {stage['accuracy_of_reference']:.1%} "
            f"(S: {stage['gamma_of_S']:+.2f}, {stage['accuracy_of_S']:.1%})")
        if status := stepdpo.train(arguments_of_stage(args, reference, stage["file"], target),
                                   stepdpo.preference_objective):
            return status
        if "last_loss" not in stage:
            losses = [row["loss"] for _, row in data.read_rows(target / "metrics.jsonl")]
            stage |= {"first_loss": losses[0], "last_loss": losses[-1]}
            stage |= gamma_figures("result", gammas(target, examples, args, device))
            prompts = contexts(examples, args.kl_samples, args.seed)
            if len(prompts) > 1:                                # one alone has no standard error
                kept = out / f"stage{t}.samples.jsonl"
                stage["kl_to_S"], stage["kl_error"] = kl(target, args.model, prompts, kept, args, device)
            keep(out, plan)
        reference = target
    stepdpo.say(table(stages))
    return 0


def arguments_of_stage(args, model, file: str, out: Path) -> argparse.Namespace:
    """The command of one stage, as stepdpo.py would have parsed it."""
    of_stage = copy.copy(args)
    for name in ("more_data", "random_split", "as_given", "kl_samples"):
        delattr(of_stage, name)
    of_stage.model, of_stage.data, of_stage.out = str(model), file, str(out)
    of_stage.base = base_of(model, args)
    return of_stage


def base_of(folder, args) -> str | None:
    """--base speaks of --model alone: what a stage has left knows its own."""
    return args.base if str(folder) == args.model else None


# ----------------------------------------------------------------------------------------------------------
# the plan: which pairs make which stage

def easy_first(accuracies: list[float]) -> list[int]:
    """The sources' order: reward accuracy under S, descending; equal ones as they were given."""
    return sorted(range(len(accuracies)), key=lambda source: -accuracies[source])


def reward_accuracy(gamma: torch.Tensor) -> float:
    """Share of pairs with gamma (n,) > 0: those whose chosen side is the likelier one."""
    return (gamma > 0).double().mean().item()


def read_plan(out: Path, args, device) -> dict:
    """OUT/sdpo.json. It is made once: in their last bits scores depend on how the work is spread, and a chain
    that goes on must have the same stages."""
    files = [args.data, *args.more_data]
    if len(files) < 2:
        raise DataError("sDPO takes one stage a source: name the others with --more_data")
    sources = [list(data.read_rows(file)) for file in files]
    split = "random" if args.random_split else "as given" if args.as_given else "easy first"
    identity = {"method": args.method, "model": fingerprint(resolve(args.model), args.base),
                "split": split, "sources": [data.digest([row for _, row in rows]) for rows in sources],
                "prompt": args.prompt, "max_length": args.max_length, "seed": args.seed,
                "kl_samples": args.kl_samples}
    stepdpo.same_everywhere("sources and settings", identity, device)
    kept = out / "sdpo.json"
    known = stepdpo.all_sum(torch.tensor(float(stepdpo.processes()[0] == 0 and kept.exists()), device=device))
    if known and not args.restart:
        plan = read_json(kept)
        data.refuse_other(plan["identity"], identity, out)
        return plan
    of_source = [gammas(args.model, encoded(rows, args), args, device) for rows in sources]
    accuracies = [reward_accuracy(gamma) for gamma in of_source]
    order = range(len(files)) if args.as_given else easy_first(accuracies)
    stepdpo.say("reward accuracy under S: " + ", ".join(f"{file} {accuracy:.1%}"
                                                        for file, accuracy in zip(files, accuracies)))
    stages = [{"file": files[i]} | gamma_figures("S", of_source[i]) for i in order]
    if stepdpo.processes()[0] == 0:
        with locked(out):
            for old in out.glob("stage*"):
                shutil.rmtree(old) if old.is_dir() else old.unlink()
    if args.random_split:
        pool = [row for i in order for _, row in sources[i]]
        random.Random(f"sdpo {args.seed}").shuffle(pool)
        for t, i in enumerate(order):
            part, pool = pool[:len(sources[i])], pool[len(sources[i]):]
            named = [(f"part {t + 1}, row {n}", row) for n, row in enumerate(part, 1)]
            gamma = gammas(args.model, encoded(named, args), args, device)
            stages[t] = {"file": str(out / f"part{t + 1}.jsonl")} | gamma_figures("S", gamma)
            if stepdpo.processes()[0] == 0:
                data.write_rows(stages[t]["file"], part)
    plan = {"identity": identity, "stages": stages}
    keep(out, plan)
    return plan


def keep(out: Path, plan: dict):
    if stepdpo.processes()[0] == 0:
        stepdpo.write_json(out / "sdpo.json", plan)
    stepdpo.barrier()


# ----------------------------------------------------------------------------------------------------------
# what is measured beside

def encoded(rows, args) -> list[Example]:
    """The pairs that the loop will train on, of (where, row)s."""
    folder = resolve(args.model)
    tokenizer = data.Tokenizer.from_pretrained(folder, system=args.system, template_args=args.template_args,
                                               base=args.base)
    settings = read_json(home_of(folder, args.base) / "config.json")
    limit = settings.get("max_position_embeddings", args.max_length)
    return data.encode_dataset(rows, tokenizer, args.method, args.prompt, min(args.max_length, limit))[0]


def under(folder, scored, examples: list[Example], args, device):
    """stepdpo.score or score_tokens of examples under the checkpoint in `folder`."""
    policy = stepdpo.load_policy(folder, args, stepdpo.processes()[1], device, base_of(folder, args),
                                 trains=False)
    return scored(policy, examples, micro_batch_size=args.micro_batch_size,
                  micro_batch_tokens=args.micro_batch_tokens, precision=args.precision)


def gammas(folder, examples: list[Example], args, device) -> torch.Tensor:
    """(n,): gamma_pi = log pi(y_w | x) - log pi(y_l | x) of each pair, in nats."""
    chosen_logps, rejected_logps = under(folder, stepdpo.score, examples, args, device).unbind(1)
    return chosen_logps - rejected_logps


def gamma_figures(of: str, gamma: torch.Tensor) -> dict[str, float]:
    return {f"gamma_of_{of}": gamma.mean().item(), f"accuracy_of_{of}": reward_accuracy(gamma)}


def contexts(examples: list[Example], count: int, seed: int) -> list[list[int]]:
    """Token ids of so many different prompts (in Step-DPO with the steps so far), drawn at random."""
    different = {example.sides[0][:example.start].tobytes(): example for example in examples}
    drawn = random.Random(seed).sample(list(different.values()), min(count, len(different)))
    return [example.sides[0][:example.start].tolist() for example in drawn]


def kl(folder, start, prompts: list[list[int]], kept: Path, args, device) -> tuple[float, float]:
    """KL(pi || S) in nats an answer, and its standard error, of the checkpoints in `folder` and `start`: from
    one sample y ~ pi (temperature 1, the whole distribution) to each prompt. The samples are kept in the file
    `kept`.

    With d_t = log S - log pi of token t, -sum_t d_t has the right mean; sum_t (exp d_t - 1 - d_t) has it too,
    as E exp d_t = 1, is never negative, and spreads far less."""
    tokenizer = data.Tokenizer.from_pretrained(resolve(folder))
    ends = sorted(tokenizer.stop_ids(args.prompt))
    longest = max(1, args.max_length - max(map(len, prompts)))

    def work(journal, rank: int, world: int):
        model = None
        for at in range(rank * BATCH, len(prompts), world * BATCH):             # a batch is made whole
            batch = range(at, min(at + BATCH, len(prompts)))
            if all((i,) in journal.done for i in batch):
                continue
            model = model or Llama.from_pretrained(resolve(folder), device=device)
            for b, _, sample in samples(model, [prompts[i] for i in batch], max_new_tokens=longest,
                                        temperature=1.0, eos_ids=ends, seed=args.seed):
                ended = ends[:1] if sample.stop_reason == "eos" else []
                journal.add((batch[b],), [*sample.token_ids, *ended])

    def collect(done: dict):
        rows = [{"context": prompts[i], "sample": done[i,]} for i in range(len(prompts))]
        return [row | {"text": tokenizer.decode(row["sample"])} for row in rows], {}

    settings = {"model": fingerprint(resolve(folder)), "prompts": data.digest(prompts), "seed": args.seed,
                "max_new_tokens": longest}
    data.stage(kept, settings, work, collect, args.restart)
    drawn = [example_of(f"sample {i}", row) for i, (_, row) in enumerate(data.read_rows(kept))]
    logps = under(folder, stepdpo.score_tokens, drawn, args, device)
    start_logps = under(start, stepdpo.score_tokens, drawn, args, device)
    d = [s.double() - p.double() for p, s in zip(logps, start_logps)]
    kls = torch.stack([(d_t.exp() - 1 - d_t).sum() for d_t in d])
    return kls.mean().item(), (kls.std() / math.sqrt(len(kls))).item()


BATCH = 32          # samples drawn together


def example_of(where: str, row: dict) -> Example:
    """A sample as an Example whose one response is what was sampled."""
    start, tokens = len(row["context"]), np.array(row["context"] + row["sample"], dtype=np.int32)
    return Example(where, [tokens], start, [np.zeros(len(tokens) - start, dtype=np.int32)])


def table(stages: list[dict]) -> str:
    heads = ("gamma of S", "of M_t-1", "of M_t", "acc. of S", "of M_t-1", "first loss", "last loss",
             "KL(M_t || S)  ")
    lines = ["", "stage" + "".join(f"{head:>{max(10, len(head)) + 2}}" for head in heads) + "  source"]
    for t, s in enumerate(stages, 1):
        distance = f"{s['kl_to_S']:.3f} +- {s['kl_error']:.3f}" if "kl_to_S" in s else ""
        cells = [f"{s['gamma_of_S']:+.2f}", f"{s['gamma_of_reference']:+.2f}", f"{s['gamma_of_result']:+.2f}",
                 f"{s['accuracy_of_S']:.1%}", f"{s['accuracy_of_reference']:.1%}", f"{s['first_loss']:.4f}",
                 f"{s['last_loss']:.4f}", distance]
        row = "".join(f"{cell:>{max(10, len(head)) + 2}}" for head, cell in zip(heads, cells))
        lines.append(f"{t:>5}{row}  {s['file']}")
    return "\n".join([*lines, "gamma: mean log pi(chosen) - log pi(rejected) on the stage's own pairs (M_t "
                      "has been trained on them); KL in nats an answer"])


def main(argv: list[str] | None = None) -> int:
    args = stepdpo.parser(options, __doc__, DEFAULTS).parse_args(argv)

    def run() -> int:
        stepdpo.settle(args)
        if args.method == "sft" or args.reference:
            raise DataError("sDPO is a chain of dpo or stepdpo runs, each against what the last one left: "
                            f"{'--reference' if args.reference else 'sft'} has no place in it")
        if args.kl_samples is None:
            args.kl_samples = 0 if args.shard else 128
        if args.kl_samples < 0 or args.kl_samples == 1:
            raise DataError(f"--kl_samples is {args.kl_samples}: expected 0, or 2 and more")
        if args.kl_samples and args.shard:
            raise DataError("--kl_samples: a sharded model cannot sample; give 0")
        return chain(args)
    return data.run_command(run, args.debug)


if __name__ == "__main__":
    sys.exit(leave_processes(main()))
