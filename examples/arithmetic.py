"""The whole paper on a laptop: an embedded task, its exact checker, the order of the stages, and the table.

    python -m examples.arithmetic --out runs/arithmetic                one seed, some minutes on a CPU core
    python -m examples.arithmetic --out runs/arithmetic --seeds 0,1,2  three seeds, spread, paired tests
    python -m examples.arithmetic --out runs/quick --quick             small: shows the way, not the effect

Everything else is done by the project's own commands, called here in one process and printed as one would
type them.

The task is constructed. A problem tells in words what happens to a number of things; a solution has the
paper's form:

    Mia has 13 coins. Mia buys 3 boxes with 4 in each. Mia loses 6 on the way. How many coins does Mia have?
    Let's think step by step.
    Step 1: In them are 3 * 4 = 12.
    Step 2: Now 13 + 12 = 25 coins in all.
    Step 3: Then Mia has 6 fewer, 25 - 6 = 19.
    The answer is: 19

The pupil who wrote the demonstrations for SFT has one bad habit, planted on purpose: where one must multiply,
he often adds ("3 + 4 = 7"), mostly so when one number is odd and the other even, and goes on correctly from
the wrong value. So the model knows both ways, and here and there prefers the wrong one: preference training
elicits a skill against a planted bias. The habit strikes early, and a long tail of routine steps follows. """
import argparse
import hashlib
import importlib
import json
import math
import platform
import random
import re
import shlex
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import load_file

import data
import eval as evaluation
import stepdpo
from model import Config, Llama

# ----------------------------------------------------------------------------------------------------------
# the task

NAMES = "Mia Tom Ann Ben Eva Sam Lea Max Zoe Jon".split()
ITEMS = "shells coins cards books".split()
EVENTS = {   # what can happen -> the sentences that say so; m boxes of n things
    "gain": ("finds {n} more", "buys {n} more", "gets {n} from a friend", "wins {n} in a game"),
    "lose": ("gives {n} to a friend", "loses {n} on the way", "sells {n} at the market",
             "breaks {n} by accident"),
    "gain boxes": ("buys {m} boxes with {n} in each", "finds {m} bags with {n} in each"),
    "lose boxes": ("sells {m} boxes with {n} in each", "gives away {m} bags with {n} in each"),
    "double": ("doubles the number", "gets as many again"),
}
OPENINGS = ("", "Next, ", "Now ", "After that, ", "Here ", "Then ")
STEPS = {   # what a step computes -> its wordings; {equation} is "left sign right = result"
    "+": ("{name} adds {right}, {equation}.", "{right} more makes {equation}.", "{equation} {items} in all."),
    "-": ("{name} has {right} fewer, {equation}.", "without {right} it is {equation}.",
          "{equation} {items} are left."),
    "each": ("{name} counts {equation}.", "in them are {equation}.", "{equation} {items} together."),
    "double": ("{name} has twice {left}, {equation}.", "the number doubles, {equation}.",
               "{equation} {items} now."),
}
REWORDED = (   # for Table 4: words that SFT never saw
    "if we combine {left} and {right} properly we find {equation} exactly.",
    "it follows that {equation} holds for {name}.",
    "computing carefully with {left} and {right} gives {equation} as needed.")
FIRST_LINE, LAST_LINE = "Let's think step by step.", "The answer is:"
LARGEST = 40       # every right value is from 1 to LARGEST


@dataclass(frozen=True)
class Problem:
    name: str
    items: str
    start: int
    events: tuple[tuple[str, int, int, int], ...]                       # (what, m, n, which sentence)

    def question(self) -> str:
        """The problem in words. It ends in a newline: with `--prompt raw` the reasoning follows verbatim."""
        name, items = self.name, self.items
        happened = " ".join(f"{name} {EVENTS[what][at].format(m=m, n=n)}." for what, m, n, at in self.events)
        return f"{name} has {self.start} {items}. {happened} How many {items} does {name} have?\n"


