"""A process reward model (PRM): how probably a solution still comes right, asked at the end of each step.

    v(x, s_1..s_m) = sigmoid( log p(" +" | x, s_1..s_m) - log p(" -" | x, s_1..s_m) )
    loss           = -mean over steps of  y_m log v_m + (1 - y_m) log(1 - v_m)

The value head is two rows of lm_head, those of the tokens " +" and " -", so the one loop trains, shards,
checkpoints and saves it with the model. y_m, the label of a step, is the share of right answers among what
follows it: among N continuations sampled from there (Math-Shepherd's soft estimate, arXiv 2312.08935; M
solutions a problem, N continuations a step is also what is known of Full-Step-DPO, arXiv 2502.14356), or,
with `label --tree`, among the sampled solutions that begin so, the leaves of a tree (StepCo, arXiv
2410.12934). A solution's last step has its own verdict, 0 or 1.

From the papers: both kinds of labels, soft targets, the two tokens (Math-Shepherd's, whose released model
StepCo's code asks). Ours: cross-entropy where StepCo's own verifier takes the squared error (logged here as
`squared_error`), and the defaults of lr, batch and epochs, which are this repository's for SFT.

A softmax ties all rows of lm_head together: what + gains the others lose. Their gradients do cancel in v, but
only up to rounding, and AdamW makes full steps of rounding noise; with tied embeddings that would wear the
embeddings away. So each place has one logit here (`value_logits`), through which the cancellation is exact:
no other row of lm_head moves by a bit, and nothing need be masked or untied. (The rows of " +" and " -" do
move. Where embeddings are tied, these are the input embeddings of the two tokens as well. With --lora no row
moves: the two stay as the checkpoint has them, and what is before them learns to ask.)

    python -m examples.siblings --method prm --out runs/siblings --seeds 0,1,2,3,4     the embedded task

    python eval.py --model SFT --problems attempts.jsonl --rollouts 8 --every_step --all --out valued.jsonl
    python -m variants.prm label --attempts valued.jsonl --out labels.jsonl           labels, and their audit
    python -m variants.prm train --model SFT --data labels.jsonl --out PRM            one GPU
    torchrun --nproc_per_node 8 -m variants.prm train --model SFT --data labels.jsonl --out PRM --shard
    python -m variants.prm score --model PRM --attempts attempts.jsonl --out scored.jsonl

label   valued attempts (with --tree: any attempts) -> rows for train, and what the labels are worth
train   all options of `stepdpo.py sft`: python -m variants.prm train --help
score   any attempts -> the same with `steps` and `scores`, a value a step, which variants.full_step_dpo
        reads, and the same as counts in `values`, for `data.py localize --judge values`. --scores takes the
        scores from a file instead of a model: those of a PRM that is served elsewhere.

Shapes: S steps asked in a micro-batch, M = 2S tokens asked for, P places that predict. """
import argparse
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import stepdpo
from data import DataError
from model import Llama, choose_device, fingerprint, leave_processes, locked, resolve

VERDICTS = " +", " -"


# ----------------------------------------------------------------------------------------------------------
# the loss

def value_logits(token_logps: torch.Tensor, batch: data.Batch) -> torch.Tensor:
    """(M,) -> (S,): the logit of v at the end of each step, row by row.

    Rows that begin alike share their places. There the difference is taken once: its gradient g reaches the
    two log-probs as g and -g, whose sum, that of all other rows of lm_head, is exactly 0. (Taken row by row
    it would be g + g' - g - g', added in some order.)"""
    asked = [2 * len(example.row["labels"]) for example in batch.examples]
    of_all = torch.arange(sum(asked), device=token_logps.device)
    halves = [part.chunk(2) for part in of_all.split(asked)]
    plus, minus = (torch.cat(half) for half in zip(*halves))                # (S,) each: which of the M
    place = batch.source[plus]                                              # (S,): which of the P
    first = torch.zeros_like(batch.predict_at).scatter_(0, place, of_all[:len(plus)])
    return (token_logps[plus] - token_logps[minus])[first][place]


def value_objective(token_logps, ref_token_logps, batch, args):
    """Cross-entropy to soft labels: losses (S,), and how far off the values are. Its least possible value is
    not 0 but the labels' own entropy, which `label` prints."""
    logits = value_logits(token_logps, batch)
    labels = torch.tensor([y for example in batch.examples for y in example.row["labels"]],
                          dtype=logits.dtype, device=logits.device)
    losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    values = logits.sigmoid()
    return losses, {"squared_error": (values - labels) ** 2, "value": values, "label": labels}


