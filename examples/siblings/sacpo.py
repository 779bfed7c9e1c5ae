"""SACPO's claim: two stages, one metric each, reach what one run on both would, and lambda or q trades them
off. Its refutations: one DPO run on both files mixed, and a plain average of two models trained apart.

The two metrics of an answer: right (r), and allowed (g): no step begins with "Next,", one of the openings
that the demonstrations are full of. D_r are independent right and wrong whole answers, D_g answers with and
without the forbidden opening, right or wrong; both from the attempts of the first command's pool. Before it,
exactly and in float64: on a table of probabilities the stages multiply (Theorem 1), and how that wears off
when an optimum is only known from n sampled pairs. """
import random
import statistics

import torch

import stepdpo
from examples import siblings
from examples.arithmetic import rows_of
from examples.siblings import Arm, Bench
from model import average_checkpoints

FORBIDDEN = "Next,"
LAMBDAS = (1, 2, 4, 10)
SHARES = (0.25, 0.5, 0.75)

ARMS = {
    "sft": Arm("SFT", "Where all others start from."),
    "r": Arm("DPO on r", "The first stage: right answers, whatever their wording.", ("sft",)),
    "g": Arm("DPO on g", "Allowed answers, right or wrong: the other single objective.", ("sft",)),
    "mixed": Arm("DPO on both, mixed", "A control: one run over both files, as many updates as two stages.",
                 ("r", "g")),
    **{f"rg{lam}": Arm(f"SACPO, r then g, lambda {lam}", f"The second stage at beta / {lam}.",
                       ("r", "mixed") if lam == 1 else ()) for lam in LAMBDAS},
    **{f"gr{lam}": Arm(f"SACPO, g then r, lambda {lam}", "The order turned around.", (f"rg{lam}",))
       for lam in (1, 4)},
    "kto": Arm("SACPO, KTO on r, DPO on g, lambda 1", "The same pairs of r, taken apart.", ("rg1",)),
    **{f"q{q:g}": Arm(f"P-SACPO, q {q:g}",
                      f"{q:g} of lambda {LAMBDAS[-1]}'s weights, the rest the first stage's.")
       for q in SHARES},
    **{f"naive{q:g}": Arm(f"average of r and g, {q:g} of g", "A control: two models that were trained apart.",
                          (f"q{q:g}",)) for q in SHARES},
}
COLUMNS = {"right": ("right", ".1%"), "allowed": ("allowed", ".1%")}


def allowed(answer: str) -> bool:
    """No step begins with the forbidden opening."""
    return f": {FORBIDDEN}" not in answer


def pairs_of(bench: Bench, good, name: str) -> str:
    """A file of size.pairs pairs of whole answers, each to one problem: a good(row) one and another."""
    answers: dict[str, tuple[list, list]] = {}
    for row in rows_of(bench.pool / "attempts.jsonl"):
        if row["dataset"] == "train":
            answers.setdefault(row["id"], ([], []))[not good(row)].append(row)
    rng = random.Random(f"{name} {bench.seed}")
    found = [(rng.choice(yes), rng.choice(no)) for yes, no in answers.values() if yes and no]
    rng.shuffle(found)
    rows = [{"prompt": yes["question"], "chosen": yes["completion"], "rejected": no["completion"]}
            for yes, no in found[:bench.size.pairs]]
    return bench.write(name, rows)


def run_seed(bench: Bench) -> dict[str, dict]:
    r = pairs_of(bench, lambda row: row["correct"], "r.jsonl")
    g = pairs_of(bench, lambda row: allowed(row["completion"]), "g.jsonl")
    both = bench.write("both.jsonl", rows_of(bench.folder / "r.jsonl") + rows_of(bench.folder / "g.jsonl"))
    for arm, file in (("r", r), ("g", g), ("mixed", both)):
        bench.train(arm, "dpo", file)
    chained = "-m variants.sacpo"
    for lam in LAMBDAS:
        bench.train(f"rg{lam}", "dpo", r, program=chained, how=f"{bench.preference} --then {g} --lam {lam}")
    for lam in (1, 4):
        bench.train(f"gr{lam}", "dpo", g, program=chained, how=f"{bench.preference} --then {r} --lam {lam}")
    bench.train("kto", "dpo", r, program=chained, how=f"{bench.preference} --then {g} --lam 1 --first kto")
    for q in SHARES:
        for arm, other in ((f"q{q:g}", f"rg{LAMBDAS[-1]}"), (f"naive{q:g}", "g")):
            average_checkpoints([bench.folder / other, bench.folder / "r"], [q, 1 - q], bench.folder / arm)
    return {arm: rates(bench, arm) for arm in ARMS}


def rates(bench: Bench, arm: str) -> dict:
    """Of an arm's answers: right and allowed (the verdict), right, allowed."""
    bench.score(arm, bench.sft if arm == "sft" else None)
    rows = rows_of(bench.folder / f"score_{arm}.jsonl")
    good = [allowed(row["completion"]) for row in rows]
    return {"verdicts": [row["correct"] and ok for row, ok in zip(rows, good)],
            "right": statistics.mean(row["correct"] for row in rows), "allowed": statistics.mean(good)}


# ----------------------------------------------------------------------------------------------------------
# the same on a table of probabilities, exactly

