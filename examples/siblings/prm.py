"""What a process reward model learns, from how many rollouts: AUC and calibration against the exact checker.

One PRM of each seed, learned from 8 rollouts a step, is the one that the experiments of full_step_dpo and
stepco ask. Beside it: fewer and more rollouts on the same solutions, and at equal cost (8 rollouts of all
solutions against 32 of a quarter of them). What it must beat is a constant. """
import math
import random
import statistics
from collections import defaultdict
from pathlib import Path

import data
import stepdpo
from examples import arithmetic
from examples.arithmetic import ANSWERS, CHECKER, command, rows_of
from examples.siblings import Bench, plus_minus, write_problems
from variants import prm

SOLUTIONS = 160         # of training problems, four each: what the PRM is learned from
FEW = SOLUTIONS // 4    # of these, the ones that are valued by 32 rollouts
HELD_OUT = 400          # of held-out problems: what it is scored on
# Equally many updates, however many rows. lr: of 5e-4 and 2e-3, chosen on seed 0's held-out solutions, which
# are also scored below; the other seeds had no part in it.
UPDATES, BATCH = 200, 16
TRAINING = f"--prompt raw --warmup 0.1 --schedule cosine --checkpoint_every 0 --batch_size {BATCH} --lr 2e-3"


def folder_of(bench: Bench) -> Path:
    """Of the seed's PRM: one for all experiments under one --out."""
    return bench.folder.parents[1] / "prm" / bench.folder.name


def make_prm(bench: Bench) -> Path:
    """Attempts of training problems -> rollouts -> labels -> the PRM; its folder."""
    folder = folder_of(bench)
    train = [row for row in rows_of(bench.pool / "attempts.jsonl") if row["dataset"] == "train"]
    data.write_rows(folder / "attempts.jsonl", train[:SOLUTIONS if bench.size.test >= 1000 else FEW])
    value_steps(bench, "attempts.jsonl", "valued.jsonl", 8)
    learn(bench, folder / "valued.jsonl", "labels.jsonl", "learned")
    return folder / "learned"


def value_steps(bench: Bench, attempts: str, valued: str, rollouts: int):
    folder = folder_of(bench)
    command(f"eval.py --model {bench.sft} --problems {folder / attempts} --rollouts {rollouts} --every_step "
            f"--all --out {folder / valued} {ANSWERS} --temperature 0.8 --top_p 0.95 --seed {bench.seed}")


def learn(bench: Bench, valued: Path, labels: str, name: str):
    folder = folder_of(bench)
    command(f"-m variants.prm label --attempts {valued} --out {folder / labels} --checker {CHECKER}")
    epochs = math.ceil(UPDATES / math.ceil(len(rows_of(folder / labels)) / BATCH))
    command(f"-m variants.prm train --model {bench.sft} --data {folder / labels} --out {folder / name} "
            f"{TRAINING} --epochs {epochs} --max_steps {UPDATES} --seed {bench.seed}")


def fewer(valued: list[dict], rollouts: int, seed: int) -> list[dict]:
    """The same solutions as if each step had had `rollouts` rollouts only: drawn from those that it had."""
    rng, rows = random.Random(f"fewer {rollouts} {seed}"), []
    for row in valued:
        values = []
        for right, tries in row["values"]:
            drawn = rng.sample([1] * right + [0] * (tries - right), min(rollouts, tries))
            values.append([sum(drawn), len(drawn)])
        rows.append(row | {"values": values})
    return rows