# ----------------------------------------------------------------------------------------------------------
# rows to examples

def solution(where: str, question: str, steps: list[str], tokenizer: data.Tokenizer, style: str,
             labels: list | None = None, max_length: int | None = None) -> data.Example:
    """A solution, asked for both verdicts at the last token of each step (of each that has a label). Raises
    Unfit where it cannot be read."""
    text = "".join(steps)
    for part in (text,) if style == "raw" else (question, text):
        tokenizer.check(part)
    rendered = data.render_prompt(style, question, tokenizer, text)
    ids, offsets = tokenizer.encode(rendered + text, bos=style != "chat")
    if max_length is not None and len(ids) > max_length:
        raise data.Unfit(f"longer than {max_length} tokens")
    asked = [m for m in range(len(steps)) if labels is None or labels[m] is not None]
    after = len(rendered) + np.cumsum([len(step) for step in steps])[asked]         # characters
    ends = np.searchsorted([end for _, end in offsets], after).clip(max=len(ids) - 1)
    plus, minus = verdict_tokens(tokenizer)
    row = {"labels": [0.0 if labels is None else float(labels[m]) for m in asked]}
    return data.Example(where, [np.array(ids, dtype=np.int32)], 1, [np.tile(np.array(asked, np.int32), 2)],
                        question, row, units=len(asked),
                        asked=[(np.tile(ends, 2), np.repeat([plus, minus], len(ends)))])


def verdict_tokens(tokenizer: data.Tokenizer) -> tuple[int, int]:
    """The ids of " +" and " -"; of their last tokens, where they are several."""
    plus, minus = (tokenizer.encode(verdict, bos=False).ids[-1] for verdict in VERDICTS)
    if plus == minus:
        raise DataError(f"{tokenizer.source}: ' +' and ' -' are one token for this tokenizer: it has no word "
                        "for a verdict; choose another checkpoint")
    return plus, minus


def encode(source, tokenizer, method, style, max_length=None):
    """The rows that `label` writes, {question, steps, labels}, as examples; see data.encode_dataset."""
    report, kept = data.Report(str(source)), []
    for where, row in data.read_rows(source):
        report.rows += 1
        question, steps = data.text_field(row, "question", where), texts_in(row, "steps", where)
        labels = shares_in(row, "labels", len(steps), where)
        try:
            kept.append(solution(where, question, steps, tokenizer, style, labels, max_length))
        except data.Unfit as reason:
            report.drop(str(reason), where)
    report.kept = len(kept)
    if not kept:
        raise DataError(f"{source}: no row is left to use ({'; '.join(report.dropped) or 'it has none'})")
    return kept, report


def texts_in(row: dict, name: str, where: str) -> list[str]:
    found = row.get(name)
    if not isinstance(found, list) or not found or not all(isinstance(text, str) for text in found):
        raise DataError(f"{where}: field {name!r}: expected a list of texts; make it with "
                        "python -m variants.prm")
    return found


def shares_in(row: dict, name: str, count: int, where: str) -> list[float | None]:
    """row[name]: for each of `count` steps a number from 0 to 1, or null (not all of them)."""
    found = row.get(name)
    if not isinstance(found, list) or len(found) != count:
        entries = f"{len(found)} entries" if isinstance(found, list) else repr(found)[:40]
        raise DataError(f"{where}: field {name!r}: found {entries} for {count} steps; expected a number from "
                        "0 to 1 for each")
    for value in found:
        number = type(value) in (int, float) and 0 <= value <= 1
        if value is not None and not number:
            raise DataError(f"{where}: field {name!r}: found {value!r}; expected a number from 0 to 1")
    if all(value is None for value in found):
        raise DataError(f"{where}: field {name!r}: holds no number")
    return found


# ----------------------------------------------------------------------------------------------------------
# a trained one, to ask

