"""SCDPO, Step-Controlled DPO (Lu et al. 2024, arXiv 2407.00782): answers that go wrong after a known step.

Of a right solution t_0 .. t_m keep t_0 .. t_k, and let the model go on from there under a rising temperature
until the answer is wrong. The right tail against the wrong one, both to the end of the solution, is a pair:

    L_SC     -log sigmoid( beta log pi/ref (right tail | x, t_0..t_k)
                         - beta log pi/ref (wrong tail | x, t_0..t_k) )
    L_SCDPO  L_SC on these pairs + DPO on naive pairs (whole answers, sampled apart): one shuffled file

    temperature of the i-th step after the fork     min(1.1 + 0.05 i, 1.4)
    credit of a step, summed over its tokens        beta (log pi - log pi_SFT)

No new loss is needed. The kept steps stand in both answers and cancel, so `dpo` on the two whole answers is
L_SC; log pi/ref and the log 2 of the first update are stepdpo.py's. So this file makes data and reads credit:

    pairs    sample the naive pairs, then the wrong tails; filter; mix
    train    stepdpo.py dpo with the paper's settings: lr 1e-7, 2 epochs, batch 64, beta 0.1 (all its flags)
    credit   print the credit of every step of solutions: where does the trained model see the error?

    python -m examples.siblings --method scdpo --out runs/siblings --seeds 0,1,2,3,4         the embedded task

    python -m variants.scdpo pairs --model SFT --problems train.jsonl --out pairs.jsonl              one GPU
    python -m variants.scdpo train --model SFT --data pairs.jsonl --out OUT
    python -m variants.scdpo credit --model OUT --reference SFT --attempts score.jsonl

    torchrun --nproc_per_node 8 -m variants.scdpo pairs --model SFT ...                             eight
    torchrun --nproc_per_node 8 -m variants.scdpo train --model SFT --data pairs.jsonl --shard --out OUT

Killed at any moment, the same command goes on. Each command has its own --help.

How sure: loss, temperatures, K = 100 tries, the words that no right answer may hold and the settings are the
paper's text. From the released code alone: no fork within the last two steps, the garble filter, and the cap
on pairs a problem (2 for GSM8K, 3 for MATH). The released ramp rises by 0.1, not 0.05: --rise 0.1. Ours: a
cap drawn at random over k (the release keeps the earliest forks), what counts as a near-duplicate (every step
comes to the same; the release compares lengths), K as a bound on the tries of a fork too (the paper says
"until"), and temperatures that rise by step where the release has blocks of text, code and output. """
import argparse
import itertools
import math
import os
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Sequence

import torch

import data
import stepdpo
from data import DataError, Journal, split_steps, stage
from eval import Problem, Remote, Sampler, grade, make_distinct, next_steps, read_problem
from model import Llama, choose_device, join_processes, leave_processes, read_json, resolve

TRAINING = dict(lr=1e-7, epochs=2, batch_size=64, beta=0.1)         # warm-up 0.1 and cosine are DPO's own


# ----------------------------------------------------------------------------------------------------------
# the method: where to fork, how hot, what is a pair

def temperature(i: int, rise: float = 0.05, start: float = 1.1, cap: float = 1.4) -> float:
    """Of the i-th step sampled since the fork, i = 0, 1, ...: hot enough to err, not so hot at once that the
    text falls apart. It does not depend on where the fork is. rise 0.05: the paper; 0.1: its code."""
    return min(start + rise * i, cap)


def fork_points(roles: Sequence[str]) -> list[int]:
    """How many blocks of a right solution may be kept: none, or those up to any block of role "text" or
    "execution" (not "code": its output has to follow) that is not one of the last two."""
    return [0, *(b + 1 for b, role in enumerate(roles[:-2]) if role in ("text", "execution"))]


def draw_forks(steps: Sequence[str], most: int, rng: random.Random) -> list[int]:
    """At most `most` different numbers of steps to keep, 1 or more, drawn uniformly, in random order. (To
    keep none would be a naive pair.)"""
    points = fork_points(["text"] * len(steps))[1:]
    return rng.sample(points, min(most, len(points)))


def pairs_of(right: Sequence[str], wrong: Sequence[tuple[int, Sequence[str]]],
             most: int) -> list[tuple[str, str, str]]:
    """(kept steps, right tail, wrong tail) of each of the first `most` wrong solutions to a problem.

    right: the steps of the right solution, [] where there is none. wrong: (steps kept of it, all steps of the
    wrong solution, which begins with them)."""
    if not right:
        return []
    text = "".join
    return [(text(right[:k]), text(right[k:]), text(solution[k:])) for k, solution in wrong[:most]]


