"""StepCo's claim: to find the first bad step and write on from there is worth more than the same tokens spent
on whole solutions. Its refutation: to cut at a random step does as well.

Every arm answers the same problems; `tokens` are all that it generated for one, thrown-away ones included.
Best-of-N and self-consistency get at least StepCo's tokens (N = 4). The verifier of StepCo and of best-of-N
is the PRM of examples/siblings/prm.py, whose rollouts are not counted here. The bridge: Step-DPO on pairs
from StepCo's revisions, against rectified pairs that cost as many tokens to sample. """
import random
import statistics

import data
import eval as evaluation
from examples import siblings
from examples.arithmetic import ANSWERS, CHECKER, command, first_wrong_step, rows_of
from examples.siblings import Arm, Bench
from examples.siblings.prm import make_prm

THETAS = (0.3, 0.7, 0.9)            # beside the paper's 0.5
N = 4
ARMS = {
    "greedy": Arm("Greedy", "One answer, temperature 0."),
    "single": Arm("One sample", "One answer at temperature 0.7: StepCo's first path."),
    "majority": Arm(f"Self-consistency, {N}", "The most frequent answer.", ("greedy",)),
    "best": Arm(f"Best of {N} by the PRM", "The sample whose last step has the highest value.",
                ("greedy", "majority")),
    "random": Arm("StepCo, cut at random",
                  "The control: the PRM says that something is wrong, chance says where.",
                  ("single", "best")),
    "stepco": Arm("StepCo, learned verifier", "The paper's method: theta 0.5, at most 5 rounds.",
                  ("greedy", "single", "majority", "best", "random")),
    **{f"theta_{theta}": Arm(f"... theta {theta}", "The same with another threshold.", ("stepco",))
       for theta in THETAS},
    "released": Arm("... with the released exits",
                    "Ends on a good whole path, or two equal answers in a row.", ("stepco",)),
    "oracle": Arm("StepCo, exact verifier", "The ceiling.", ("stepco",)),
    "bridge": Arm("Step-DPO on StepCo's pairs", "Greedy, after training on pairs that revisions left.",
                  ("greedy",)),
    "rectified": Arm("Step-DPO on rectified pairs",
                     "The same number of pairs, from attempts and continuations of equal cost.",
                     ("greedy", "bridge")),
}
COLUMNS = {"tokens": ("tokens", ".0f"), "to_right": ("w->r", ".0f"), "to_wrong": ("r->w", ".0f"),
           "reads": ("reads", ".2f"), "pairs": ("pairs", ".0f"), "first_wrong": ("exact", ".1%")}
SAMPLED = f"{ANSWERS} --temperature 0.7 --top_p 0.95"
BRIDGE = 500                        # training problems that StepCo is run on for its pairs


def verdicts(rows: list[dict]) -> dict:
    return {"verdicts": [row["correct"] for row in rows],
            "tokens": statistics.mean(row["tokens"] for row in rows)}


def correct(bench: Bench, arm: str, verifier: str, problems: str = "scored.jsonl") -> list[dict]:
    """Run StepCo; its rows."""
    asked, out = bench.quoted(problems, f"{arm}.jsonl")
    command(f"-m variants.stepco --model {bench.sft} --problems {asked} --out {out} {verifier} {ANSWERS} "
            f"--seed {bench.seed}")
    return rows_of(bench.folder / f"{arm}.jsonl")


