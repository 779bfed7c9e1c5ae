"""StepCo (Wu et al. 2025, arXiv 2410.12934): stepwise correction, at inference. A verifier reads a solution
step by step; what stands before the first doubtful step is kept, the rest is written anew, at most T times.

    p_i = PRM(x, s_1..s_i)        k_t = min { i : p_i < theta, i >= k_(t-1) }        none: done

Nothing is trained here. The verifier is a model of variants/prm.py, whose value is the chance that the
sampler comes right from a prefix. So theta is a statement about the sampler as well: of one that comes right
from 22 % of the right prefixes, theta = 0.5 doubts nearly everything, right solutions included.

From the paper, through a secondary note that matches the released code: the loop, T = 5, theta = 0.5, later
rounds never cut before an earlier one (the code has not that). Temperature 0.7 and top-p 0.95 are the code's,
which also ends when the whole path scores at least theta, and when two answers in a row are equal:
--whole_path_exit and --equal_answers_exit, off by default. The paper asks its model to revise from step k,
which has p_k percent; a small model cannot follow that, so here the tail is sampled anew from before step k.
With --endpoint and --instruct a served model is asked (in our words: REVISE).

    python -m examples.siblings --method stepco --out runs/siblings --seeds 0,1,2,3,4  the embedded task

    python -m variants.stepco --model SFT --prm PRM --problems test.jsonl --out OUT.jsonl             one GPU
    torchrun --nproc_per_node 8 -m variants.stepco --model SFT --prm PRM --problems test.jsonl --out OUT.jsonl
    python -m variants.stepco --endpoint URL --api_model NAME --instruct --prm PRM --problems F --out O.jsonl

Every generated token is counted in `tokens`, also of what was thrown away; what the verifier reads is counted
apart. --checker takes an exact checker for the verifier: the ceiling. --cut random is the control: cut where
chance says, whenever the verifier doubts anything.

OUT.jsonl holds attempts, as eval.py writes them. OUT.revisions.jsonl holds every revision of a wrong path as
a rectified attempt, s_k as its rejected step: `python data.py pairs OUT.revisions.jsonl --out pairs.jsonl`
makes Step-DPO pairs of those that came right. (That bridge is ours.) """
import argparse
import itertools
import random
import sys
from pathlib import Path
from typing import Callable, NamedTuple

import data
from data import DataError
from eval import (Problem, Prompt, Remote, Sampler, extract_answer, grade, is_equivalent, read_problem,
                  summarize, table)
from model import leave_processes, stable_key
from stepdpo import processes
from variants.prm import PRM

REVISE = """{question}

Somebody solved this in steps:

{steps}

A verifier reads such solutions one step at a time. It doubts step {k}: it gives a solution that goes this \
far a chance of {percent:.0f} % to come right. Keep what stands before step {k}. Write step {k} again, \
correctly, and then everything after it up to the final answer, in the same form and with the same labels. \
Begin with step {k}; do not repeat what is kept, and say nothing about the verifier."""


# ----------------------------------------------------------------------------------------------------------
# the loop

class Written(NamedTuple):
    """One path: a whole solution, and what its new part took."""
    text: str
    tokens: int | None                  # None where a server does not say
    stop_reason: str


class Verdict(NamedTuple):
    """What the verifier says of one path."""
    steps: list[float]                  # p_i of each step
    whole: float                        # of the path as a whole


class Revision(NamedTuple):
    step: int                           # index of the first rewritten step
    score: float                        # what the verifier gave it


class History(NamedTuple):
    """All that happened to one problem: path 0, revision 0 -> path 1, ..."""
    paths: list[Written]
    revisions: list[Revision]
    reads: int                          # paths that the verifier read


def first_below(scores: list[float], theta: float, start: int = 0) -> int | None:
    """Index of the first step, from `start` on, that scores below theta; None where there is none."""
    return next((i for i in range(start, len(scores)) if scores[i] < theta), None)


def random_cut(key) -> Callable:
    """The control: where `first_below` finds a step, any step may be cut at. (Not only later ones: cuts that
    can but move on would soon stand at the end.)"""
    def cut(scores, theta, start=0):
        if first_below(scores, theta) is None:
            return None
        return random.Random(stable_key(key, scores, len(scores))).randrange(len(scores))
    return cut