# ----------------------------------------------------------------------------------------------------------
# filters

APOLOGIES = ("error", "apolog")             # a right answer that found out about a mistake on its way
MOST_BLOCKS, LONGEST_BLOCK = 24, 3000       # the system's and the user's turn count as two
STRAY = re.compile(r"<\|\w+\|>")            # a mark that is no text, as <|execution|>


def apologises(text: str) -> bool:
    return any(word in text.lower() for word in APOLOGIES)


def garbled(steps: Sequence[str]) -> bool:
    """Whether a solution has fallen apart: too many steps, a step without an end, or a stray mark."""
    return len(steps) + 2 > MOST_BLOCKS or any(len(step) > LONGEST_BLOCK or STRAY.search(step)
                                               for step in steps)


def alike(a: Sequence[str], b: Sequence[str], style: str) -> bool:
    """Whether two solutions are near-duplicates: as many steps, and each comes to the same value (without
    values: is in the same words)."""
    return len(a) == len(b) and all(data.same_step(x, y, style) for x, y in zip(a, b))


def verdict(steps: Sequence[str], answer: str, ended: bool, tokenizer: data.Tokenizer) -> str:
    """"right", "wrong", "garbled", or "unfinished" of a sampled solution. A wrong one gives an answer, and
    ends: training puts the end token there. What training would refuse (a control token that was written in
    letters, say) is garbled, too."""
    try:
        tokenizer.check("".join(steps))
    except data.Unfit:
        return "garbled"
    if garbled(steps):
        return "garbled"
    extracted, correct = grade("".join(steps), answer)
    if not ended or extracted is None:
        return "unfinished"
    return "right" if correct else "wrong"


# ----------------------------------------------------------------------------------------------------------
# sampling: until the answer is wrong

@dataclass(frozen=True)
class Fork:
    problem: Problem
    right: tuple[str, ...]          # the steps of the right solution
    k: int                          # how many of them are kept: the (k+1)-th may be the first wrong one


def sample_tails(sampler: Sampler | Remote, forks: Sequence[Fork], heat: Callable[[int], float], seed: int,
                 style: str, max_new_tokens: int) -> list[tuple[list[str], bool]]:
    """One continuation of each fork: (its steps, whether it came to its own end). heat: temperature of the
    i-th of them. A step at a time, so that a server can be asked as well."""
    tails: list[list[str]] = [[] for _ in forks]
    ended: dict[int, bool] = {}
    for i in itertools.count():
        live, partial = [], []
        for f, fork in enumerate(forks):
            if f in ended:
                continue
            so_far = [*fork.right[:fork.k], *tails[f]]
            if garbled(so_far) or not readable(sampler, fork.problem, "".join(so_far)):
                ended[f] = False
                continue
            live.append(f)
            partial.append((fork.problem, "".join(so_far)))
        if not live:
            return [(tail, ended[f]) for f, tail in enumerate(tails)]
        found = next_steps(sampler, partial, 1, heat(i), seed=seed, max_new_tokens=max_new_tokens,
                           steps=style)
        for f, ((step, over),) in zip(live, found):
            tails[f].append(step)
            if over is not False:                       # None: the step was cut off
                ended[f] = over is True


def readable(sampler: Sampler | Remote, problem: Problem, text: str) -> bool:
    """Whether the model can go on from here: there is room, and no control token was written as text."""
    try:
        sampler.prepare(problem, text)
    except DataError:
        return False
    return True


def until_wrong(forks: list[Fork], sampler, args, journal: Journal, rank: int, world: int) -> None:
    """Journal (fork, try) -> [verdict, steps of the tail], a round of tries after the other, each of the
    forks that have not gone wrong yet. This process takes every world-th fork. A batch is sampled whole, so
    that each tail has the same neighbours, whether the run was disturbed or not."""
    heat = lambda i: temperature(i, args.rise, args.temperature, args.cap)
    mine = range(rank, len(forks), world)
    wrong: set[int] = set()
    with data.progress(len(mine), 0, "forks", quiet=rank > 0) as bar:
        for t in range(args.tries):
            trying = [f for f in mine if f not in wrong]
            if not trying:
                break
            bar.set_description(f"try {t + 1}, {len(trying)} forks open")
            for at in range(0, len(trying), args.batch_size):
                batch = trying[at:at + args.batch_size]
                if not all((f, t) in journal.done for f in batch):
                    found = sample_tails(sampler, [forks[f] for f in batch], heat, 1000 * args.seed + t,
                                         args.steps, args.max_new_tokens)
                    for f, (tail, ended) in zip(batch, found):
                        fork = forks[f]
                        said = verdict([*fork.right[:fork.k], *tail], fork.problem.answer, ended,
                                       sampler.tokenizer)
                        journal.add((f, t), [said if "".join(tail).strip() else "unfinished", tail])
                new = {f for f in batch if journal.done[f, t][0] == "wrong"}
                wrong |= new
                bar.update(len(new))