def run_seed(bench: Bench) -> dict[str, dict]:
    prm = make_prm(bench)
    learned, exact = f"--prm {prm}", f"--checker {CHECKER}"
    asked, greedy, samples, scored = bench.quoted("scored.jsonl", "greedy.jsonl", "samples.jsonl",
                                                  "samples_scored.jsonl")
    command(f"eval.py --model {bench.sft} --problems {asked} --out {greedy} {ANSWERS}")
    command(f"eval.py --model {bench.sft} --problems {asked} --out {samples} {SAMPLED} --samples {N} "
            f"--seed {bench.seed}")
    command(f"-m variants.prm score --model {prm} --attempts {samples} --out {scored} --prompt raw")
    found = {"greedy": verdicts(rows_of(bench.folder / "greedy.jsonl"))}
    drawn = rows_of(bench.folder / "samples_scored.jsonl")
    groups = [drawn[at:at + N] for at in range(0, len(drawn), N)]
    best = [max(group, key=lambda row: row["scores"][-1]) for group in groups]
    cost = statistics.mean(sum(row["tokens"] for row in group) for group in groups)
    found["majority"] = {"verdicts": [evaluation.majority(group) for group in groups], "tokens": cost}
    found["best"] = verdicts(best) | {"tokens": cost, "reads": N}
    runs = {"stepco": learned, "random": f"{learned} --cut random", "oracle": exact,
            "released": f"{learned} --whole_path_exit --equal_answers_exit"}
    runs |= {f"theta_{theta}": f"{learned} --theta {theta}" for theta in THETAS}
    for arm, verifier in runs.items():
        rows = correct(bench, arm, verifier)
        found[arm] = verdicts(rows) | {
            "to_right": sum(row["correct"] and not row["first_correct"] for row in rows),
            "to_wrong": sum(row["first_correct"] and not row["correct"] for row in rows),
            "reads": statistics.mean(row["reads"] for row in rows)}
    found["single"] = {"verdicts": [row["first_correct"] for row in rows],
                       "tokens": statistics.mean(row["paths"][0]["tokens"] for row in rows)}
    return found | bridge(bench, learned)


def bridge(bench: Bench, learned: str) -> dict[str, dict]:
    """Equal sampling cost, equally many pairs, equal updates: StepCo's revisions, and rectified pairs."""
    problems = [row for row in rows_of(bench.pool / "problems.jsonl") if row["dataset"] == "train"][:BRIDGE]
    bench.write("train.jsonl", problems)
    revised = correct(bench, "on_train", learned, "train.jsonl")
    revisions, made = bench.quoted("on_train.revisions.jsonl", "bridge_pairs.jsonl")
    command(f"data.py pairs {revisions} --out {made} --per_error 1")
    bought = bought_for(bench, sum(row["tokens"] for row in revised))
    pairs = {"bridge": rows_of(bench.folder / "bridge_pairs.jsonl"), "rectified": bought}
    count, found = min(map(len, pairs.values())), {}
    for arm, rows in pairs.items():
        random.Random(f"{arm} {bench.seed}").shuffle(rows)
        file = bench.write(f"{arm}_train.jsonl", rows[:count])
        bench.train(arm, "stepdpo", file)
        answered = bench.score(arm)
        wrong_first = [is_first_wrong(row) for row in rows]
        found[arm] = answered | {"pairs": len(rows), "first_wrong": statistics.mean(wrong_first)}
    return found


def bought_for(bench: Bench, tokens: int) -> list[dict]:
    """The rectified pairs that so many sampled tokens buy: attempts at one problem after the other, and the
    continuations of their errors. (The checker that locates these costs nothing.)"""
    attempts, cost = {}, {}
    for row in rows_of(bench.pool / "attempts.jsonl"):
        if row["dataset"] == "train":
            cost[row["question"]] = cost.get(row["question"], 0) + row["tokens"]
            attempts.setdefault(row["question"], None)
    for row in rows_of(bench.pool / "rectified.jsonl"):
        if row["question"] in cost:
            cost[row["question"]] += row["tokens"]
    bought, spent = set(), 0
    for question in attempts:
        spent += cost[question]
        if spent > tokens:
            break
        bought.add(question)
    return [row for row in rows_of(bench.pool / "all_pairs.jsonl") if row["prompt"] in bought]


def is_first_wrong(pair: dict) -> bool:
    """Whether the rejected step of a pair is what the exact checker calls the first wrong one."""
    steps = data.split_steps(pair["initial_reason_steps"] + pair["full_rejected"])
    before = data.split_steps(pair["initial_reason_steps"] + pair["rejected"])
    return first_wrong_step(pair["prompt"], steps, pair["answer"]) == len(before) - 1


def run(args) -> int:
    return siblings.run(args, "stepco", ARMS, run_seed, COLUMNS)