def make_problem(rng: random.Random, early: int, tail: tuple[int, int]) -> Problem:
    """`early` events of any kind, then a routine tail of `tail` (from, to) gains and losses."""
    while True:
        value = start = rng.randint(3, 25)
        events = []
        for i in range(early + rng.randint(*tail)):
            what = rng.choice(list(EVENTS) if i < early else ["gain", "lose"])
            m = rng.randint(3, 5) if "boxes" in what else 0
            n = rng.randint(2, 5) if what != "double" else 0
            value += {"gain": n, "lose": -n, "gain boxes": m * n, "lose boxes": -m * n, "double": value}[what]
            if not 1 <= value <= LARGEST:
                break
            events.append((what, m, n, rng.randrange(len(EVENTS[what]))))
        else:
            return Problem(rng.choice(NAMES), rng.choice(ITEMS), start, tuple(events))


def temptation(left: int, right: int) -> float:
    """How often the pupil writes left + right where left * right is meant."""
    return 0.75 if (left + right) % 2 else 0.2


def solve(problem: Problem, pupil: random.Random | None = None) -> list[tuple[str, int, str, int, int]]:
    """The solution's steps as (wording, left, sign, right, result); with `pupil`, of the one with the bad
    habit."""
    steps, value = [], problem.start

    def step(wording, left, sign, right):
        if sign == "*" and pupil and pupil.random() < temptation(left, right):
            sign = "+"
        result = {"+": left + right, "-": left - right, "*": left * right}[sign]
        steps.append((wording, left, sign, right, result))
        return result

    for what, m, n, _ in problem.events:
        if what == "double":
            value = step("double", value, "*", 2)
            continue
        if "boxes" in what:
            n = step("each", m, "*", n)
        value = step("+", value, "+", n) if "gain" in what else step("-", value, "-", n)
    return steps


def write_solution(problem: Problem, steps: list, rng: random.Random) -> str:
    """The paper's form, with an opening and a wording drawn for every step."""
    lines = [FIRST_LINE]
    for i, (wording, left, sign, right, result) in enumerate(steps):
        text = rng.choice(OPENINGS) + rng.choice(STEPS[wording]).format(
            name=problem.name, items=problem.items, left=left, right=right,
            equation=f"{left} {sign} {right} = {result}")
        lines.append(f"Step {i + 1}: {text[0].upper() + text[1:]}")
    return "\n".join([*lines, f"{LAST_LINE} {steps[-1][-1]}"])


def demonstration(problem: Problem, rng: random.Random) -> str:
    """What the pupil writes. (A solution in which a wrong value led below 0 or above 99 is thrown away.)"""
    while True:
        steps = solve(problem, rng)
        if all(0 <= result <= 99 for *_, result in steps):
            return write_solution(problem, steps, rng)


def read_problem(question: str) -> Problem:
    """The inverse of Problem.question. Raises ValueError for a text that is none."""
    found = re.fullmatch(r"(\w+) has (\d+) (\w+)\. (.+) How many \w+ does \w+ have\?\n?", question)
    if not found:
        raise ValueError(f"not a problem of this task: {question[:80]!r}")
    name, start, items, happened = found.groups()
    events = []
    for sentence in re.findall(rf"{name} (.+?)\.", happened):
        for pattern, what, at in SENTENCES:
            if numbers := pattern.fullmatch(sentence):
                m, n = (int(numbers.groupdict().get(key, 0)) for key in "mn")
                events.append((what, m, n, at))
                break
        else:
            raise ValueError(f"not a sentence of this task: {sentence[:80]!r}")
    return Problem(name, items, int(start), tuple(events))


SENTENCES = [(re.compile(text.format(m=r"(?P<m>\d+)", n=r"(?P<n>\d+)")), what, at)
             for what, texts in EVENTS.items() for at, text in enumerate(texts)]
EQUATION = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+)")


def first_wrong_step(question: str, steps: list[str], answer: str) -> int | None:
    """Index of the first wrong step of a solution, or None: `data.py localize --judge
    examples.arithmetic:first_wrong_step`.

    A step is right if it holds one equation, the one that the problem calls for at this place; an answer
    after it must be the problem's. The words around are not judged. That a solution stops early is no wrong
    step."""
    wanted = solve(read_problem(question))
    for i, step in enumerate(steps):
        body, _, final = step.partition(f"\n{LAST_LINE}")
        if i >= len(wanted) or EQUATION.findall(body) != [tuple(map(str, wanted[i][1:]))]:
            return i
        if final and final.strip() != str(wanted[-1][-1]):
            return i
    return None


