"""Full-Step-DPO's claim: a score for every step beats DPO on whole answers and Step-DPO's one step. Its
refutation: shuffled or constant scores do as well. Only oracle > learned > shuffled supports it.

All arms but Step-DPO take the same groups of right and wrong answers, and equally many updates; Step-DPO as
many pairs as they take groups, one error each. Oracle scores are the exact checker's (1 up to the first wrong
step, 0 from it on), learned ones the PRM's of examples/siblings/prm.py, shuffled ones are learned ones dealt
out anew over all steps of the file, constant ones 0.5. """
import random

import data
from examples import siblings
from examples.arithmetic import CHECKER, command, rows_of
from examples.siblings import Arm, Bench
from examples.siblings.prm import make_prm
from variants import prm

ARMS = {
    "sft": Arm("SFT", "Where all others start from."),
    "stepdpo": Arm("Step-DPO", "One step a pair: the first wrong one, found by the exact checker.", ("sft",)),
    "dpo": Arm("DPO, all ordered pairs", "The same groups, whole answers, no scores.", ("sft",)),
    "constant": Arm("Full-Step-DPO, constant scores", "The control: the surrogate without step rewards.",
                    ("sft", "dpo")),
    "shuffled": Arm("Full-Step-DPO, shuffled scores", "The control: step rewards at the wrong steps.",
                    ("constant",)),
    "learned": Arm("Full-Step-DPO, learned scores", "The paper's method, at its tau of 0.5.",
                   ("sft", "dpo", "stepdpo", "constant", "shuffled")),
    "oracle": Arm("Full-Step-DPO, oracle scores", "The same with the exact checker's labels.",
                  ("constant", "shuffled", "learned")),
    "shuffled_5": Arm("... shuffled, tau 5", "The control, with ten times the weight on scores.",
                      ("constant",)),
    "oracle_5": Arm("... oracle, tau 5", "The exact checker's labels, with ten times the weight.",
                    ("constant", "shuffled_5", "oracle", "stepdpo")),
    "inside_shuffled": Arm("Weights inside, shuffled", "The control of the other loss; constant: DPO itself.",
                           ("dpo",)),
    "inside_oracle": Arm("Weights inside, oracle",
                         "The probable printed form: in DPO's log-sigmoid, tau 0.5.",
                         ("dpo", "inside_shuffled", "stepdpo")),
}
GROUPS = 100
# surrogate: the paper's beta; the learning rate is that of all other arms
SURROGATE = "--loss surrogate --beta 0.05"


def scored_files(bench: Bench) -> dict[str, str]:
    """Files of groups, one for each kind of scores: the same responses in all of them."""
    learned = make_prm(bench)
    train = [row for row in rows_of(bench.pool / "attempts.jsonl") if row["dataset"] == "train"]
    data.write_rows(bench.folder / "attempts.jsonl", [row for row in train if row["id"] in mixed(train)])
    attempts, scored = bench.quoted("attempts.jsonl", "learned.jsonl")
    command(f"-m variants.prm score --model {learned} --attempts {attempts} --out {scored} --prompt raw "
            f"--checker {CHECKER}")
    rows = rows_of(bench.folder / "learned.jsonl")
    dealt = [v for row in rows for v in row["scores"]]
    random.Random(f"shuffled {bench.seed}").shuffle(dealt)
    dealt = iter(dealt)
    kinds = {"learned": [row["scores"] for row in rows],
             "oracle": [[float(right) for right in exact] for exact in prm.exact_labels(rows, CHECKER)],
             "shuffled": [[next(dealt) for _ in row["scores"]] for row in rows],
             "constant": [[0.5 for _ in row["scores"]] for row in rows]}
    files = {}
    for kind, scores in kinds.items():
        name = bench.write(f"scored_{kind}.jsonl", [row | {"scores": s} for row, s in zip(rows, scores)])
        files[kind] = bench.quoted(f"groups_{kind}.jsonl")[0]
        command(f"-m variants.full_step_dpo groups --scored {name} --out {files[kind]}")
    return files


def mixed(rows: list[dict]) -> set[str]:
    """The ids of the first GROUPS problems that have right and wrong answers."""
    right, wrong = ({row["id"] for row in rows if row["correct"] == verdict} for verdict in (True, False))
    return set([id for id in dict.fromkeys(row["id"] for row in rows) if id in right & wrong][:GROUPS])


def run_seed(bench: Bench) -> dict[str, dict]:
    files = scored_files(bench)
    pairs = bench.write("step_pairs.jsonl", rows_of(bench.pool / "pairs.jsonl")[:GROUPS])
    how = f"--prompt raw --epochs {bench.size.epochs} --batch_size {bench.size.batch // 2} --lr " \
          f"{bench.size.lr:g} --checkpoint_every 0 --seed {bench.seed} --warmup 0.1 --schedule cosine"
    group_loss = dict(program="-m variants.full_step_dpo")
    bench.train("stepdpo", "stepdpo", pairs, how=f"{how} --beta {bench.size.beta:g}")
    inside = f"{how} --loss weighted_dpo --beta {bench.size.beta:g}"
    bench.train("dpo", "dpo", files["constant"], **group_loss, how=f"{inside} --tau 0")
    for kind, file in files.items():
        bench.train(kind, "dpo", file, **group_loss, how=f"{how} {SURROGATE}")
        if f"{kind}_5" in ARMS:
            bench.train(f"{kind}_5", "dpo", file, **group_loss, how=f"{how} {SURROGATE} --tau 5")
        if f"inside_{kind}" in ARMS:
            bench.train(f"inside_{kind}", "dpo", file, **group_loss, how=inside)
    found = {"sft": bench.score("sft", model=bench.sft)}
    for arm in list(ARMS)[1:]:
        last = rows_of(bench.folder / arm / "metrics.jsonl")[-1]
        found[arm] = bench.score(arm) | {name: last[name] for name in ("margin", "dpo_loss") if name in last}
    return found


def run(args) -> int:
    return siblings.run(args, "full_step_dpo", ARMS, run_seed,
                        {"margin": ("margin", ".3f"), "dpo_loss": ("dpo_loss", ".3f")})
