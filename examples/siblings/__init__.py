"""Each sibling's claim on the embedded task of examples/arithmetic.py, beside its baselines and the control
that would refute it.

    python -m examples.siblings --method NAME --out DIR --seeds 0,1,2,3,4

A file here is one method's experiment: its arms, and `run(args)`. All arms of a seed start from the same SFT
model and the same pool of attempts as the first command's, take equally many pairs and updates, and answer
the same held-out problems. This file holds what the experiments share: the bench of one seed, and the
table. """
import json
import platform
import shlex
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple

import torch

import data
import eval as evaluation
import stepdpo
from examples import arithmetic
from examples.arithmetic import ANSWERS, command, compare, in_words, over_seeds, rows_of


class Arm(NamedTuple):
    title: str
    about: str                              # one sentence, printed under its line of the table
    against: tuple[str, ...] = ()           # arms that it is compared with, problem by problem


@dataclass(frozen=True)
class Bench:
    """One seed of an experiment."""
    pool: Path                  # what examples/arithmetic.py left: sft, attempts.jsonl, pairs.jsonl, ...
    folder: Path                # where this experiment keeps its own files
    size: arithmetic.Size
    seed: int
    scored: str                 # "test", or "dev" while settings are chosen

    def quoted(self, *names: str) -> list[str]:
        """Paths of own files, ready for a command line."""
        return [shlex.quote(str(self.folder / name)) for name in names]

    @property
    def sft(self) -> str:
        return shlex.quote(str(self.pool / "sft"))

    @property
    def preference(self) -> str:
        """The flags of a preference run: of every arm, unless it says otherwise."""
        return f"{arithmetic.training(self.size, self.seed)} --beta {self.size.beta:g}"

    def write(self, name: str, rows: list[dict]) -> str:
        """Rows for a training run, as a file of the experiment's own; its path, ready for a command line."""
        data.write_rows(self.folder / name, rows)
        return self.quoted(name)[0]

    def train(self, arm: str, method: str, file: str, *, program: str = "stepdpo.py",
              model: str | None = None, how: str | None = None) -> str:
        """Train `arm` and return its folder, ready for a command line."""
        out = self.quoted(arm)[0]
        command(f"{program} {method} --model {model or self.sft} --data {file} --out {out} "
                f"{how or self.preference}")
        return out

    def score(self, arm: str, model: str | None = None) -> dict:
        """The verdicts of `arm` (or of another folder under its name) on the held-out problems."""
        mine, problems, out = self.quoted(arm, "scored.jsonl", f"score_{arm}.jsonl")
        command(f"eval.py --model {model or mine} --problems {problems} --out {out} {ANSWERS}")
        return {"verdicts": [row["correct"] for row in rows_of(self.folder / f"score_{arm}.jsonl")]}


def run(args, method: str, arms: dict[str, Arm], run_seed: Callable[[Bench], dict[str, dict]],
        columns: dict[str, tuple[str, str]], remarks: Callable[[list[dict]], str] | None = None,
        verdict: str = "accuracy") -> int:
    """All seeds, the table, results.json. run_seed gives each arm's verdicts and figures, and under "seed"
    what is of no arm; `columns` says how figures are shown (name -> heading, format); `remarks` may add what
    the table cannot say; `verdict` is what a problem's verdict stands for."""
    torch.set_num_threads(1)        # a model this small gains little from a second thread
    size, begun, runs = arithmetic.QUICK if args.quick else arithmetic.Size(), time.perf_counter(), []
    scored = "dev" if args.dev else "test"
    for seed in args.seeds:
        pool = (args.start or args.out) / f"seed{seed}"
        bench = Bench(pool, args.out / method / f"seed{seed}", size, seed, scored)
        arithmetic.make_pool(pool, size, seed, "test")
        write_problems(bench)
        found = run_seed(bench)
        runs.append({"arms": {arm: found[arm] for arm in arms}, **found.get("seed", {})})
    seconds = time.perf_counter() - begun
    summary, text = table(arms, runs, columns, verdict)
    interval = "Wilson, of the problems" if len(runs) == 1 else "t, over the seeds"
    print(f"\n{method}: {size.test:,} {scored} problems a seed that no stage has seen; seeds "
          f"{', '.join(map(str, args.seeds))}.\nInterval: {interval}.\n\n{text}")
    if remarks is not None:
        said = remarks(runs)
        print(f"\n{said}")
        summary["remarks"] = said
    stepdpo.write_json(args.out / method / "results.json", {
        **summary, "runs": [without_verdicts(found) for found in runs], "seeds": args.seeds,
        "scored_on": scored, "quick": args.quick, "size": vars(size), "seconds": round(seconds, 1),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}})
    print(f"\n{args.out / method / 'results.json'}; {seconds:.0f} s")
    return 0