def reword(question: str, step: str, rng: random.Random) -> str:
    """The same equation (and last line, if any) in words that the model would not choose: an
    out-of-distribution step."""
    problem = read_problem(question)
    body, found, final = step.partition(f"\n{LAST_LINE}")
    left, _, right, _ = EQUATION.search(body).groups()
    equation = EQUATION.search(body)[0]
    text = rng.choice(REWORDED).format(name=problem.name, left=left, right=right, equation=equation)
    return " " + text[0].upper() + text[1:] + found + final


# ----------------------------------------------------------------------------------------------------------
# a tokenizer and an untrained model for it, in Hugging Face's layout

# A token carries the space before it.
TOKEN = rf"{re.escape(FIRST_LINE)}|\nStep \d+:|\n{LAST_LINE}| ?[A-Za-z]+| ?\d+| ?[-+*=.,?]|\n"


def make_model(folder: Path, seed: int):
    """A word-level tokenizer, one token a word or number, and an untrained Llama of 0.2M parameters.

    No token reaches over the seam between "Step 3:" and " Then": the pre-tokenizer cuts there, and nothing is
    ever merged."""
    fill = dict(name="", items="", left="", right="", equation="+ - * =", m="", n="")
    templates = [text for texts in (*EVENTS.values(), *STEPS.values(), OPENINGS, REWORDED) for text in texts]
    phrases = [" " + text.format(**fill) for text in templates]
    phrases += [" " + text[1].upper() + text[2:] for text in phrases if text[1:2].isalpha()]
    phrases += [*NAMES, *(f" {word}" for word in NAMES + ITEMS), " In The If It Computing"]
    phrases += ["has 1. How many does have?\n", FIRST_LINE, *(f" {number}" for number in range(100))]
    phrases += [*(f"\nStep {i}:" for i in range(1, 25)), f"\n{LAST_LINE}"]
    words = dict.fromkeys(token for phrase in phrases for token in re.findall(TOKEN, phrase))
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<eos>", *words])}

    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(TOKEN), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(["<unk>", "<eos>"])
    raw = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(vocabulary),
           "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4,
           "num_key_value_heads": 4, "hidden_act": "silu", "max_position_embeddings": 512,
           "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
           "initializer_range": 0.0625, "bos_token_id": None, "eos_token_id": vocabulary["<eos>"]}
    Llama(Config.from_dict(raw)).init_weights(seed).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    stepdpo.write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "eos_token": "<eos>",
        "clean_up_tokenization_spaces": False})


# ----------------------------------------------------------------------------------------------------------
# the stages

@dataclass(frozen=True)
class Size:
    """How much of everything. The defaults were chosen on development problems (`--dev`); README says how."""
    tail: tuple[int, int] = (4, 6) # routine events after the EARLY ones, from and to
    sft: int = 24000               # demonstrations, seen once
    sft_batch: int = 12
    collect: int = 700             # problems that the pairs to train on come from
    held_out: int = 300            # others, for the pairs on which margin and preference accuracy are taken
    samples: int = 4               # attempts a problem, and continuations an error
    pairs: int = 200
    epochs: int = 8                # the paper's
    batch: int = 16                # pairs an update
    lr: float = 2e-5
    beta: float = 1.0
    test: int = 1000


QUICK = Size(tail=(0, 1), sft=10800, collect=120, held_out=60, pairs=48, lr=6e-5, test=100)
EARLY = 2                          # events in which the habit can strike