def correct_stepwise(first: list[Written], revise: Callable, verify: Callable, *, theta: float = 0.5,
                     rounds: int = 5, cut: Callable = first_below, whole_path_exit: bool = False,
                     equal_answers_exit: bool = False) -> list[History]:
    """The loop, for many problems abreast. first: a path for each.

    verify([(b, path)]) -> [Verdict]; revise([(b, path, k, p_k)], round) -> [Written], whole solutions that
    keep the steps before k of problem b's path; None for a path that cannot be revised, which is then final.
    cut(scores, theta, start) -> k or None."""
    histories = [History([path], [], 0) for path in first]
    live = list(range(len(first)))
    for turn in range(rounds):
        verdicts = verify([(b, histories[b].paths[-1]) for b in live])
        asked = []
        for b, verdict in zip(live, verdicts):
            paths, revisions, reads = histories[b]
            histories[b] = History(paths, revisions, reads + 1)
            if whole_path_exit and verdict.whole >= theta:
                continue
            if equal_answers_exit and len(paths) > 1 and same_answer(*paths[-2:]):
                continue
            k = cut(verdict.steps, theta, revisions[-1].step if revisions else 0)
            if k is not None:
                asked.append((b, paths[-1], k, verdict.steps[k]))
        live = []
        for (b, _, k, score), path in zip(asked, revise(asked, turn + 1) if asked else []):
            if path is not None:
                histories[b].revisions.append(Revision(k, score))
                histories[b].paths.append(path)
                live.append(b)
        if not live:
            break
    return histories


def same_answer(a: Written, b: Written) -> bool:
    one, other = extract_answer(a.text), extract_answer(b.text)
    return one is not None and other is not None and is_equivalent(one, other)


# ----------------------------------------------------------------------------------------------------------
# who writes, and who verifies

class Writer:
    """First paths, and revisions, of a batch of problems. A DataError stands for one that a server failed to
    write; None for a revision of a path that cannot be read on from: it holds a control token, say."""

    def __init__(self, sampler: Sampler | Remote, args):
        self.sampler, self.args = sampler, args

    def first(self, problems: list[Problem]) -> list[Written | DataError]:
        prompts = [self.sampler.prepare(problem, problem.prefix) for problem in problems]
        return self.draw(prompts, 0, 0.0 if self.args.greedy_first else self.args.temperature)

    def revise(self, asked: list[tuple[Problem, Written, int, float]],
               turn: int) -> list[Written | DataError | None]:
        how, prompts = self.instruct if self.args.instruct else self.resample, {}
        for i, each in enumerate(asked):
            try:
                prompts[i] = how(*each)
            except DataError as error:
                print(f"{error}; this path is left as it is", file=sys.stderr)
        written = dict(zip(prompts, self.draw(list(prompts.values()), turn, self.args.temperature)))
        return [written.get(i) for i in range(len(asked))]

    def resample(self, problem: Problem, path: Written, k: int, score: float) -> Prompt:
        """The sampler goes on from before step k; it writes that step's label too."""
        kept = sum(map(len, data.split_steps(path.text, self.args.steps)[:k]))
        return self.sampler.prepare(problem, path.text, max(kept, len(problem.prefix)))

    def instruct(self, problem: Problem, path: Written, k: int, score: float) -> Prompt:
        """A chat model is asked to rewrite from step k on; its words follow the steps that are kept."""
        steps = data.split_steps(path.text, self.args.steps)
        kept = "".join(steps[:k])
        gap = steps[k][:len(steps[k]) - len(steps[k].lstrip())]         # the line break before its label
        said = REVISE.format(question=problem.question, steps=path.text.strip(), k=k + 1, percent=100 * score)
        body = {"messages": [{"role": "user", "content": said}]}
        return Prompt((problem.where, body), kept + gap, True)

    def draw(self, prompts: list[Prompt], turn: int, temperature: float) -> list[Written | DataError]:
        """One sample of each prompt, behind the text that it holds."""
        found: list = [None] * len(prompts)
        how = dict(top_p=self.args.top_p, max_new_tokens=self.args.max_new_tokens)
        for i, _, drawn in self.sampler.draw(prompts, 1, 1000 * self.args.seed + turn, temperature, **how):
            if isinstance(drawn, DataError):
                found[i] = drawn
                continue
            said = drawn.text
            if self.args.instruct and turn:
                said = data.THOUGHT_ENDS.split(said)[-1].strip()
                if prompts[i].text.strip() and said.startswith(prompts[i].text.strip()):     # it repeats all
                    said = said[len(prompts[i].text.strip()):].lstrip()
            found[i] = Written(prompts[i].text + said, drawn.tokens, drawn.stop_reason)
        return found