def until_both(problems: list[Problem], sampler, args, journal: Journal, rank: int, world: int) -> None:
    """Journal (problem, try) -> a graded sample at temperature 1, as eval.py writes it, until a problem has a
    right one and a wrong one. Rounds and shares as in `until_wrong`."""
    mine = range(rank, len(problems), world)
    seen: dict[int, set[str]] = {i: set() for i in mine}
    prompts = {i: sampler.prepare(problems[i], problems[i].prefix) for i in mine}
    with data.progress(len(mine), 0, "problems", quiet=rank > 0) as bar:
        for t in range(args.tries):
            trying = [i for i in mine if not {"right", "wrong"} <= seen[i]]
            if not trying:
                break
            bar.set_description(f"try {t + 1}, {len(trying)} problems open")
            for at in range(0, len(trying), args.batch_size):
                batch = trying[at:at + args.batch_size]
                done = {(b, 0) for b, i in enumerate(batch) if (i, t) in journal.done}
                for b, _, drawn in sampler.draw([prompts[i] for i in batch], 1, 1000 * args.seed + t, 1.0,
                                                max_new_tokens=args.max_new_tokens, done=done):
                    if isinstance(drawn, DataError):
                        raise drawn
                    problem = problems[batch[b]]
                    extracted, correct = grade(problem.prefix + drawn.text, problem.answer)
                    journal.add((batch[b], t), {
                        "id": problem.id, "question": problem.question, "answer": problem.answer, "sample": t,
                        "prefix": problem.prefix, "completion": drawn.text, "extracted": extracted,
                        "correct": correct, "tokens": drawn.tokens, "stop_reason": drawn.stop_reason,
                    } | problem.carried)
                for i in batch:
                    row, before = journal.done[i, t], len(seen[i])
                    text = row["prefix"] + row["completion"]
                    seen[i].add(use_of(row, text, args.steps, sampler.tokenizer))
                    bar.update({"right", "wrong"} <= seen[i] and len(seen[i]) > before)


def use_of(row: dict, text: str, style: str, tokenizer: data.Tokenizer) -> str:
    """`verdict` of a graded attempt; "apology" where a right one mentions an error."""
    if row["correct"] and apologises(text):
        return "apology"
    said = verdict(split_steps(text, style), row["answer"], row.get("stop_reason") != "length", tokenizer)
    if said in ("right", "wrong"):                      # as the file grades it
        return "right" if row["correct"] else "wrong"
    return said


# ----------------------------------------------------------------------------------------------------------
# python -m variants.scdpo pairs

def make_pairs(args: argparse.Namespace) -> int:
    """Problems or attempts -> the file to train on. The exit status: 1 where rows were left out."""
    rank, world = join_processes()
    bad: list[DataError] = []
    how = {"prompt": args.prompt, "system": args.system, "template_args": args.template_args,
           "base": args.base}
    if args.endpoint:
        sampler = Remote(args.endpoint, args.api_model, model=args.model, concurrency=args.batch_size, **how)
    else:
        sampler = Sampler(args.model, dtype=args.dtype, device=args.device, batch_size=args.batch_size, **how)
    names = ("tries", "max_new_tokens", "batch_size", "seed", "steps")
    common = sampler.settings | {name: getattr(args, name) for name in names}

    attempts = args.attempts
    if args.problems:
        problems = read_problems(args.problems, sampler, bad)
        attempts = str(Path(args.out).with_suffix("")) + ".attempts.jsonl"
        content = data.digest([[p.id, p.question, p.answer, p.prefix] for p in problems])
        stage(attempts, common | {"problems": content},
              lambda *journal: until_both(problems, sampler, args, *journal),
              lambda done: ([done[key] for key in sorted(done)], {}), args.restart)
    sides = read_sides(attempts, args.steps, sampler.tokenizer, bad)
    forks = make_forks(sides, sampler, args, bad)
    content = data.digest([[f.problem.question, f.problem.answer, f.right, f.k] for f in forks]
                          + [[row and row["text"] for row in side] for side in sides.values()])
    own = {name: getattr(args, name) for name in ("temperature", "rise", "cap", "per_problem")}
    made = stage(args.out, common | own | {"attempts": content},
                 lambda *journal: until_wrong(forks, sampler, args, *journal),
                 lambda done: collect(done, sides, forks, args), args.restart)
    if rank == 0:
        data.complain(bad)
        summary = read_json(data.summary_path(Path(args.out)))
        print(data.funnel(summary["funnel"]))
        print(f"{args.out}: {'' if made else 'already complete; '}{summary['pairs']} pairs to train on")
    return 1 if bad and rank == 0 else 0


