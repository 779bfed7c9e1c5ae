"""sDPO's claim: stages from easy to hard beat all data at once. Its refutation: all data at once, at the beta
that lets it move as far from S.

Two sources of Step-DPO pairs of the first command's pool, by where the planted habit struck: on two even or
two odd numbers it strikes rarely (easy: the model prefers the right step already), on an odd and an even one
mostly (hard). All arms take the same pairs and equally many updates. """
import json
import math
import random
import statistics
from pathlib import Path

import torch

import data
import stepdpo
from examples import siblings
from examples.arithmetic import EQUATION, rows_of
from examples.siblings import Arm, Bench
from model import choose_device
from variants import sdpo

ARMS = {
    "sft": Arm("SFT", "Where all others start from: S."),
    "at_once": Arm("Step-DPO, all at once", "The paper's baseline: one stage, and S is the reference.",
                   ("sft",)),
    "half_beta": Arm("Step-DPO at once, beta / 2", "Where two stages end if each reaches its optimum.",
                     ("at_once",)),
    "matched": Arm("Step-DPO at once, equal KL",
                   "The control: at the beta, of those tried, that ends as far from S as sDPO.",
                   ("at_once",)),
    "random": Arm("sDPO, random split", "Two stages of mixed pairs: the paper sees no gain over one stage.",
                  ("at_once",)),
    "hard_first": Arm("sDPO, hard to easy", "The order turned around.", ("at_once",)),
    "sdpo": Arm("sDPO, easy to hard",
                "The paper's method: the source of higher reward accuracy under S comes first.",
                ("at_once", "half_beta", "matched", "random", "hard_first")),
}
COLUMNS = {"kl": ("KL to S", ".3f"), "beta": ("beta", ".3g"), "margin": ("margin", ".3f")}
EACH = 96           # pairs of a source: six updates an epoch, and twelve of both together


def sources(bench: Bench) -> tuple[str, str]:
    """(easy, hard): files of EACH pairs."""
    rows = [row for row in rows_of(bench.pool / "all_pairs.jsonl") if row["dataset"] == "train"]
    random.Random(f"sdpo {bench.seed}").shuffle(rows)
    easy, hard = [], []
    for row in rows:
        left, sign, right, _ = EQUATION.search(row["chosen"]).groups()
        if sign == "*":
            (hard if (int(left) + int(right)) % 2 else easy).append(row)
    count = min(EACH, len(easy), len(hard))
    bench.write("both.jsonl", easy[:count] + hard[:count])
    return bench.write("easy.jsonl", easy[:count]), bench.write("hard.jsonl", hard[:count])


def distance(bench: Bench, arm: str) -> float:
    """KL(arm || S) in nats an answer, on samples to problems that nobody trains on."""
    folder = bench.folder / arm
    args = stepdpo.parser(sdpo.options).parse_args(
        ["dpo", "--model", str(bench.pool / "sft"), "--data", "", "--out", "", "--prompt", "raw",
         "--max_length", "300", "--seed", str(bench.seed)])
    stepdpo.settle(args)
    tokenizer = data.Tokenizer.from_pretrained(folder)
    asked = [row for row in rows_of(bench.pool / "problems.jsonl") if row["dataset"] == "held-out"]
    prompts = [tokenizer.encode(row["question"]).ids for row in asked]
    kept = bench.folder / f"{arm}.samples.jsonl"
    return sdpo.kl(folder, args.model, prompts, kept, args, choose_device(None))[0]


def at_once(bench: Bench, beta: float) -> str:
    """Train on both sources in one stage; the arm's name."""
    how = bench.preference.replace(f"--beta {bench.size.beta:g}", f"--beta {beta:g}")
    bench.train(f"beta_{beta:g}", "stepdpo", bench.quoted("both.jsonl")[0], how=how)
    return f"beta_{beta:g}"