def verifier(args) -> tuple[Callable, dict]:
    """(verify: [(Problem, Written)] -> [Verdict], what decides its verdicts)."""
    split = lambda path: data.split_steps(path.text, args.steps)
    if args.checker:
        judge = data.function_judge(args.checker)

        def exact(asked):
            verdicts = []
            for problem, path in asked:
                steps = split(path)
                wrong = judge({"question": problem.question, "steps": steps, "answer": problem.answer})
                scores = [float(wrong is None or i < wrong) for i in range(len(steps))]
                verdicts.append(Verdict(scores, scores[-1]))
            return verdicts
        return exact, {"checker": args.checker}
    prm = PRM(args.prm, args.prompt, device=args.device, system=args.system, template_args=args.template_args)

    def learned(asked):
        verdicts, read = [Verdict([], 1.0)] * len(asked), {}            # of a path that it cannot read
        for i, (problem, path) in enumerate(asked):
            try:
                read[i] = prm.read(problem.where, problem.question, split(path))
            except DataError as error:
                print(f"{error}; this path is left as it is", file=sys.stderr)
        for i, scores in zip(read, prm.scores(list(read.values()))):
            verdicts[i] = Verdict(scores, scores[-1])
        return verdicts
    return learned, {"prm": prm.settings}


# ----------------------------------------------------------------------------------------------------------
# rows

def row_of(problem: Problem, history: History) -> dict:
    """An attempt, as eval.py writes them, with its history."""
    final, tokens = history.paths[-1], [path.tokens for path in history.paths]
    extracted, correct = grade(final.text, problem.answer)
    return {"id": problem.id, "question": problem.question, "answer": problem.answer, "sample": 0,
            "prefix": problem.prefix, "completion": final.text[len(problem.prefix):], "extracted": extracted,
            "correct": correct, "tokens": None if None in tokens else sum(tokens),
            "stop_reason": final.stop_reason, "reads": history.reads,
            "first_correct": grade(history.paths[0].text, problem.answer)[1],
            "paths": [path._asdict() for path in history.paths],
            "revisions": [{"step": k + 1, "score": p} for k, p in history.revisions]} | problem.carried


def bridge(row: dict, style: str) -> list[dict]:
    """The revisions of wrong paths as rectified attempts (see data.localize): prefix, the step that was
    doubted, and what was written instead."""
    made = []
    carried = {name: value for name, value in row.items()
               if name not in (*data.OF_AN_ATTEMPT, "paths", "revisions", "reads", "first_correct")}
    for t, (old, new, revision) in enumerate(zip(row["paths"], row["paths"][1:], row["revisions"])):
        starts = data.step_starts(old["text"], style) + [(len(old["text"]),) * 2]
        k = revision["step"] - 1
        begin, end = starts[k][1], starts[k + 1][0]             # of the step's words, behind its label
        same_label = new["text"].startswith(old["text"][:begin]) and new["text"][begin:].strip()
        if grade(old["text"], row["answer"])[1] or not same_label or not old["text"][begin:end].strip():
            continue
        extracted, correct = grade(new["text"], row["answer"])
        made.append(carried | {
            "id": f"{row['id']}#{t}", "sample": 0, "prefix": old["text"][:begin], "step": k + 1,
            "rejected": old["text"][begin:end], "full_rejected": old["text"][begin:],
            "completion": new["text"][begin:], "extracted": extracted, "correct": correct,
            "tokens": new["tokens"], "stop_reason": new["stop_reason"]})
    return made


def flips(rows: list[dict]) -> dict:
    """What became of the first paths, and what it cost."""
    known = [row["tokens"] for row in rows if row["tokens"] is not None]
    return {"first_correct": sum(row["first_correct"] for row in rows) / len(rows),
            "wrong_to_right": sum(row["correct"] and not row["first_correct"] for row in rows),
            "right_to_wrong": sum(row["first_correct"] and not row["correct"] for row in rows),
            "revised": sum(bool(row["revisions"]) for row in rows),
            "revisions": sum(len(row["revisions"]) for row in rows),
            "reads": sum(row["reads"] for row in rows),
            "tokens_per_problem": sum(known) / len(known) if known else None}