def read_problems(file: str, sampler, bad: list[DataError]) -> list[Problem]:
    """Those that can be used; the others go to `bad`."""
    problems = []
    for where, row in data.read_rows(file, bad):
        try:
            problem = read_problem(where, row)
            sampler.prepare(problem, problem.prefix)
            problems.append(problem)
        except DataError as error:
            bad.append(error)
    if not problems:
        raise DataError(f"{file}: holds no problem that can be used"
                        + (f"; the first of {len(bad)}: {bad[0]}" if bad else ""))
    make_distinct(problems)
    return problems


def read_sides(file: str, style: str, tokenizer, bad: list[DataError]) -> dict[str, list]:
    """Of each problem [its first right attempt, its first wrong one]; None where there is none."""
    sides: dict[str, list] = {}
    for (id, _), row in data.read_attempts(file, bad, "attempts", "valued attempts"):
        side, use = sides.setdefault(id, [None, None]), use_of(row, row["text"], style, tokenizer)
        for place, name in enumerate(("right", "wrong")):
            if use == name and side[place] is None:
                side[place] = row
    if not any(right for right, _ in sides.values()):
        raise DataError(f"{file}: holds no right solution to fork; sample more attempts, or from problems "
                        "(--problems)")
    return sides


def make_forks(sides: dict[str, list], sampler, args, bad: list[DataError]) -> list[Fork]:
    """The forks of every problem's right solution, a problem's in random order."""
    forks = []
    for id, (right, _) in sides.items():
        if right is None:
            continue
        steps = split_steps(right["text"], args.steps)
        problem = Problem(right["where"], right["id"], right["question"], right["answer"], "", {})
        try:
            sampler.prepare(problem, right["text"])
        except DataError as error:
            bad.append(error)
            continue
        rng = random.Random(f"forks {args.seed} {id}")
        forks += [Fork(problem, tuple(steps), k) for k in draw_forks(steps, args.per_problem, rng)]
    return forks


def collect(done: dict, sides: dict[str, list], forks: list[Fork], args) -> tuple[list[dict], dict]:
    """The mix, and how it came about."""
    gone_wrong = {f: tail for (f, _), (said, tail) in done.items() if said == "wrong"}
    of_problem: dict[str, list] = {}                    # (steps kept, all steps of the wrong solution)
    for f in sorted(gone_wrong):
        solution = [*forks[f].right[:forks[f].k], *gone_wrong[f]]
        of_problem.setdefault(str(forks[f].problem.id), []).append((forks[f].k, solution))

    naive, controlled = [], []
    for id, (right, wrong) in sides.items():
        if right and wrong:
            naive.append(data.pair_of(right, "", right["text"], wrong["text"], right["text"], wrong["text"]))
        known = [split_steps(wrong["text"], args.steps)] if wrong else []
        distinct = []
        for k, solution in of_problem.get(id, []):
            if not any(alike(solution, other, args.steps) for other in known):
                known.append(solution)
                distinct.append((k, solution))
        steps = split_steps(right["text"], args.steps) if right else []
        pairs = pairs_of(steps, distinct, args.per_problem)
        for (k, solution), (kept, right_tail, wrong_tail) in zip(distinct, pairs):
            controlled.append(data.pair_of(right, kept, steps[k], solution[k], right_tail, wrong_tail))
    rows = naive + controlled
    random.Random(f"mix {args.seed}").shuffle(rows)

    said = Counter(said for said, _ in done.values())
    funnel = [("problems", len(sides)),
              ("with a right solution", sum(right is not None for right, _ in sides.values())),
              ("forks", len(forks)), ("tails", len(done)),
              *((f"    {name}", said[name]) for name in ("right", "unfinished", "garbled")),
              ("forks that went wrong", len(gone_wrong)),
              ("    near-duplicates", len(gone_wrong) - len(controlled)),
              ("step-controlled pairs", len(controlled)), ("naive pairs", len(naive))]
    return rows, {"pairs": len(rows), "tails": dict(said), "funnel": funnel}


