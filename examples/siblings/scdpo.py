"""SCDPO's claim: wrong answers that leave a right one at a known step teach a model where an error is, better
than wrong answers sampled apart. Its refutation: tails that are wrong without the rising temperature, and the
same wrong answers against a right one that they do not leave anywhere.

On wrong answers of the SFT model to held-out problems, the checker knows the first wrong step; `located` is
how often the step of the lowest credit is that one: among `habits`, where that step should multiply and the
planted habit strikes, and among `slips`, all others. A mask cannot shuffle a fork: what both answers share
cancels, whether it is trained or not. So the fork is undone by another right answer to the same problem. """
import random
import re
import statistics

import data
from examples import siblings
from examples.arithmetic import (FIRST_LINE, LAST_LINE, OPENINGS, STEPS, command, compare,
                                 first_wrong_step, in_words, read_problem, rows_of, solve,
                                 training)
from examples.siblings import Arm, Bench, plus_minus
from variants import scdpo

ARMS = {
    "sft": Arm("SFT", "Where all others start from; it has no credit, so `located` is chance: 1 / steps."),
    "control": Arm("SFT, continued on right tails",
                   "The control: SCDPO's right answers and right tails, no preference.", ("sft",)),
    "dpo": Arm("DPO, equal data", "The paper's baseline: as many pairs of whole answers, all sampled apart.",
               ("sft",)),
    "stepdpo": Arm("Step-DPO", "First wrong steps, located by the checker, against right ones.", ("dpo",)),
    "scdpo": Arm("SCDPO, rise 0.05", "The paper's method: half naive pairs, half forks.",
                 ("control", "dpo", "stepdpo")),
    "steeper": Arm("SCDPO, rise 0.1", "As the released code heats.", ("dpo", "scdpo")),
    "flat": Arm("SCDPO, tails at T = 1", "Control: no rising temperature, until wrong.", ("scdpo",)),
    "undone": Arm("SCDPO, forks undone",
                  "Control: SCDPO's wrong answers, each against another right answer to its problem.",
                  ("scdpo",)),
}
COLUMNS = {"located": ("located", ".1%"), "habit": ("habits", ".1%"), "slip": ("slips", ".1%")}
RAMPS = {"scdpo": "--rise 0.05", "steeper": "--rise 0.1", "flat": "--temperature 1 --rise 0",
         "hot": "--temperature 1.4 --rise 0"}                               # the last for its tails alone
SPARE = 1.25            # problems to fork for every pair that is wanted: some tails do not go wrong


def right_answers(bench: Bench) -> dict[str, list[dict]]:
    """Problem -> its different right attempts, of problems to train on that have two or more."""
    found: dict[str, dict] = {}
    for row in rows_of(bench.pool / "attempts.jsonl"):
        if row["correct"] and row["dataset"] == "train" and row["stop_reason"] == "eos":
            found.setdefault(row["question"], {}).setdefault(row["completion"], row)
    return {question: list(rows.values()) for question, rows in found.items() if len(rows) > 1}


def make_files(bench: Bench) -> tuple[dict[str, str], dict[str, list[dict]]]:
    """Of each arm its file to train on, equally many rows in each; and the forked pairs of each ramp."""
    whole = rows_of(bench.pool / "whole.jsonl")
    half = len(whole) // 2
    right = right_answers(bench)
    chosen = sorted(right, key=lambda question: right[question][0]["id"])
    random.Random(f"scdpo {bench.seed}").shuffle(chosen)
    bench.write("right.jsonl", [right[question][0] for question in chosen[:int(SPARE * half)]])
    forked = {}
    for ramp, how in RAMPS.items():
        attempts, out = bench.quoted("right.jsonl", f"forks_{ramp}.jsonl")
        command(f"-m variants.scdpo pairs --model {bench.sft} --attempts {attempts} --out {out} --prompt raw "
                f"--per_problem 1 --max_new_tokens 60 --batch_size 512 --seed {bench.seed} {how}")
        forked[ramp] = rows_of(bench.folder / f"forks_{ramp}.jsonl")
    half = min(half, *map(len, forked.values()))
    naive = whole[:half]
    mixes = {ramp: naive + forked[ramp][:half] for ramp in RAMPS if ramp != "hot"}
    mixes["undone"] = naive + [undo(row, right[row["prompt"]]) for row in forked["scdpo"][:half]]
    mixes["control"] = [{"prompt": row["prompt"] + row["initial_reason_steps"],
                         "response": row["full_chosen"]} for row in mixes["scdpo"]]
    mixes["dpo"] = whole[:2 * half]
    mixes["stepdpo"] = rows_of(bench.pool / "pairs.jsonl")[:2 * half]
    return {arm: bench.write(f"{arm}.jsonl", rows) for arm, rows in mixes.items()}, forked


def undo(row: dict, right: list[dict]) -> dict:
    """The pair's wrong answer against another right one: what they share does not end at the fork."""
    left = row["initial_reason_steps"] + row["full_chosen"]
    other = next(attempt["completion"] for attempt in right if attempt["completion"] != left)
    wrong = row["initial_reason_steps"] + row["full_rejected"]
    return data.pair_of(right[0], "", other, wrong, other, wrong)