def in_words(found: dict, problems: int) -> str:
    tokens = found["tokens_per_problem"]
    cost = "the server does not say how many tokens" if tokens is None else f"{tokens:.1f} tokens a problem"
    return (f"first paths {found['first_correct']:.1%}; {found['revised']} of {problems} revised, "
            f"{found['revisions']} times; wrong to right {found['wrong_to_right']}, right to wrong "
            f"{found['right_to_wrong']}\n{cost}; apart from that, the verifier read {found['reads']:,} "
            "solutions")


# ----------------------------------------------------------------------------------------------------------
# command line

def run(args) -> int:
    data.check_out(args.out, args.problems)
    bad: list[DataError] = []
    problems = []
    for where, row in itertools.islice(data.read_rows(args.problems, bad, split="test"), args.limit):
        try:
            problems.append(read_problem(where, row))
        except DataError as error:
            bad.append(error)
    if not problems:
        raise DataError(f"{args.problems}: holds no problem that can be used")
    how = {"prompt": args.prompt, "system": args.system, "template_args": args.template_args,
           "base": args.base}
    if args.endpoint:
        sampler = Remote(args.endpoint, args.api_model, model=args.model, concurrency=args.concurrency, **how)
    else:
        sampler = Sampler(args.model, device=args.device, batch_size=args.batch_size, **how)
    writer, (verify, of_verifier) = Writer(sampler, args), verifier(args)
    made_of, usable = {}, []
    for i, problem in enumerate(problems):
        try:
            made_of[i] = sampler.prepare(problem, problem.prefix)
            usable.append(i)
        except DataError as error:
            bad.append(error)
    if not usable:
        raise DataError(f"no problem can be used; the first: {bad[-len(problems)]}")

    def work(journal, rank, world):
        together = sampler.batches([made_of[i] for i in usable], 1)
        pieces = [batch[at:at + args.batch_size] for batch in together
                  for at in range(0, len(batch), args.batch_size)][rank::world]
        left = sum((usable[b],) not in journal.done for piece in pieces for b in piece)
        total = sum(map(len, pieces))
        with data.progress(total, total - left, "problems", quiet=rank > 0) as bar:
            for piece in ([usable[b] for b in piece] for piece in pieces):
                if all((i,) in journal.done for i in piece):
                    continue
                histories, failed = correct_batch([problems[i] for i in piece], writer, verify, args)
                journal.failed += failed
                for i, history in zip(piece, histories):
                    if history is not None:
                        bar.update((i,) not in journal.done)
                        journal.add((i,), row_of(problems[i], history))

    def collect(done):
        rows = [done[i,] for i in range(len(problems)) if (i,) in done]
        if rows:
            revisions = [revision for row in rows for revision in bridge(row, args.steps)]
            data.write_rows(revisions_path(args.out), revisions)
        summary = summarize([[row] for row in rows])
        return rows, summary | (flips(rows) if rows else {})

    names = ("theta", "rounds", "cut", "greedy_first", "instruct", "whole_path_exit", "equal_answers_exit",
             "temperature", "top_p", "max_new_tokens", "steps", "seed", "limit")
    content = data.digest([[p.id, p.question, p.answer, p.prefix, p.carried] for p in problems])
    settings = {"sampler": sampler.settings, "problems": f"{Path(args.problems).name} {content}"}
    settings |= of_verifier | {name: getattr(args, name) for name in names}
    made = data.stage(args.out, settings, work, collect, args.restart)
    if processes()[0] == 0:
        data.complain(bad)
        summary = data.read_json(data.summary_path(args.out))
        if summary["failed"]:
            print(f"{summary['failed']} problems failed; the same command tries them again", file=sys.stderr)
        print(f"{args.out}: {'' if made else 'already complete; '}theta {args.theta}, at most {args.rounds} "
              f"rounds\n{table(summary)}\n{in_words(summary, summary['n'])}")
        return 1 if bad or summary["failed"] else 0
    return 0