class PRM:
    """Values of steps by a checkpoint that `train` made.

    settings: all that decides what it says, for a journal."""

    def __init__(self, folder, prompt: str = "chat", *, device: str | None = None,
                 precision: str | None = None, micro_batch_tokens: int = 16384, system: str | None = None,
                 template_args: dict | None = None, base: str | None = None):
        folder, self.device, self.style = resolve(folder), choose_device(device), prompt
        self.precision = precision or ("fp32" if self.device.type == "cpu" else "bf16")
        self.tokenizer = data.Tokenizer.from_pretrained(folder, system=system, template_args=template_args,
                                                        base=base)
        verdict_tokens(self.tokenizer)
        self.policy = stepdpo.Policy(Llama.from_pretrained(folder, device=self.device, base=base)).eval()
        self.max_length = self.policy.model.config.max_position_embeddings
        self.micro_batch_tokens = micro_batch_tokens
        self.settings = {"model": f"{folder.resolve().name} {fingerprint(folder, base)[:12]}",
                         "prompt": prompt, "precision": self.precision, "device": self.device.type,
                         "system": system, "template_args": template_args}

    def read(self, where: str, question: str, steps: list[str]) -> data.Example:
        """A solution, ready to be scored. DataError, naming `where`, if it cannot be."""
        try:
            return solution(where, question, steps, self.tokenizer, self.style, max_length=self.max_length)
        except data.Unfit as reason:
            raise DataError(f"{where}: cannot be scored: {reason}") from None

    @torch.no_grad()
    def scores(self, examples: list[data.Example]) -> list[list[float]]:
        """Of each solution, v after each of its steps."""
        if not examples:
            return []
        found: dict[int, list[float]] = {}
        plan = data.epoch_plan(examples, batch_size=len(examples), order=range(len(examples)),
                               micro_batch_tokens=self.micro_batch_tokens)
        for rows in plan[0][0]:
            batch = data.collate(examples, rows).to(self.device)
            with stepdpo.autocast(self.precision, self.device):
                values = value_logits(self.policy(batch), batch).sigmoid()
            parts = values.split([examples[row].units for row in rows])
            found |= {row: [round(v, 6) for v in part.tolist()] for row, part in zip(rows, parts)}
        return [found[i] for i in range(len(examples))]


# ----------------------------------------------------------------------------------------------------------
# labels, and what they are worth

def tree_values(leaves: list[tuple[list[str], bool]]) -> list[list[list[int]]]:
    """StepCo's labels, as counts. leaves: (steps, is it right) of all solutions of one problem. Of each step
    [right ones, all] among the solutions that begin with it and the steps before it."""
    below = defaultdict(list)
    for steps, right in leaves:
        for m in range(len(steps)):
            below["".join(steps[:m + 1])].append(right)
    counts = {prefix: [sum(verdicts), len(verdicts)] for prefix, verdicts in below.items()}
    return [[counts["".join(steps[:m + 1])] for m in range(len(steps))] for steps, _ in leaves]


def tree_rows(rows: list[dict], style: str) -> list[dict]:
    """Attempts -> labelled rows, from the attempts alone: those of one problem make its tree."""
    problems = defaultdict(list)
    for row in rows:
        if row.get("stop_reason") != "length":                  # no leaf: it was cut off before its end
            problems[row["question"]].append(row | {"steps": data.split_steps(row["text"], style)})
    labelled = []
    for same in problems.values():
        values = tree_values([(row["steps"], row["correct"]) for row in same])
        labelled += map(labelled_row, same, values)
    return labelled


def rollout_rows(rows: list[dict], bad: list[DataError]) -> list[dict]:
    """Valued attempts -> labelled rows, from the counts of their rollouts."""
    labelled = []
    for row in rows:
        try:
            row["steps"] = texts_in(row, "steps", row["where"])
            labelled.append(labelled_row(row, data.rollout_counts(row, "values", 2)))
        except DataError as error:
            named = str(error).startswith(row["where"])
            bad.append(error if named else DataError(f"{row['where']}: {error}"))
    return labelled


def labelled_row(row: dict, values: list[list[int] | None]) -> dict:
    """values: of each step [right, tries], None where nobody tried."""
    names = ("id", "sample", "question", "answer", "correct", "steps")
    labels = [right / tries if tries else None for right, tries in (count or (0, 0) for count in values)]
    tries = [count[1] if count else 0 for count in values]
    return {name: row[name] for name in names if name in row} | {"labels": labels, "tries": tries}