ARMS = {   # name -> title, method, file of pairs
    "sft": ("SFT", None, None),
    "sft_chosen": ("SFT, continued on the right answers", "sft", "pairs.jsonl"),
    "dpo": ("DPO, independent whole answers", "dpo", "whole.jsonl"),
    "dpo_rectified": ("DPO, rectified whole answers", "dpo", "pairs.jsonl"),
    "stepdpo": ("Step-DPO", "stepdpo", "pairs.jsonl"),
    "stepdpo_ood": ("Step-DPO, chosen steps re-worded", "stepdpo", "reworded.jsonl"),
    "stepdpo_lora": ("Step-DPO, LoRA at 10 x the lr", "stepdpo", "pairs.jsonl"),                # with --lora
    "stepdpo_lora_1x": ("Step-DPO, LoRA at the same lr", "stepdpo", "pairs.jsonl"),
}
LORA = {"stepdpo_lora": 10, "stepdpo_lora_1x": 1}            # arm -> how often the lr of full training
SETS = ("test", "dev", "held-out", "held-out", "train", "train", "train", "train", "train", "train")


def belongs_to(problem: Problem) -> str:
    """The set that a problem belongs to, by a hash of its numbers: no two sets share one, under any seed or
    any names."""
    numbers = repr((problem.start, [event[:3] for event in problem.events])).encode()
    return SETS[hashlib.blake2b(numbers, digest_size=8).digest()[0] % len(SETS)]


def problems_of(which: str, count: int, size: Size, seed: int) -> list[Problem]:
    """`count` different problems of a set, drawn by an own random stream for each set."""
    rng, found = random.Random(f"{which} {seed}"), {}
    for _ in range(1000 + 100 * count):                      # no set is anywhere near exhausted
        if len(found) == count:
            break
        problem = make_problem(rng, EARLY, size.tail)
        if belongs_to(problem) == which:
            found[problem.start, tuple(event[:3] for event in problem.events)] = problem
    assert len(found) == count, f"the task has fewer than {count} {which} problems: make it larger"
    return list(found.values())


def write_task(folder: Path, size: Size, seed: int, scored: str):
    """What the pipeline starts from: an untrained model, demonstrations, problems to collect errors on,
    problems to score."""
    make_model(folder / "start", seed)
    training = problems_of("train", size.sft + size.collect, size, seed)
    rng = random.Random(f"demonstrations {seed}")
    held_out = problems_of("held-out", size.held_out, size, seed)
    test = problems_of(scored, size.test, size, seed)

    def rows(which, problems):
        return [{"id": f"{which}-{i}", "dataset": which, "question": p.question(),
                 "answer": str(solve(p)[-1][-1])} for i, p in enumerate(problems)]

    shown = [{"prompt": p.question(), "response": demonstration(p, rng)} for p in training[:size.sft]]
    data.write_rows(folder / "demonstrations.jsonl", shown)
    asked = rows("train", training[size.sft:]) + rows("held-out", held_out)
    data.write_rows(folder / "problems.jsonl", asked)
    data.write_rows(folder / "test.jsonl", rows(scored, test))


def rows_of(path: Path) -> list[dict]:
    return [row for _, row in data.read_rows(path)]


def command(line: str):
    """Print one of the project's commands as one would type it, and run it in this process. Each knows what
    is done already."""
    print(f"\n$ python {line}", flush=True)
    program, *argv = shlex.split(line)
    if program == "-m":
        program, *argv = argv
    status = importlib.import_module(program.removesuffix(".py")).main(argv)
    if status:
        sys.exit(status)


ANSWERS = "--prompt raw --max_new_tokens 200 --batch_size 512"
CHECKER = "examples.arithmetic:first_wrong_step"


def sampling(size: Size, seed: int) -> str:
    return f"{ANSWERS} --samples {size.samples} --temperature 0.8 --top_p 0.95 --seed {seed}"