def optimum(logps: torch.Tensor, reward: torch.Tensor, beta: float) -> torch.Tensor:
    """log of the policy that maximises E[reward] - beta KL(. || pi), where logps = log pi: it is proportional
    to pi exp(reward / beta). All (.., X, Y): X prompts, Y answers."""
    return (logps + reward / beta).log_softmax(-1)


def from_pairs(logps: torch.Tensor, pairs: torch.Tensor, beta: float, updates: int = 400) -> torch.Tensor:
    """What DPO from and against exp(logps) (n, X, Y) makes of pairs (n, pairs, 3), the indices x, chosen,
    rejected: Adam on the logits, each of the n tables by itself."""
    at = torch.arange(len(pairs))[:, None]
    x, chosen, rejected = pairs.unbind(-1)
    logits = logps.clone().requires_grad_()
    adam = torch.optim.Adam([logits], lr=0.05)
    for _ in range(updates):
        now = logits.log_softmax(-1)
        losses, _, _ = stepdpo.dpo_loss(now[at, x, chosen], now[at, x, rejected], logps[at, x, chosen],
                                        logps[at, x, rejected], beta)
        adam.zero_grad()
        losses.mean(1).sum().backward()
        adam.step()
    return logits.detach().log_softmax(-1)


def sampled_pairs(logps, reward, count: int, generator) -> torch.Tensor:
    """(n, count, 3): two answers to a random prompt, drawn from exp(logps), and by Bradley and Terry who
    wins."""
    n, prompts, _ = logps.shape
    x = torch.randint(prompts, (n, count), generator=generator)
    at = torch.arange(n)[:, None]
    draw = lambda: torch.multinomial(logps[at, x].exp().flatten(0, 1), 1, generator=generator).view(n, count)
    a, b = draw(), draw()
    first_is_better = torch.sigmoid(reward[at, x, a] - reward[at, x, b])
    first_wins = torch.rand(n, count, generator=generator) < first_is_better
    return torch.stack([x, torch.where(first_wins, a, b), torch.where(first_wins, b, a)], -1)


def on_a_table(counts: tuple[int, ...], tables: int = 20, beta: float = 0.5, lam: float = 2.0) -> str:
    """Both orders against the joint optimum, exactly and with so many pairs a stage; mean over random tables.
    """
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(tables, 4, 6, generator=generator, dtype=torch.float64)
    ref, r, g = draw().log_softmax(-1), draw(), draw()
    joint = optimum(ref, r + lam * g, beta)
    apart = lambda a, b: (a.exp() - b.exp()).abs().sum(-1).mean().item() / 2            # total variation
    rg, gr = (optimum(optimum(ref, *first), *second)
              for first, second in (((r, beta), (g, beta / lam)), ((g, beta / lam), (r, beta))))
    lines = [f"On {tables} random tables of 4 prompts and 6 answers, total variation from the optimum of "
             "r + lambda g, and between the orders:",
             f"{'pairs a stage':>16}{'r then g':>12}{'g then r':>12}{'orders':>12}",
             f"{'exact':>16}{apart(rg, joint):>12.1e}{apart(gr, joint):>12.1e}{apart(rg, gr):>12.1e}"]
    for count in counts:
        of_r, of_g = (sampled_pairs(ref, reward, count, generator) for reward in (r, g))
        rg = from_pairs(from_pairs(ref, of_r, beta), of_g, beta / lam)
        gr = from_pairs(from_pairs(ref, of_g, beta / lam), of_r, beta)
        lines.append(f"{count:>16,}{apart(rg, joint):>12.3f}{apart(gr, joint):>12.3f}{apart(rg, gr):>12.1e}")
    lines += ["On a table the order never shows, however few the pairs: DPO reads differences of log-ratios,",
              "from which all that the other stage did cancels. What wears off is how near the optimum is."]
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------

def draw(runs: list[dict], path):
    """The two rates of every arm, means over the seeds; lines join the sweeps."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("(pip install matplotlib draws the two rates as well)")
        return
    mean = lambda arm, name: statistics.mean(found["arms"][arm][name] for found in runs)
    figure, axis = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
    curves = {"SACPO, lambda 1, 2, 4, 10": ["r", *(f"rg{lam}" for lam in LAMBDAS)],
              "P-SACPO, q 0 .. 1": ["r", *(f"q{q:g}" for q in SHARES), f"rg{LAMBDAS[-1]}"],
              "average of r and g": ["r", *(f"naive{q:g}" for q in SHARES), "g"],
              "g then r": ["gr1", "gr4"], "KTO, then DPO": ["kto"], "both mixed": ["mixed"], "SFT": ["sft"]}
    for label, arms in curves.items():
        axis.plot([mean(arm, "right") for arm in arms], [mean(arm, "allowed") for arm in arms], marker="o",
                  markersize=4, label=label)
    axis.set(xlabel="right", ylabel="allowed", title="two metrics of greedy answers, means over the seeds")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right center")
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def run(args) -> int:
    table = on_a_table((100,) if args.quick else (10_000, 1_000, 100, 30))
    print(table)

    def remarks(runs: list[dict]) -> str:
        draw(runs, args.out / "sacpo" / "rates.png")
        return table
    return siblings.run(args, "sacpo", ARMS, run_seed, COLUMNS, remarks, verdict="right and allowed")