def audit(rows: list[dict], exact: list[list[bool]] | None = None) -> tuple[dict, str]:
    """What labelled rows are worth, as numbers and as lines to print. exact: of each row whether each prefix
    is right, if somebody knows."""
    labels = [[y for y in row["labels"] if y is not None] for row in rows]
    flat = np.array([y for of_row in labels for y in of_row])
    tries = np.array([n for row in rows for y, n in zip(row["labels"], row["tries"]) if y is not None])
    mean = flat.mean()
    noise = (flat * (1 - flat) / np.maximum(tries - 1, 1)).mean()       # unbiased, of a label's variance
    after_0 = [later for of_row in labels for y, later in zip(of_row, of_row[1:]) if y == 0]
    entropy = lambda p: -(p * np.log(np.maximum(p, 1e-12)) + (1 - p) * np.log(np.maximum(1 - p, 1e-12)))
    found = {"solutions": len(rows), "steps": len(flat), "mean": mean, "zero": (flat == 0).mean(),
             "one": (flat == 1).mean(), "noise": noise / max(flat.var(), 1e-12),
             "revived": float(np.mean(np.array(after_0) > 0)) if after_0 else 0.0,
             "entropy": entropy(flat).mean(), "loss_of_constant": float(entropy(mean)),
             "squared_error_of_constant": flat.var(),
             "accuracy_of_constant": max((flat >= 0.5).mean(), (flat < 0.5).mean())}
    lines = [f"{len(rows):,} solutions, {len(flat):,} labelled steps: mean label {mean:.3f}; "
             f"{found['zero']:.1%} are 0, {found['one']:.1%} are 1",
             f"share of the labels' variance that is noise of the sampling: {found['noise']:.1%}",
             f"steps behind one with label 0 whose own label is above 0: {found['revived']:.1%}",
             f"a constant ({mean:.3f}) has loss {found['loss_of_constant']:.4f}, squared error "
             f"{found['squared_error_of_constant']:.4f}, and says of {found['accuracy_of_constant']:.1%} "
             f"rightly whether the label is at least 0.5; no model gets below loss {found['entropy']:.4f}"]
    if exact is not None:
        right = np.array([r for row, of_row in zip(rows, exact) for y, r in zip(row["labels"], of_row)
                          if y is not None])
        found |= {"auc": auc(flat, right), "right_with_0": (flat[right] == 0).mean() if right.any() else 0.0,
                  "wrong_above_0": (flat[~right] > 0).mean() if (~right).any() else 0.0}
        lines.append(f"against exact labels: AUC {found['auc']:.3f}; {found['right_with_0']:.1%} of the "
                     f"right steps have 0, {found['wrong_above_0']:.1%} of the wrong ones have more")
    return {name: float(value) for name, value in found.items()}, "\n".join(lines)


def exact_labels(rows: list[dict], checker: str) -> list[list[bool]]:
    """Of each row (question, steps, answer) whether each prefix is right. checker: MODULE:FUNCTION, as in
    `data.py localize --judge`: it gives the index of the first wrong step, or None."""
    judge, exact = data.function_judge(checker), []
    for row in rows:
        first = judge(row)
        exact.append([first is None or m < first for m in range(len(row["steps"]))])
    return exact


def auc(values, right) -> float:
    """P(a right step has the higher value than a wrong one), ties counted half; nan without one of them."""
    values, right = np.asarray(values, dtype=float), np.asarray(right, dtype=bool)
    wrong, good = np.sort(values[~right]), values[right]
    if not len(wrong) or not len(good):
        return float("nan")
    below, not_above = (np.searchsorted(wrong, good, side) for side in ("left", "right"))
    return float((below + not_above).mean() / 2 / len(wrong))