def make_pool(folder: Path, size: Size, seed: int, scored: str) -> int:
    """The stages that all arms share: the task, SFT, its attempts, its errors, and pairs of both kinds.
    Returns the number of pairs an arm."""
    f, how = shlex.quote(str(folder)), sampling(size, seed)
    settings = json.loads(json.dumps({"size": vars(size), "scored_on": scored}))    # with lists for tuples
    if (folder / "settings.json").exists() and json.loads((folder / "settings.json").read_text()) != settings:
        raise data.DataError(f"{folder}: holds a run with other settings (--quick, --dev, or another "
                             "version); choose another --out")
    write_task(folder, size, seed, scored)
    stepdpo.write_json(folder / "settings.json", settings)

    command(f"stepdpo.py sft --model {f}/start --data {f}/demonstrations.jsonl --out {f}/sft --prompt raw "
            f"--epochs 1 --batch_size {size.sft_batch} --lr 4e-3 --checkpoint_every 400 --seed {seed}")
    command(f"eval.py --model {f}/sft --problems {f}/problems.jsonl --out {f}/attempts.jsonl {how}")
    command(f"data.py localize {f}/attempts.jsonl --judge {CHECKER} --out {f}/errors.jsonl")
    command(f"eval.py --model {f}/sft --problems {f}/errors.jsonl --out {f}/rectified.jsonl {how}")
    command(f"data.py pairs {f}/rectified.jsonl --out {f}/all_pairs.jsonl --per_error 1 --verify {CHECKER}")
    command(f"data.py pairs {f}/attempts.jsonl --out {f}/all_whole.jsonl --whole --per_error 1")
    return divide(folder, size, seed)


def training(size: Size, seed: int) -> str:
    return (f"--prompt raw --epochs {size.epochs} --batch_size {size.batch} --lr {size.lr:g} "
            f"--checkpoint_every 0 --seed {seed}")