# ----------------------------------------------------------------------------------------------------------
# python -m variants.scdpo credit

def credit(model, reference, solutions: list[tuple[str, str]], *, beta: float = 0.1, prompt: str = "chat",
           system: str | None = None, template_args: dict | None = None, base: str | None = None,
           device: str | None = None, **how) -> list[list[float]]:
    """Of each solution (question, text) the credit of its steps, as data.split_steps cuts it: beta (log pi -
    log ref), summed over a step's tokens, in nats. The end token belongs to the last step.

    model, reference: checkpoint folders or hub ids. base: of `model`, where that is a LoRA adapter whose base
    model lies elsewhere than it says. how: as stepdpo.score_tokens. Under torchrun all processes call it and
    share the work. DataError where a solution cannot be scored: none is left out."""
    tokenizer = data.Tokenizer.from_pretrained(resolve(reference), system=system, template_args=template_args)
    rows = [(f"solution {i}", {"prompt": question, "response": text})
            for i, (question, text) in enumerate(solutions, 1)]
    examples, report = data.encode_dataset(rows, tokenizer, "sft", prompt)
    if report.kept < report.rows:
        raise DataError(f"not every solution can be scored: {report}".replace("\n", "; "))

    def token_logps(folder, base=None) -> list[torch.Tensor]:
        policy = stepdpo.Policy(Llama.from_pretrained(folder, device=choose_device(device), base=base))
        return stepdpo.score_tokens(policy, examples, **how)

    found = []
    for example, logps, ref_logps in zip(examples, token_logps(model, base), token_logps(reference)):
        of_token = torch.from_numpy(example.steps[0]).long()            # (tokens,): the step of each
        rewards = beta * (logps - ref_logps).cpu()                      # (tokens,): the paper's r(s_i, x_i)
        found.append(torch.zeros(int(of_token.max()) + 1).index_add(0, of_token, rewards).tolist())
    return found


def print_credit(args: argparse.Namespace) -> int:
    """The credit of the first wrong attempts in a file, the lowest step of each marked."""
    rank, _ = join_processes()
    bad: list[DataError] = []
    rows = [row for _, row in data.read_attempts(args.attempts, bad, "attempts", "valued attempts")
            if not row["correct"] and row.get("stop_reason") != "length"][:args.limit]
    if not rows:
        raise DataError(f"{args.attempts}: holds no wrong attempt that came to its end; nothing to show")
    credits = credit(args.model, args.reference, [(row["question"], row["text"]) for row in rows],
                     beta=args.beta, prompt=args.prompt, system=args.system,
                     template_args=args.template_args, base=args.base, device=args.device)
    for row, of_steps in zip(rows, credits):
        lines = [f"\n{row['where']}: {row['question'].strip()}"]
        for step, value in zip(split_steps(row["text"]), of_steps):
            mark = ">>" if value == min(of_steps) else "  "
            lines.append(f"{value:+8.3f} {mark} " + step.strip().replace("\n", "\n" + 12 * " "))
        stepdpo.say("\n".join(lines + [f"answer {row['answer']}"]))
    data.complain(bad if rank == 0 else [])
    return 1 if bad and rank == 0 else 0


# ----------------------------------------------------------------------------------------------------------
# command line