def run_seed(bench: Bench) -> dict[str, dict]:
    """Figures of each PRM on held-out solutions, and of the labels themselves."""
    make_prm(bench)
    folder = folder_of(bench)
    attempts = rows_of(folder / "attempts.jsonl")
    data.write_rows(folder / "few.jsonl", attempts[:len(attempts) // 4])
    value_steps(bench, "few.jsonl", "few_32.jsonl", 32)
    valued = {"all_8": rows_of(folder / "valued.jsonl"), "few_32": rows_of(folder / "few_32.jsonl")}
    valued["all_4"] = fewer(valued["all_8"], 4, bench.seed)
    valued["few_8"], valued["few_4"] = (fewer(valued["few_32"], n, bench.seed) for n in (8, 4))
    tested = [row for row in rows_of(bench.pool / "attempts.jsonl") if row["dataset"] == "held-out"]
    data.write_rows(folder / "held_out.jsonl", tested[:HELD_OUT])
    found = {}
    for name, rows in valued.items():
        model = "learned" if name == "all_8" else name
        if model == name:
            data.write_rows(folder / f"valued_{name}.jsonl", rows)
            learn(bench, folder / f"valued_{name}.jsonl", f"labels_{name}.jsonl", name)
        command(f"-m variants.prm score --model {folder / model} --attempts {folder / 'held_out.jsonl'} "
                f"--out {folder / f'scored_{name}.jsonl'} --prompt raw")
        scored = rows_of(folder / f"scored_{name}.jsonl")
        found[name], text = prm.report([row["scores"] for row in scored], prm.exact_labels(scored, CHECKER))
        print(text)
        labelled = [prm.labelled_row(row, row["values"]) for row in rows]
        found[name]["labels"] = prm.audit(labelled, prm.exact_labels(labelled, CHECKER))[0]
        found[name]["located"] = located(scored)
    return found


def located(scored: list[dict]) -> dict:
    """Share of wrong solutions whose first wrong step is named: by the first value below 0.5, and by
    `data.py localize --judge values`."""
    wrong = [(row, exact.index(False)) for row, exact in zip(scored, prm.exact_labels(scored, CHECKER))
             if not row["correct"] and False in exact]
    below = [next((m for m, v in enumerate(row["scores"]) if v < 0.5), None) == first for row, first in wrong]
    posterior = []
    for row, first in wrong:
        try:
            posterior.append(data.judge_by_values(row) == first)
        except data.Unclear:
            posterior.append(False)
    return {"below_half": statistics.mean(below), "by_values": statistics.mean(posterior)}


TITLES = {"all_4": f"{SOLUTIONS} solutions, 4 rollouts a step", "all_8": f"{SOLUTIONS} solutions, 8 rollouts",
          "few_4": f"{FEW} solutions, 4 rollouts", "few_8": f"{FEW} solutions, 8 rollouts",
          "few_32": f"{FEW} solutions, 32 rollouts"}


def run(args) -> int:
    if args.dev:
        raise data.DataError("--dev: a PRM is scored on held-out solutions, not on test problems; leave it "
                             "out")
    runs = []
    for seed in args.seeds:
        size = arithmetic.QUICK if args.quick else arithmetic.Size()
        pool = (args.start or args.out) / f"seed{seed}"
        bench = Bench(pool, args.out / "prm" / f"seed{seed}", size, seed, "test")
        arithmetic.make_pool(pool, size, seed, "test")
        write_problems(bench)
        runs.append(run_seed(bench))
    text = table(runs)
    seeds = ", ".join(map(str, args.seeds))
    print(f"\nprm: {HELD_OUT} held-out solutions a seed; seeds {seeds}; +- is half a 95 % t interval over "
          f"the seeds.\n\n{text}")
    stepdpo.write_json(args.out / "prm" / "results.json", {"seeds": args.seeds, "runs": runs, "table": text})
    return 0


def table(runs: list[dict]) -> str:
    columns = {"AUC": lambda f: f["auc"],
               "accuracy": lambda f: f["accuracy"],
               "constant": lambda f: f["accuracy_of_constant"],
               "calib. err.": lambda f: f["calibration_error"],
               "located": lambda f: f["located"]["below_half"],
               "by values": lambda f: f["located"]["by_values"],
               "labels' AUC": lambda f: f["labels"]["auc"],
               "their noise": lambda f: f["labels"]["noise"]}
    lines = [f"{'':<36}" + "".join(f"{name:>16}" for name in columns)]
    for name, title in TITLES.items():
        line = f"{title:<36}"
        for of in columns.values():
            line += f"{plus_minus([of(found[name]) for found in runs], '.3f'):>16}"
        lines.append(line)
    by_step = defaultdict(list)
    for found in runs:
        for position, value in found["all_8"]["auc_by_position"].items():
            if not math.isnan(value):
                by_step[position].append(value)
    shown = (f"{position}: {statistics.mean(values):.3f}" for position, values in sorted(by_step.items()))
    lines.append(f"AUC by step, 8 rollouts of {SOLUTIONS} solutions: " + "  ".join(shown))
    return "\n".join(lines)