def write_problems(bench: Bench):
    """The problems to score; the folder is held to one kind and size of them."""
    settings = json.loads(json.dumps({"size": vars(bench.size), "scored_on": bench.scored}))
    kept = bench.folder / "settings.json"
    if kept.exists() and json.loads(kept.read_text()) != settings:
        raise data.DataError(f"{bench.folder}: holds an experiment with other settings (--quick, --dev, or "
                             "another version); choose another --out")
    problems = arithmetic.problems_of(bench.scored, bench.size.test, bench.size, bench.seed)
    rows = [{"id": f"{bench.scored}-{i}", "question": problem.question(),
             "answer": str(arithmetic.solve(problem)[-1][-1])} for i, problem in enumerate(problems)]
    bench.write("scored.jsonl", rows)
    stepdpo.write_json(kept, settings)


def without_verdicts(found: dict) -> dict:
    return {**found, "arms": {arm: {name: value for name, value in figures.items() if name != "verdicts"}
                              for arm, figures in found["arms"].items()}}


def table(arms: dict[str, Arm], runs: list[dict], columns: dict[str, tuple[str, str]],
          verdict: str) -> tuple[dict, str]:
    """results.json's `arms` and `comparisons`, and the table as text."""
    summary, comparisons = {}, []
    wide = 2 + max(len(arm.title) for arm in arms.values())
    headings = "".join(f"{heading:>{max(9, len(heading) + 2)}}" for heading, _ in columns.values())
    lines = [f"{'':<{wide}}{verdict:>8}  {'95 % interval':<16}{headings}"]
    for name, arm in arms.items():
        figures = [found["arms"][name] for found in runs]
        rates = [statistics.mean(f["verdicts"]) for f in figures]
        low, high, mean = interval_of([f["verdicts"] for f in figures])
        summary[name] = {"title": arm.title, verdict: mean, "low": low, "high": high,
                         f"{verdict}_per_seed": rates}
        line = f"{arm.title:<{wide}}{mean:>{max(8, len(verdict))}.1%}  {f'{low:.1%} .. {high:.1%}':<16}"
        for key, (heading, shape) in columns.items():
            values = [f[key] for f in figures if f.get(key) is not None]
            summary[name][key] = values
            shown = format(statistics.mean(values), shape) if values else ""
            line += f"{shown:>{max(9, len(heading) + 2)}}"
        lines += [line, f"    {arm.about}"]
        for other in arm.against:
            comparisons.append(compare(runs, name, other))
            lines.append(f"    {in_words(comparisons[-1], arms[other].title)}")
    return {"arms": summary, "comparisons": comparisons}, "\n".join(lines)


def plus_minus(values: list[float], shape: str) -> str:
    """Mean over the seeds and half of its t interval, "0.432 +- 0.099"; the mean alone of one seed."""
    mean, half = over_seeds(values)
    return format(mean, shape) + ("" if half is None else f" +- {format(half, shape.lstrip('+'))}")


def interval_of(verdicts: list[list[bool]]) -> tuple[float, float, float]:
    """(low, high, mean) of an accuracy: a t interval over the seeds, Wilson's for one seed."""
    mean, half = over_seeds([statistics.mean(v) for v in verdicts])
    if half is None:
        return *evaluation.wilson(sum(verdicts[0]), len(verdicts[0])), mean
    return max(0.0, mean - half), min(1.0, mean + half), mean