def report(scores: list[list[float]], exact: list[list[bool]], bins: int = 10) -> tuple[dict, str]:
    """Scores against exact labels, step by step: AUC, accuracy at 0.5 and that of a constant, calibration,
    and the AUC by position; as numbers and as lines to print."""
    v = np.array([value for row in scores for value in row])
    right = np.array([label for row in exact for label in row])
    position = np.array([m for row in scores for m in range(len(row))])
    bin_of = np.minimum((v * bins).astype(int), bins - 1)
    table = [(b, int((bin_of == b).sum()), v[bin_of == b].mean(), right[bin_of == b].mean())
             for b in range(bins) if (bin_of == b).any()]
    found = {"steps": len(v), "auc": auc(v, right), "accuracy": float(((v >= 0.5) == right).mean()),
             "accuracy_of_constant": float(max(right.mean(), 1 - right.mean())),
             "squared_error": float(((v - right) ** 2).mean()),
             "calibration_error": sum(n * abs(said - true) for _, n, said, true in table) / len(v),
             "auc_by_position": {int(m) + 1: auc(v[position == m], right[position == m])
                                 for m in np.unique(position)}}
    lines = [f"{len(v):,} steps, {right.mean():.1%} of them right: AUC {found['auc']:.3f}; accuracy at 0.5 "
             f"{found['accuracy']:.1%} (a constant: {found['accuracy_of_constant']:.1%}); calibration error "
             f"{found['calibration_error']:.3f}",
             "AUC by step: " + "  ".join(f"{m}: {a:.3f}" for m, a in found["auc_by_position"].items()
                                         if not np.isnan(a)),
             "says      is right     steps"]
    lines += [f"{b / bins:.1f}-{(b + 1) / bins:.1f}   {true:>8.1%}  {n:>8,}" for b, n, _, true in table]
    return found, "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------
# command line

def label(args) -> int:
    bad: list[DataError] = []
    data.check_out(args.out, args.attempts)
    stages = ("attempts",) if args.tree else ()
    rows = [row for _, row in data.read_attempts(args.attempts, bad, *stages, "valued attempts")]
    labelled = tree_rows(rows, args.steps) if args.tree else rollout_rows(rows, bad)
    data.complain(bad)
    if not labelled:
        raise DataError(f"{args.attempts}: no attempt can be labelled")
    print(audit(labelled, exact_labels(labelled, args.checker) if args.checker else None)[1])
    with locked(args.out):
        return data.write_out(args, labelled, bad, False)


# Solutions that are scored together: always the same ones, so a run that goes on has the same bits.
AT_ONCE = 64


def score(args) -> int:
    """Scores into a file of attempts, by this process and its fellows under torchrun."""
    bad: list[DataError] = []
    data.check_out(args.out, args.attempts)
    rows = [row for _, row in data.read_attempts(args.attempts, bad, "attempts", "valued attempts",
                                                 "rectified attempts")]
    for row in rows:
        row["steps"] = data.split_steps(row["text"], args.steps)
    if args.scores:
        given = scores_from(args.scores, rows)
        settings, score_these = {"scores": data.digest(given)}, lambda places: [given[i] for i in places]
    else:
        prm = PRM(args.model, args.prompt, device=args.device, system=args.system,
                  template_args=args.template_args, base=args.base)
        rows, examples = readable(rows, prm, bad)
        settings, score_these = prm.settings, lambda places: prm.scores([examples[i] for i in places])
    if not rows:
        raise DataError(f"{args.attempts}: no attempt can be scored (the first: {bad[0] if bad else 'none'})")
    content = data.digest([{name: value for name, value in row.items() if name != "where"} for row in rows])

    def work(journal, rank, world):
        chunks = [range(at, min(at + AT_ONCE, len(rows))) for at in range(0, len(rows), AT_ONCE)][rank::world]
        left = sum((i,) not in journal.done for chunk in chunks for i in chunk)
        total = sum(map(len, chunks))
        with data.progress(total, total - left, "solutions", quiet=rank > 0) as bar:
            for places in chunks:
                if all((i,) in journal.done for i in places):
                    continue
                for i, scores in zip(places, score_these(places)):
                    bar.update((i,) not in journal.done)
                    journal.add((i,), scores)

    def collect(done):
        made = [scored_row(row, done[i,], args.as_rollouts) for i, row in enumerate(rows) if (i,) in done]
        return made, {"solutions": len(made), "steps": sum(len(row["steps"]) for row in made)}

    settings |= {"attempts": f"{Path(args.attempts).name} {content}", "steps": args.steps,
                 "as_rollouts": args.as_rollouts}
    made = data.stage(args.out, settings, work, collect, args.restart)
    if stepdpo.processes()[0] == 0:
        data.complain(bad)
        scored = [row for _, row in data.read_rows(args.out)]
        print(f"{args.out}: {'' if made else 'already complete; '}{len(scored):,} solutions, "
              f"{sum(len(row['steps']) for row in scored):,} steps")
        if args.checker:
            exact = exact_labels(scored, args.checker)
            print(report([row["scores"] for row in scored], exact)[1])
    return 1 if bad else 0