def correct_batch(problems: list[Problem], writer: Writer, verify: Callable,
                  args) -> tuple[list[History | None], list[DataError]]:
    """Histories of some problems; None, and an error, for each on which the server failed."""
    first, failed = writer.first(problems), []
    lost = {b for b, path in enumerate(first) if isinstance(path, DataError)}
    failed += [first[b] for b in lost]
    going = [b for b in range(len(problems)) if b not in lost]

    def revise(asked, turn):
        written = writer.revise([(problems[going[b]], path, k, p) for b, path, k, p in asked], turn)
        for j, (b, *_) in enumerate(asked):
            if isinstance(written[j], DataError):
                failed.append(written[j])
                lost.add(going[b])
                written[j] = None
        return written
    cut = first_below if args.cut == "verifier" else random_cut(args.seed)
    found = correct_stepwise(
        [first[b] for b in going], revise, lambda asked: verify([(problems[going[b]], p) for b, p in asked]),
        theta=args.theta, rounds=args.rounds, cut=cut, whole_path_exit=args.whole_path_exit,
        equal_answers_exit=args.equal_answers_exit)
    histories = dict(zip(going, found))
    return [None if b in lost else histories[b] for b in range(len(problems))], failed


def revisions_path(out: Path) -> Path:
    return out.with_name(out.name.removesuffix(".jsonl") + ".revisions.jsonl")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m variants.stepco", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what").add_argument
    add("--problems", required=True, metavar="F", help="as for eval.py")
    add("--out", required=True, type=Path, metavar="OUT",
        help="final paths, JSONL; beside it OUT.summary.json and OUT.revisions.jsonl")
    add("--model", metavar="M", help="the sampler: checkpoint folder or hub id")
    which = parser.add_argument_group("verifier").add_mutually_exclusive_group(required=True)
    which.add_argument("--prm", metavar="FOLDER", help="what python -m variants.prm train wrote")
    which.add_argument("--checker", metavar="MODULE:FUNCTION",
                       help="an exact one: a function of (question, steps, answer) that returns the index of "
                            "the first wrong step, or None")
    add = parser.add_argument_group("correction").add_argument
    add("--theta", type=float, default=0.5, help="a step below this is doubted (default 0.5)")
    add("--rounds", type=data.positive, default=5, metavar="T", help="revisions at most (default 5)")
    add("--cut", choices=("verifier", "random"), default="verifier",
        help="random: the control, which cuts at any step where the verifier would cut at one")
    add("--greedy_first", action="store_true", help="the first path is greedy; revisions are sampled")
    add("--whole_path_exit", action="store_true",
        help="end where the whole path scores at least theta (the released code does)")
    add("--equal_answers_exit", action="store_true",
        help="end where two answers in a row are equal (the released code does)")
    add("--instruct", action="store_true",
        help="ask the served model to revise, as the paper does, instead of sampling the tail anew")
    sampling = parser.add_argument_group("sampling")
    add = sampling.add_argument
    add("--prompt", choices=data.PROMPT_STYLES, default="chat", help="as in training (default: chat)")
    data.add_chat_options(sampling)
    add("--temperature", type=float, default=0.7, metavar="T", help="default 0.7: the released code's")
    add("--top_p", type=float, default=0.95, metavar="P", help="default 0.95: the released code's")
    add("--max_new_tokens", type=data.positive, default=2048, metavar="N", help="of a path (default 2048)")
    add("--seed", type=int, default=0, help="default 0")
    add("--batch_size", type=data.positive, default=64, metavar="N", help="problems abreast (default 64)")
    add("--steps", choices=data.STEP_STYLES, default="auto", help="how steps are told apart")
    add("--limit", type=data.positive, metavar="K", help="only the first K problems")
    add("--device", help="default: cuda where there is one, else cpu")
    add("--restart", action="store_true", help="begin anew, whatever an earlier run has left at OUT")
    add("--debug", action="store_true", help="show the traceback of an error")
    add = parser.add_argument_group("sampling from a server").add_argument
    add("--endpoint", metavar="URL", help="OpenAI-compatible server; its key is read from OPENAI_API_KEY")
    add("--api_model", metavar="NAME", help="the name that the server knows the model by")
    add("--concurrency", type=data.positive, default=32, metavar="N", help="requests at a time (default 32)")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = arguments()
    args = parser.parse_args(argv)
    if not 0 <= args.theta <= 1:
        parser.error(f"--theta {args.theta}: expected a number from 0 to 1")
    if not 0 < args.temperature:
        parser.error(f"--temperature {args.temperature}: a revision must differ; expected more than 0")
    if args.endpoint and not args.api_model or not (args.endpoint or args.model):
        parser.error("give --model M, or --endpoint URL with --api_model NAME")
    if args.instruct and not args.endpoint:
        parser.error("--instruct asks a served chat model: give --endpoint URL with --api_model NAME")
    return data.run_command(lambda: run(args), args.debug)


if __name__ == "__main__":
    sys.exit(leave_processes(main()))