def run_seed(folder: Path, size: Size, seed: int, scored: str, lora: int | None = None) -> dict:
    """All stages under one seed. Returns what the table needs: each arm's verdicts, problem by problem, and
    held-out figures. lora: the rank of the LoRA arms, without which they are left out."""
    count = make_pool(folder, size, seed, scored)
    arms = [arm for arm in ARMS if lora or arm not in LORA]
    f = shlex.quote(str(folder))
    preference = f"{training(size, seed)} --beta {size.beta:g}"
    every = max(1, size.epochs * math.ceil(count / size.batch) // 8)
    for arm in arms:
        _, method, pairs = ARMS[arm]
        if method is None:
            continue
        how = preference
        if arm in LORA:
            how = f"{preference} --lora {lora} --lr {LORA[arm] * size.lr:g}"
        if method == "sft":
            how = f"{training(size, seed)} --warmup 0.1 --schedule cosine"
        if arm in ("stepdpo", "dpo"):                        # the two curves of Fig. 2
            how += f" --eval_data {f}/held_out_{pairs} --eval_every {every}"
        command(f"stepdpo.py {method} --model {f}/sft --data {f}/{pairs} --out {f}/{arm} {how}")
    for arm in arms:
        command(f"eval.py --model {f}/{arm} --problems {f}/test.jsonl --out {f}/score_{arm}.jsonl {ANSWERS}")

    held_out = rows_of(folder / "held_out_pairs.jsonl")
    log_probs = lambda arm: stepdpo.log_probs(folder / arm, held_out, "stepdpo", "raw")         # (pairs, 2)
    before = log_probs("sft")
    found = {}
    for arm in arms:
        rows = rows_of(folder / f"score_{arm}.jsonl")
        moved = log_probs(arm) - before                      # (pairs, 2): log pi/ref of s_win, s_lose
        margin = size.beta * (moved[:, 0] - moved[:, 1])
        found[arm] = {"verdicts": [row["correct"] for row in rows]} | ({} if arm == "sft" else {
            "margin": margin.mean().item(), "preference_accuracy": (margin > 0).float().mean().item(),
            "chosen_logps_change": moved[:, 0].mean().item(),
            "rejected_logps_change": moved[:, 1].mean().item(),
            "seconds": sum(row["seconds"] for row in rows_of(folder / arm / "metrics.jsonl"))})
    return {"pairs": count, "held_out_pairs": len(held_out), "arms": found}


def divide(folder: Path, size: Size, seed: int) -> int:
    """Equally many pairs for every arm, those of held-out problems apart, re-worded copies for Table 4.
    Returns their number."""
    pairs, whole = rows_of(folder / "all_pairs.jsonl"), rows_of(folder / "all_whole.jsonl")
    rng = random.Random(f"order {seed}")
    rng.shuffle(pairs)                                       # the errors of one problem stand together
    rng.shuffle(whole)
    count = min(size.pairs, *(sum(row["dataset"] == "train" for row in rows) for rows in (pairs, whole)))
    for name, rows in (("pairs", pairs), ("whole", whole)):
        data.write_rows(folder / f"{name}.jsonl", [row for row in rows if row["dataset"] == "train"][:count])
        held_out = [row for row in rows if row["dataset"] == "held-out"]
        data.write_rows(folder / f"held_out_{name}.jsonl", held_out)
    data.write_rows(folder / "reworded.jsonl", [row | {"chosen": reword(row["prompt"], row["chosen"], rng)}
                                                for row in rows_of(folder / "pairs.jsonl")])
    return count


# ----------------------------------------------------------------------------------------------------------
# the table

# 97.5 % points of Student's t for 1..9 degrees of freedom
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p of `wins` against `losses` among the problems on which two arms differ (McNemar's
    test)."""
    n = wins + losses
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(wins, losses) + 1)) / 2 ** n)


def over_seeds(values: list[float]) -> tuple[float, float | None]:
    """Mean, and half of its 95 % t interval over the seeds (None for one seed)."""
    if len(values) == 1:
        return values[0], None
    t = T_975[min(len(values), 10) - 2]
    return statistics.mean(values), t * statistics.stdev(values) / math.sqrt(len(values))


def compare(runs: list[dict], a: str, b: str) -> dict:
    """Arm `a` against arm `b` on the same problems. `holds`: the exact test sees a difference at 5 %, and
    with several seeds their t interval does too."""
    pairs = [(x, y) for run in runs for x, y in zip(run["arms"][a]["verdicts"], run["arms"][b]["verdicts"])]
    wins, losses = sum(x and not y for x, y in pairs), sum(y and not x for x, y in pairs)
    rate = lambda run, arm: statistics.mean(run["arms"][arm]["verdicts"])
    differences = [rate(run, a) - rate(run, b) for run in runs]
    mean, half = over_seeds(differences)
    p = sign_test(wins, losses)
    return {"a": a, "b": b, "difference": mean, "half_interval_over_seeds": half, "only_a_right": wins,
            "only_b_right": losses, "p": p,
            "better_under": f"{sum(d > 0 for d in differences)} of {len(runs)} seeds",
            "holds": p < 0.05 and (half is None or abs(mean) > half)}


def in_words(test: dict, against: str) -> str:
    """'+4.2 points against SFT (p < 0.001)', with the verdict. against: the title of arm `b`."""
    half = test["half_interval_over_seeds"]
    half = f" +- {100 * half:.1f}" if half is not None else ""
    verdict = ("better" if test["difference"] > 0 else "WORSE") if test["holds"] else "within noise"
    if not test["holds"] and test["p"] < 0.05:               # sure of these models, not of other seeds
        verdict = f"better under {test['better_under']}, and the t interval reaches 0"
    p = f"p = {test['p']:.2g}" if test["p"] >= 0.001 else "p < 0.001"
    return f"{100 * test['difference']:+.1f}{half} points against {against}: {verdict} " \
           f"({test['only_a_right']} : {test['only_b_right']} problems, {p})"


AGAINST = {"sft_chosen": ("sft",), "dpo": ("sft",), "dpo_rectified": ("sft", "dpo"),
           "stepdpo": ("sft", "sft_chosen", "dpo", "dpo_rectified"), "stepdpo_ood": ("stepdpo",),
           "stepdpo_lora": ("stepdpo",), "stepdpo_lora_1x": ("stepdpo",)}
ABOUT = {
    "sft": "Where all others start from.",
    "sft_chosen": "The control: the same right answers, no preference; what it gains needs no DPO.",
    "dpo": "The paper's baseline: whole right and wrong answers to a problem, sampled independently "
           "(Eq. 1, Table 3).",
    "dpo_rectified": "The same pairs as Step-DPO, but judged to the end of the answer: the stricter "
                     "baseline.",
    "stepdpo": "The paper's method: only the first wrong step and its replacement are judged "
               "(Eq. 2, Table 3).",
    "stepdpo_ood": "Chosen steps in words that the model would not use (Table 4): the paper finds less gain.",
    "stepdpo_lora": "An adapter is trained instead of the weights, at the rate that --lora takes by default.",
    "stepdpo_lora_1x": "The same adapter at the rate of full training.",
}


def summarize(runs: list[dict]) -> tuple[dict, str]:
    """results.json's `arms` and `comparisons`, and the table as text."""
    arms, comparisons = {}, []
    lines = [f"{'':<36}{'accuracy':>8}  {'95 % interval':<14}{'margin':>8}{'pref. acc.':>11}"
             f"{'log p chosen':>13}{'rejected':>9}"]
    for arm, (title, method, _) in ARMS.items():
        if arm not in runs[0]["arms"]:
            continue
        verdicts = [v for run in runs for v in run["arms"][arm]["verdicts"]]
        mean, half = over_seeds([statistics.mean(run["arms"][arm]["verdicts"]) for run in runs])
        low, high = max(0.0, mean - (half or 0.0)), min(1.0, mean + (half or 0.0))
        if half is None:
            low, high = evaluation.wilson(sum(verdicts), len(verdicts))
        arms[arm] = {"accuracy": mean, "correct": sum(verdicts), "problems": len(verdicts), "low": low,
                     "high": high,
                     "accuracy_per_seed": [statistics.mean(run["arms"][arm]["verdicts"]) for run in runs]}
        line = f"{title:<36}{mean:>8.1%}  {f'{low:.1%} .. {high:.1%}':<14}"
        if method:
            for name in ("margin", "preference_accuracy", "chosen_logps_change", "rejected_logps_change",
                         "seconds"):
                values = [run["arms"][arm][name] for run in runs]
                arms[arm][name], arms[arm][f"{name}_per_seed"] = statistics.mean(values), values
            line += f"{arms[arm]['margin']:>8.3f}{arms[arm]['preference_accuracy']:>11.1%}" \
                    f"{arms[arm]['chosen_logps_change']:>+13.3f}{arms[arm]['rejected_logps_change']:>+9.3f}"
        lines += [line, f"    {ABOUT[arm]}"]
        for other in AGAINST.get(arm, ()):
            comparisons.append(compare(runs, arm, other))
            lines.append(f"    {in_words(comparisons[-1], ARMS[other][0])}")
    return {"arms": arms, "comparisons": comparisons}, "\n".join(lines)


def cost_of_lora(folder: Path, arms: dict) -> str:
    """What full training and LoRA hold in memory for what they train, and how long their updates took."""
    sizes = [sum(w.numel() for w in load_file(path).values()) for path in
             (folder / "sft" / "model.safetensors", folder / "stepdpo_lora" / "adapter_model.safetensors")]
    weights, adapter = sizes
    full, lora = (arms[arm]["seconds"] for arm in ("stepdpo", "stepdpo_lora"))
    return (f"Weights, gradients and AdamW's moments: full {16 * weights:,} bytes ({weights:,} parameters), "
            f"LoRA {4 * weights + 16 * adapter:,} ({adapter:,} are trained).\n"
            f"Updates: full {full:.1f} s, LoRA {lora:.1f} s.")


def before_and_after(folder: Path) -> str:
    """A problem that SFT got wrong and Step-DPO right: both answers, the lines that changed marked."""
    for old, new in zip(rows_of(folder / "score_sft.jsonl"), rows_of(folder / "score_stepdpo.jsonl")):
        if not (new["correct"] and not old["correct"]):
            continue
        if first_wrong_step(new["question"], data.split_steps(new["completion"]), new["answer"]) is None:
            was, now = old["completion"].split("\n"), new["completion"].split("\n")
            wrong = first_wrong_step(old["question"], data.split_steps(old["completion"]), old["answer"])
            first = len(was) - 1 if wrong is None else wrong + 1         # line 0 is "Let's think ..."

            def shown(lines):
                return "\n".join(f"  {'>>' if i == first else '  '} {line}" for i, line in enumerate(lines))
            return (f"{old['question']}  before (SFT), its first wrong step marked:\n{shown(was)}\n"
                    f"  after Step-DPO:\n{shown(now)}")
    return "No problem that SFT got wrong was right after Step-DPO."


def draw(folders: list[Path], path: Path):
    """Fig. 2 of the paper: preference accuracy and margin over the updates, on held-out pairs of each
    method's own kind. Thin lines are the seeds, thick ones their mean."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("(pip install matplotlib draws the curves of Fig. 2 as well)")
        return
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for arm, colour in (("stepdpo", "tab:blue"), ("dpo", "tab:orange")):
        curves = [rows_of(folder / arm / "eval.jsonl") for folder in folders]
        for axis, name, title in zip(axes, ("accuracy", "margin"), ("preference accuracy", "reward margin")):
            points = [rows for rows in zip(*curves) if rows[0]["step"] > 0]      # at 0 nothing is preferred
            steps = [rows[0]["step"] for rows in points]
            values = [[row[name] for row in rows] for rows in points]
            axis.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
            means = [statistics.mean(v) for v in values]
            axis.plot(steps, means, color=colour, marker="o", markersize=3, label=ARMS[arm][0])
            axis.set(xlabel="updates", title=f"{title}, held-out pairs")
            axis.grid(alpha=0.3)
    axes[1].legend()
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def seeds_of(text: str) -> list[int]:
    """"0,1,2" -> [0, 1, 2], for argparse."""
    parts = text.split(",")
    if len(set(parts)) < len(parts) or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text}: expected different whole numbers, such as 0,1,2")
    return [int(part) for part in parts]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.arithmetic",
        description="The whole Step-DPO paper on a laptop: builds a task, trains a small Llama by SFT, "
                    "collects its errors, and compares SFT, DPO and Step-DPO. After any interruption, run "
                    "the same command again.")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR",
                        help="keeps every file of every stage, and results.json")
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, default=0,
                       help="of problems, weights, sampling and order of rows (default 0)")
    seeds.add_argument("--seeds", type=seeds_of, metavar="S,S,...",
                       help="repeat everything under each, and test the arms in pairs")
    parser.add_argument("--quick", action="store_true",
                        help="everything small, under a minute: for a first look and tests")
    parser.add_argument("--lora", type=int, metavar="R",
                        help="two arms more: Step-DPO with LoRA of rank R, at 10 times the learning rate of "
                             "the others and at the same")
    parser.add_argument("--dev", action="store_true",
                        help="score on development problems, on which all settings were chosen")
    args = parser.parse_args(argv)
    numbers = args.seeds or [args.seed]
    # a model this small gains little from a second thread, and on a busy machine loses much
    torch.set_num_threads(1)
    size, begun, runs = QUICK if args.quick else Size(), time.perf_counter(), []
    scored = "dev" if args.dev else "test"
    try:
        for seed in numbers:
            runs.append(run_seed(args.out / f"seed{seed}", size, seed, scored, args.lora))
    except (data.DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seconds = time.perf_counter() - begun
    summary, table = summarize(runs)
    counts = " or ".join(map(str, sorted({run["pairs"] for run in runs})))
    interval = "Wilson, of the problems" if len(runs) == 1 else "t, over the seeds"
    print(f"\n{size.test:,} {scored} problems a seed that no stage has seen, greedy answers; seeds "
          f"{', '.join(map(str, numbers))}; {counts} pairs,\n{size.epochs} epochs, lr {size.lr:g}, beta "
          f"{size.beta:g} in every arm. Interval: {interval}.\n"
          "Margin, preference accuracy and change of log p: on held-out step pairs.\n")
    print(table)
    if args.lora:
        print(f"\n{cost_of_lora(args.out / f'seed{numbers[0]}', summary['arms'])}")
    print(f"\nOne problem, before and after:\n\n{before_and_after(args.out / f'seed{numbers[0]}')}\n")
    draw([args.out / f"seed{seed}" for seed in numbers], args.out / "curves.png")
    stepdpo.write_json(args.out / "results.json", {
        **summary, "seeds": numbers, "scored_on": scored, "quick": args.quick, "size": vars(size),
        "seconds": round(seconds, 1),
        "pairs": [run["pairs"] for run in runs], "held_out_pairs": [run["held_out_pairs"] for run in runs],
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads"})
    print(f"{args.out / 'results.json'}; {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