def matched_beta(bench: Bench, wanted: float) -> float:
    """The beta at which one stage ends `wanted` nats from S: the best of a grid of factors 2, or half-way
    between its two best."""
    tried: dict[float, float] = {}

    def off(beta: float) -> float:
        if beta not in tried:
            tried[beta] = distance(bench, at_once(bench, beta))
        return abs(math.log(tried[beta] / wanted))

    first, second, *_ = sorted((bench.size.beta * 2.0 ** k for k in range(-3, 2)), key=off)
    best = min((first, float(f"{math.sqrt(first * second):.3g}")), key=off)
    found = ", ".join(f"{beta:g}: {tried[beta]:.3f}" for beta in sorted(tried))
    print(f"KL to S at each beta {found}; sDPO {wanted:.3f}")
    return best


def run_seed(bench: Bench) -> dict[str, dict]:
    easy, hard = sources(bench)
    for arm, how in (("sdpo", ""), ("hard_first", "--as_given"), ("random", "--random_split")):
        more = f"--more_data {easy} --kl_samples 0 {how}"
        bench.train(arm, "stepdpo", hard, program="-m variants.sdpo", how=f"{bench.preference} {more}")
    beta = bench.size.beta
    betas = {"at_once": beta, "half_beta": beta / 2, "matched": matched_beta(bench, distance(bench, "sdpo"))}
    of_arm = {arm: at_once(bench, betas[arm]) if arm in betas else arm for arm in ARMS}

    held_out = rows_of(bench.pool / "held_out_pairs.jsonl")
    log_probs = lambda folder: stepdpo.log_probs(folder, held_out, "stepdpo", "raw")
    before, found = log_probs(bench.pool / "sft"), {}
    for arm, name in of_arm.items():
        if arm == "sft":
            found[arm] = bench.score(arm, bench.sft)
            continue
        moved = log_probs(bench.folder / name) - before
        found[arm] = bench.score(arm, bench.quoted(name)[0]) | {
            "kl": distance(bench, name), "beta": betas.get(arm, beta),
            "margin": beta * (moved[:, 0] - moved[:, 1]).mean().item()}
    return found | {"seed": {"stages": stages(bench)}}


def stages(bench: Bench) -> dict:
    """What the paper says of the second stage's reference, on the pairs of that stage."""
    kept = json.loads((bench.folder / "sdpo" / "sdpo.json").read_text())["stages"]
    unseen = rows_of(Path(kept[1]["file"]))

    def gamma(folder):
        chosen_logps, rejected_logps = stepdpo.log_probs(folder, unseen, "stepdpo", "raw").unbind(1)
        return chosen_logps - rejected_logps

    of_S, of_M1 = gamma(bench.pool / "sft"), gamma(bench.folder / "sdpo" / "stage1")
    from_S = -torch.nn.functional.logsigmoid(bench.size.beta * (of_S - of_M1)).mean().item()
    return {"first": Path(kept[0]["file"]).stem, "accuracy_of_S": [stage["accuracy_of_S"] for stage in kept],
            "gamma_of_S": of_S.mean().item(), "gamma_of_M1": of_M1.mean().item(),
            "gamma_of_M2": gamma(bench.folder / "sdpo").mean().item(), "first_loss": kept[1]["first_loss"],
            "first_loss_from_S": from_S}


def remarks(runs: list[dict]) -> str:
    mean = lambda name: statistics.mean(found["stages"][name] for found in runs)
    rose = sum(found["stages"]["gamma_of_M1"] > found["stages"]["gamma_of_S"] for found in runs)
    easy = statistics.mean(found["stages"]["accuracy_of_S"][0] for found in runs)
    hard = statistics.mean(found["stages"]["accuracy_of_S"][1] for found in runs)
    return (f"Reward accuracy under S: {easy:.1%} of the first stage's pairs, {hard:.1%} of the second's.\n"
            f"gamma on the second stage's pairs: {mean('gamma_of_S'):+.2f} under S, "
            f"{mean('gamma_of_M1'):+.2f} under M_1, which has not seen them (higher in {rose} of {len(runs)} "
            f"seeds), {mean('gamma_of_M2'):+.2f} under M_2, which has.\n"
            f"The second stage's first loss: {mean('first_loss'):.4f}; begun at S instead of M_1 it would be "
            f"{mean('first_loss_from_S'):.4f}.")


def run(args) -> int:
    return siblings.run(args, "sdpo", ARMS, run_seed, COLUMNS, remarks)