def readable(rows: list[dict], prm: PRM, bad: list[DataError]) -> tuple[list[dict], list[data.Example]]:
    """The rows that the PRM can read, and what it reads; the others go to `bad`."""
    kept, examples = [], []
    for row in rows:
        try:
            examples.append(prm.read(row["where"], row["question"], row["steps"]))
            kept.append(row)
        except DataError as error:
            bad.append(error)
    return kept, examples


def scored_row(row: dict, scores: list[float], as_rollouts: int) -> dict:
    """An attempt with its steps' scores; in `values` the same as counts, for data.py localize. Counts of real
    rollouts that the attempt may have had make room for them."""
    kept = {name: value for name, value in row.items() if name not in ("where", "text", "agreement")}
    return kept | {"scores": scores, "values": [[round(v * as_rollouts), as_rollouts] for v in scores]}


def scores_from(file: str, rows: list[dict]) -> list[list[float]]:
    """Of each attempt the scores that stand in another file under its id and sample."""
    found = {}
    for where, row in data.read_rows(file):
        found[str(row.get("id")), row.get("sample", 0)] = where, row
    scores = []
    for row in rows:
        id, sample = row["id"], row.get("sample", 0)
        if (str(id), sample) not in found:
            raise DataError(f"{file}: has no scores for id {id!r}, sample {sample} ({row['where']})")
        where, there = found[str(id), sample]
        own = shares_in(there, "scores", len(row["steps"]), where)
        if None in own:
            raise DataError(f"{where}: field 'scores': found null; expected a number from 0 to 1 for each "
                            "step")
        scores.append(own)
    return scores


def arguments() -> argparse.ArgumentParser:
    as_it_stands = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(prog="python -m variants.prm", description=__doc__,
                                  formatter_class=as_it_stands)
    commands = top.add_subparsers(dest="command", required=True, metavar="{label,train,score}")

    p = commands.add_parser("label", help="valued attempts -> rows for train, with an audit of the labels")
    p.add_argument("--attempts", required=True, metavar="FILE",
                   help="what eval.py --rollouts N --every_step --all wrote; with --tree any attempts")
    p.add_argument("--out", required=True, type=Path, metavar="FILE", help="JSONL file to write")
    p.add_argument("--tree", action="store_true",
                   help="no rollouts: a step's label is the share of right ones among the attempts that "
                        "begin with it (StepCo); worth it where many attempts share their steps")

    commands.add_parser("train", add_help=False, help="train on labelled rows; options as in stepdpo.py sft")

    p = commands.add_parser("score", help="write a value for each step into a file of attempts")
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="FOLDER", help="the PRM: what train wrote")
    source.add_argument("--scores", metavar="FILE",
                        help="instead of a model, scores made elsewhere: rows {id, sample, scores}, where "
                             "scores has a number from 0 to 1 for each step")
    p.add_argument("--attempts", required=True, metavar="FILE", help="attempts as eval.py writes them")
    p.add_argument("--out", required=True, type=Path, metavar="FILE", help="JSONL file to write")
    p.add_argument("--prompt", default="chat", choices=data.PROMPT_STYLES, help="as in train (default: chat)")
    data.add_chat_options(p)
    p.add_argument("--as_rollouts", type=data.positive, default=8, metavar="N",
                   help="in `values`, count a score as so many rollouts (default 8)")
    p.add_argument("--device", help="default: cuda where there is one, else cpu")

    for command in ("label", "score"):
        p = commands.choices[command]
        p.add_argument("--steps", choices=data.STEP_STYLES, default="auto", help="how steps are told apart")
        p.add_argument("--checker", metavar="MODULE:FUNCTION",
                       help="compare with exact labels: a function of (question, steps, answer) that "
                            "returns the index of the first wrong step, or None")
        p.add_argument("--restart", action="store_true", help="begin anew, whatever an earlier run has left")
        p.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return top


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:
        return stepdpo.main(["sft", *argv[1:]], value_objective, encode=encode)
    args = arguments().parse_args(argv)
    return data.run_command(lambda: {"label": label, "score": score}[args.command](args), args.debug)


if __name__ == "__main__":
    sys.exit(leave_processes(main()))