def run_seed(bench: Bench) -> dict[str, dict]:
    files, forked = make_files(bench)
    how = f"{training(bench.size, bench.seed)} --warmup 0.1 --schedule cosine"
    for arm, file in files.items():
        if arm == "control":
            bench.train(arm, "sft", file, how=how)
        elif arm == "stepdpo":
            bench.train(arm, "stepdpo", file)
        else:
            bench.train(arm, "", file, program="-m variants.scdpo train",
                        how=f"{how} --beta {bench.size.beta:g}")
    found = {arm: bench.score(arm, bench.sft if arm == "sft" else None) for arm in ARMS}

    solutions, wrong_steps = wrong_answers(bench)
    kinds = [kind_of(question, k) for (question, _), k in zip(solutions, wrong_steps)]
    found["sft"]["located"] = statistics.mean(1 / len(data.split_steps(text)) for _, text in solutions)
    for arm in files:
        credits = scdpo.credit(bench.folder / arm, bench.pool / "sft", solutions, beta=bench.size.beta,
                               prompt="raw")
        hits = [of_steps.index(min(of_steps)) == k for of_steps, k in zip(credits, wrong_steps)]
        found[arm] |= {"located": statistics.mean(hits), "hits": "".join("01"[hit] for hit in hits)}
        for kind in set(kinds):
            found[arm][kind] = statistics.mean(hit for hit, of in zip(hits, kinds) if of == kind)
    own = {"solutions": len(solutions), "habit": statistics.mean(kind == "habit" for kind in kinds)}
    return found | {"seed": own | {"tails": {ramp: tails(rows) for ramp, rows in forked.items()}}}


def wrong_answers(bench: Bench) -> tuple[list[tuple[str, str]], list[int]]:
    """The SFT model's wrong answers to the held-out problems, and the first wrong step of each."""
    solutions, wrong_steps = [], []
    for row in rows_of(bench.folder / "score_sft.jsonl"):
        k = first_wrong_step(row["question"], data.split_steps(row["completion"]), row["answer"])
        if not row["correct"] and row["stop_reason"] == "eos" and k is not None:
            solutions.append((row["question"], row["completion"]))
            wrong_steps.append(k)
    return solutions, wrong_steps


def kind_of(question: str, k: int) -> str:
    """"habit" where step k should multiply, else "slip"."""
    wanted = solve(read_problem(question))
    return "habit" if k < len(wanted) and wanted[k][2] == "*" else "slip"


# ----------------------------------------------------------------------------------------------------------
# what the wrong tails are like

def in_the_tasks_words() -> re.Pattern:
    """A step as the demonstrations word it, whatever its numbers."""
    fields = {"name": r"\w+", "items": r"\w+", "left": r"\d+", "right": r"\d+",
              "equation": r"\d+ [-+*] \d+ = \d+"}
    wordings = [re.escape(text) for texts in STEPS.values() for text in texts]
    for name, pattern in fields.items():
        wordings = [text.replace(re.escape(f"{{{name}}}"), pattern) for text in wordings]
    openings = "|".join(map(re.escape, OPENINGS))
    return re.compile(rf"(?:{re.escape(FIRST_LINE)})?\nStep \d+: (?:{openings})(?:{'|'.join(wordings)})"
                      rf"(?:\n{re.escape(LAST_LINE)} \d+)?", re.IGNORECASE)


WORDED = in_the_tasks_words()


def tails(rows: list[dict]) -> dict[str, float]:
    """Of forked pairs, shares of wrong tails: whose first wrong step is the one after the fork, a kept one, a
    multiplication; that have a step which is not in the task's words."""
    found = {"at": [], "before": [], "habit": [], "garbled": []}
    for row in rows:
        kept = len(data.split_steps(row["initial_reason_steps"]))
        steps = data.split_steps(row["initial_reason_steps"] + row["full_rejected"])
        k = first_wrong_step(row["prompt"], steps, row["answer"])
        found["at"].append(k == kept)
        found["before"].append(k is not None and k < kept)
        found["habit"].append(k is not None and kind_of(row["prompt"], k) == "habit")
        found["garbled"].append(not all(WORDED.fullmatch(step) for step in steps[kept:]))
    return {name: statistics.mean(shares) for name, shares in found.items()}


def remarks(runs: list[dict]) -> str:
    located = [{"arms": {arm: {"verdicts": [hit == "1" for hit in figures["hits"]]}
                         for arm, figures in found["arms"].items() if "hits" in figures}} for found in runs]
    lines = [f"located: of {sum(found['solutions'] for found in runs):,} wrong answers of SFT to held-out "
             "problems, in how many the step of the lowest credit is the first wrong one"]
    for arm, (title, _, against) in ARMS.items():
        if arm != "sft":
            rates = [found["arms"][arm]["located"] for found in runs]
            lines.append(f"  {title:<32}{plus_minus(rates, '.1%')}")
            lines += [f"      {in_words(compare(located, arm, other), ARMS[other].title)}"
                      for other in against if other != "sft"]
    shares = {"at": "first error: step k+1", "before": "a kept step", "habit": "a multiplication",
              "garbled": "not in the task's words"}
    lines += ["", f"{'wrong tails':<20}" + "".join(f"{heading:>25}" for heading in shares.values())]
    for ramp, title in (("scdpo", "rise 0.05"), ("steeper", "rise 0.1"), ("hot", "1.4 throughout"),
                        ("flat", "1 throughout")):
        shown = [plus_minus([found["tails"][ramp][name] for found in runs], ".1%") for name in shares]
        lines.append(f"  {title:<18}" + "".join(f"{share:>25}" for share in shown))
    own = plus_minus([found["habit"] for found in runs], ".1%")
    lines.append(f"Of SFT's own wrong answers, {own} have their first error at a multiplication.")
    return "\n".join(lines)


def run(args) -> int:
    return siblings.run(args, "scdpo", ARMS, run_seed, COLUMNS, remarks)