def arguments() -> argparse.ArgumentParser:
    as_it_stands = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m variants.scdpo", description=__doc__,
                                     formatter_class=as_it_stands)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{pairs,train,credit}")
    command = commands.add_parser(
        "pairs", help="sample naive and step-controlled pairs, and mix them",
        description="Sample naive and step-controlled pairs, filter them, and write their mix: rows for "
                    "`train`, in the columns of Math-Step-DPO-10K.")
    what = command.add_argument_group("what")
    add = what.add_argument
    add("--model", required=True, metavar="M", help="the SFT model: checkpoint folder or hub id")
    source = what.add_mutually_exclusive_group(required=True)
    source.add_argument("--problems", metavar="F",
                        help="problems: each is attempted at temperature 1 until one answer is right and one "
                             "is wrong; the attempts are kept beside OUT")
    source.add_argument("--attempts", metavar="F", help="attempts that eval.py wrote, instead")
    add("--out", required=True, metavar="OUT", help="JSONL file to write")
    add("--restart", action="store_true", help="begin anew, whatever an earlier run has left at OUT")
    add("--debug", action="store_true", help="show the traceback of an error")
    add("--prompt", choices=data.PROMPT_STYLES, default="chat",
        help="how a question becomes a prompt, as in training (default: %(default)s, the checkpoint's own "
             "template)")
    data.add_chat_options(what)
    add = command.add_argument_group("step-controlled pairs").add_argument
    add("--temperature", type=float, default=1.1, metavar="T",
        help="of the first step after the fork (default: 1.1)")
    add("--rise", type=float, default=0.05, metavar="D",
        help="more with every step (default: 0.05, the paper's; its code takes 0.1)")
    add("--cap", type=float, default=1.4, metavar="T", help="the hottest (default: 1.4)")
    add("--tries", type=data.positive, default=100, metavar="K",
        help="give up a fork, or a problem, after so many (default: 100, the paper's for problems)")
    add("--per_problem", type=data.positive, default=2, metavar="N",
        help="forks of a right solution, after steps drawn at random (default: 2, as for GSM8K; 3 for MATH)")
    add = command.add_argument_group("sampling").add_argument
    add("--max_new_tokens", type=data.positive, default=1024, metavar="N",
        help="of an attempt, and of a step after a fork (default: 1024)")
    add("--steps", choices=data.STEP_STYLES, default="auto", help="how steps are labelled (default: auto)")
    add("--seed", type=int, default=0, help="default: 0")
    add("--batch_size", type=data.positive, default=64, metavar="N",
        help="samples computed together; of a server, requests under way (default: 64)")
    add("--dtype", choices=("fp32", "bf16"), help="default: bf16 on a GPU, fp32 on a CPU")
    add("--device", help="default: cuda where there is one, else cpu")
    add("--endpoint", metavar="URL", help="sample from an OpenAI-compatible server, whose key is read from "
                                          "OPENAI_API_KEY; --model gives the chat template")
    add("--api_model", metavar="NAME", help="the name that the server knows the model by")
    command.set_defaults(run=make_pairs)

    commands.add_parser("train", add_help=False,
                        help="train on them: stepdpo.py dpo with the paper's settings (train --help)")

    command = commands.add_parser(
        "credit", help="print the credit of the steps of wrong attempts",
        description="Print the credit of every step of wrong attempts: beta (log pi - log ref), summed over "
                    "the step's tokens. >> marks the lowest: where the model sees the error.")
    add = command.add_argument
    add("--model", required=True, metavar="M", help="the trained model")
    add("--reference", required=True, metavar="M", help="the model that it was trained from")
    add("--attempts", required=True, metavar="F", help="attempts that eval.py wrote")
    add("--limit", type=data.positive, default=5, metavar="N", help="of how many (default: 5)")
    add("--beta", type=float, default=TRAINING["beta"], help="as in training (default: %(default)s)")
    add("--prompt", choices=data.PROMPT_STYLES, default="chat", help="as in training (default: %(default)s)")
    data.add_chat_options(command)
    add("--device", help="default: cuda where there is one, else cpu")
    add("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(run=print_credit)
    return parser


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What argparse cannot say of `pairs`."""
    if not 0 < args.temperature <= args.cap < math.inf:
        parser.error(f"--temperature {args.temperature} --cap {args.cap}: expected 0 < T <= cap")
    if not 0 <= args.rise < math.inf:
        parser.error(f"--rise {args.rise}: expected 0 or more")
    if bool(args.endpoint) != bool(args.api_model):
        parser.error("--endpoint URL and --api_model NAME belong together")
    if args.endpoint and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("--endpoint needs no torchrun: --batch_size says how many requests are under way")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done; 1 rows were left out (named on stderr); 2 an error; 130 interrupted."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["train"]:
        return stepdpo.main(["dpo", *argv[1:]], defaults=TRAINING)
    parser = arguments()
    args = parser.parse_args(argv)

    def run() -> int:
        if args.command == "pairs":
            check(parser, args)
            data.check_out(args.out, args.problems or args.attempts)
        return args.run(args)
    return data.run_command(run, args.debug)


if __name__ == "__main__":
    sys.exit(leave_processes(main()))
