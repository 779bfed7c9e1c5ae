"""SACPO (Wachi et al., NeurIPS 2024, arXiv 2404.11049): align for one metric, then, from and against the
result, for another; P-SACPO: average the two results' weights.

    pi_r         from pi_ref:  DPO or KTO on D_r  at beta                    reward r, such as helpfulness
    pi_{r+lg}    from pi_r:    DPO or KTO on D_g  at beta / lambda           constraint g, such as safety
    theta(q)  =  q theta_{r+lg} + (1 - q) theta_r                            P-SACPO: no training; --merge q

Why two stages are enough (Theorem 1; reverse KL): exp(r / beta) and exp(lambda g / beta) multiply, so the
optimum of the second stage against pi_r is the optimum of r + lambda g against pi_ref, and the order of the
stages does not matter. That asks for exact optima; with a finite number of pairs it breaks, and the order
shows. KTO (Ethayarajh et al. 2024, Eq. 8), a loss of single answers that are desirable or not:

    rho = beta log pi/pi_ref (y | x)      nu = beta max(0, mean of log pi/pi_ref (y' | x))    y': of another x
    loss  w_+ [1 - sigmoid(rho - nu)]  if desirable,   w_- [1 - sigmoid(nu - rho)]  if not

nu is an estimate of beta KL(pi || pi_ref) over the whole global batch, without a gradient. At step 0 rho = nu
= 0 and the loss is w / 2. w_+ = 1 and w_- = desirable / undesirable rows, as in the released code.

Rows: pairs (prompt, chosen, rejected; or the columns of Math-Step-DPO-10K); for KTO also single answers
(prompt, completion, label); or PKU-SafeRLHF's columns as they are, of which the first stage reads
better_response_id, the second safer_response_id (in KTO: is_response_i_safe); --safety_first exchanges them.
Pairs train KTO as two single answers. Defaults are the paper's: lr 2e-5, cosine, warmup 3 %, 3 epochs, global
batch 256, 512 tokens, beta 0.1, beta / lambda 0.025 (lambda 4), the best of its Table 3. All of this is
certain: paper and code were read. Ours: the mismatched answer y' is that of the next row with another prompt,
where TRL of the time reversed the batch, which gave the middle row its own answer.

    python -m examples.siblings --method sacpo --out runs/siblings --seeds 0,1,2,3,4       the embedded task
    python -m variants.sacpo dpo --model SFT --data helpful.jsonl --then safe.jsonl --merge 0.25 0.5 0.75 \\
        --out OUT                                                                          one GPU
    torchrun --nproc_per_node 8 -m variants.sacpo dpo --model SFT --data PKU-Alignment/PKU-SafeRLHF-30K \\
        --first kto --gradient_checkpointing --shard --out OUT

OUT becomes pi_{r+lg}; OUT/stage1 holds pi_r, OUT/q0.25 .. the averages. Killed at any moment, the same
command goes on.

Shapes: B single answers of a micro-batch, G of the global batch, M their tokens. """
import argparse
import copy
import dataclasses
import math
import sys
from pathlib import Path

import numpy as np
import torch

import data
import stepdpo
from data import DataError, Example, Report
from model import average_checkpoints, choose_device, fingerprint, leave_processes, resolve

DEFAULTS = dict(lr=2e-5, epochs=3, batch_size=256, warmup=0.03, schedule="cosine", beta=0.1, max_length=512)


def options(group):
    add = group.add_argument
    add("--then", metavar="FILE", help="rows of the second stage (default: those of --data)")
    add("--lam", type=float, default=4.0,
        help="lambda: the second stage trains at beta / lambda (default 4)")
    add("--first", choices=("dpo", "kto"), default="dpo", help="loss of the first stage (default dpo)")
    add("--second", choices=("dpo", "kto"), default="dpo", help="loss of the second stage (default dpo)")
    add("--safety_first", action="store_true",
        help="of PKU-SafeRLHF's columns, the first stage reads safety and the second helpfulness")
    add("--merge", type=float, nargs="+", default=[], metavar="Q",
        help="P-SACPO: also write the averages q theta_{r+lg} + (1 - q) theta_r")


def chain(args) -> int:
    """Both stages and the averages; the exit status."""
    out, first = Path(args.out), Path(args.out) / "stage1"
    metrics = ("safe", "helpful") if args.safety_first else ("helpful", "safe")
    for model, source, folder, beta, loss, metric in (
            (args.model, args.data, first, args.beta, args.first, metrics[0]),
            (first, args.then or args.data, out, args.beta / args.lam, args.second, metrics[1])):
        of_stage = arguments_of_stage(args, model, source, folder, beta)
        sha256 = fingerprint(resolve(model), of_stage.base)[:12]
        stepdpo.say(f"\n---- {loss.upper()} on {source} at beta {beta:g}, from and against {model} (sha256 "
                    f"{sha256}) -> {folder}")
        if loss == "dpo":
            status = stepdpo.train(of_stage, stepdpo.preference_objective, Pairs(metric).encode)
        else:
            kto = KTO(metric, of_stage)
            status = stepdpo.train(of_stage, kto.objective, kto.encode, before_update=kto.before_update)
        if status:
            return status
    if stepdpo.processes()[0] == 0:
        for q in args.merge:
            average_checkpoints([out, first], [q, 1 - q], out / f"q{q:g}")
            print(f"saved {out / f'q{q:g}'}: {q:g} of {out}, {1 - q:g} of {first}", flush=True)
    stepdpo.barrier()
    return 0


def arguments_of_stage(args, model, source: str, out: Path, beta: float) -> argparse.Namespace:
    """The command of one stage, as stepdpo.py would have parsed it."""
    of_stage = copy.copy(args)
    for name in ("then", "lam", "first", "second", "safety_first", "merge"):
        delattr(of_stage, name)
    of_stage.model, of_stage.data, of_stage.out, of_stage.beta = str(model), source, str(out), beta
    if str(model) != args.model:                # --base speaks of --model; what a stage left knows its own
        of_stage.base = None
    return of_stage


# ----------------------------------------------------------------------------------------------------------
# KTO

def kto_loss(policy_logps, ref_logps, desirable, kl, beta, undesirable_weight=1.0):
    """log-probs of answers (B,), desirable (B,) bool, kl a number: the batch's estimate of KL(pi || pi_ref),
    in nats -> (losses, rewards), each (B,); the caller takes the mean. KTO, Eq. 8, with lambda_D = 1."""
    rewards = beta * (policy_logps - ref_logps)                                 # rho
    surprise = torch.where(desirable, rewards - beta * kl, beta * kl - rewards)
    weight = torch.where(desirable, 1.0, undesirable_weight)
    return weight * (1 - torch.sigmoid(surprise)), rewards


def kl_estimate(policy_logps, ref_logps) -> float:
    """Log-probs of mismatched answers (G,) -> max(0, mean log-ratio): KTO's stand-in for KL(pi || pi_ref)."""
    return max(0.0, (policy_logps - ref_logps).mean().item())


class KTO:
    """What the loop asks of a method, for one stage of KTO."""

    def __init__(self, metric: str, args):
        self.metric, self.args = metric, args
        self.mismatched: dict[str, Example] = {}    # of each row, by its place: x with another's answer y'
        self.ref_logps: dict[str, float] = {}       # log pi_ref(y' | x)
        self.kl, self.undesirable_weight = 0.0, 1.0

    def encode(self, source, tokenizer, method: str, style: str, max_length: int):
        """Rows -> one Example for each single answer, and beside it the mismatched one."""
        examples, report = single_answers(source, self.metric, tokenizer, method, style, max_length)
        if not self.mismatched:                         # the rows to train on come first, then held-out ones
            desirable = sum(example.row["label"] for example in examples)
            if desirable in (0, len(examples)):
                raise DataError(f"{source}: KTO needs desirable and undesirable answers; found {desirable} "
                                f"desirable ones of {len(examples)}")
            self.undesirable_weight = desirable / (len(examples) - desirable)
            stepdpo.say(f"KTO: {desirable} desirable answers, {len(examples) - desirable} undesirable ones, "
                        f"weight {self.undesirable_weight:g}")
        found = {example.where: other for example, other in zip(examples, mismatch(examples, max_length))}
        self.mismatched |= found
        # The reference is the model that the stage starts from: --reference is refused.
        policy = stepdpo.load_policy(self.args.model, self.args, stepdpo.processes()[1],
                                     choose_device(self.args.device), self.args.base, trains=False)
        logps = stepdpo.score(policy, list(found.values()), precision=self.args.precision,
                              micro_batch_size=self.args.micro_batch_size,
                              micro_batch_tokens=self.args.micro_batch_tokens, what="mismatched")
        self.ref_logps |= dict(zip(found, logps[:, 0].tolist()))
        return examples, report

    def before_update(self, examples: list[Example], score):
        """The KL estimate of the global batch, under the policy as it is."""
        policy_logps = score([self.mismatched[example.where] for example in examples])[:, 0]
        ref_logps = torch.tensor([self.ref_logps[example.where] for example in examples])
        self.kl = kl_estimate(policy_logps, ref_logps)

    def objective(self, token_logps, ref_token_logps, batch, args):
        """token_logps (M,) -> losses (B,) and metrics, each (B,). accuracy: is the reward of a desirable
        answer above beta KL, of an undesirable one below? signed_reward: turned around if undesirable."""
        policy_logps = stepdpo.response_logps(token_logps, batch)
        ref_logps = stepdpo.response_logps(ref_token_logps, batch)
        labels = [example.row["label"] for example in batch.examples]
        desirable = torch.tensor(labels, device=policy_logps.device)
        losses, rewards = kto_loss(policy_logps, ref_logps, desirable, self.kl, args.beta,
                                   self.undesirable_weight)
        return losses, {"accuracy": ((rewards > args.beta * self.kl) == desirable).float(),
                        "signed_reward": torch.where(desirable, rewards, -rewards),
                        "kl": torch.full_like(rewards, self.kl)}


def mismatch(examples: list[Example], max_length: int | None) -> list[Example]:
    """Of each example its context with the answer of the next one (around the end) that has another context,
    cut to max_length: rotation by one, where no two neighbours share a prompt."""
    context = [example.sides[0][:example.start].tobytes() for example in examples]
    if len(set(context)) == 1:
        raise DataError("KTO compares answers with those to other prompts: all rows have the same one")
    count, found = len(examples), []
    for i, example in enumerate(examples):
        j = (i + 1) % count
        while context[j] == context[i]:
            j = (j + 1) % count
        answer = examples[j].sides[0][examples[j].start:]
        side = np.concatenate([example.sides[0][:example.start], answer])[:max_length]
        found.append(dataclasses.replace(example, sides=[side], asked=None,
                                         steps=[np.zeros(len(side) - example.start, dtype=np.int32)]))
    return found


# ----------------------------------------------------------------------------------------------------------
# rows

PKU = ("response_0", "response_1")


class Pairs:
    """`encode` of a DPO stage on one metric."""

    def __init__(self, metric: str):
        self.metric = metric

    def encode(self, source, tokenizer, method: str, style: str, max_length: int):
        rows = [(where, pair_of(row, self.metric, where)) for where, row in data.read_rows(source)]
        if where := next((where for where, row in rows if "label" in row and "chosen" not in row), None):
            raise DataError(f"{where}: a single answer with a label, where DPO takes pairs: choose kto for "
                            "this stage")
        return named(source, *data.encode_dataset(rows, tokenizer, method, style, max_length))


def pair_of(row: dict, metric: str, where: str) -> dict:
    """A row of PKU-SafeRLHF as a pair by `metric` ("helpful" or "safe"); any other row as it is."""
    if not all(name in row for name in PKU):
        return row
    column = {"helpful": "better_response_id", "safe": "safer_response_id"}[metric]
    if row.get(column) not in (0, 1):
        raise DataError(f"{where}: {column} is {row.get(column)!r}; expected 0 or 1")
    return {**row, "chosen": row[PKU[row[column]]], "rejected": row[PKU[1 - row[column]]]}


def labelled(row: dict, metric: str, where: str) -> list[dict]:
    """A row of PKU-SafeRLHF, or of single answers, as single answers with a label; [] for a row of pairs."""
    if all(name in row for name in PKU) and metric == "safe":
        return [{**row, "completion": row[name], "label": label_of(row, f"is_{name}_safe", where)}
                for name in PKU]
    if "label" in row and "chosen" not in row:
        return [{**row, "label": label_of(row, "label", where)}]
    return []


def label_of(row: dict, name: str, where: str) -> bool:
    if row.get(name) not in (True, False):                                      # 1 and 0 are equal to these
        raise DataError(f"{where}: {name} is {row.get(name)!r}; expected true (desirable) or false")
    return bool(row[name])


def single_answers(source, metric: str, tokenizer, method: str, style: str,
                   max_length: int) -> tuple[list[Example], Report]:
    """Rows -> one Example for each single answer, with a reference, and row["label"]: is it desirable? The
    two sides of a pair are two answers: the chosen one desirable, the rejected one not."""
    rows = list(data.read_rows(source))
    answers = [(where, labelled(row, metric, where)) for where, row in rows]
    if any(found for _, found in answers):
        if where := next((where for where, found in answers if not found), None):
            raise DataError(f"{where}: no single answer with a label, as other rows of {source} are; keep "
                            "pairs in a file of their own")
        single = [(f"{where}, answer {n}", answer) for where, found in answers
                  for n, answer in enumerate(found)]
        examples, report = data.encode_dataset(single, tokenizer, "sft", style, max_length)
        for example in examples:
            example.reference, example.units = True, 1
    else:
        pairs = [(where, pair_of(row, metric, where)) for where, row in rows]
        paired, report = data.encode_dataset(pairs, tokenizer, method, style, max_length)
        examples = [one_side(pair, side, name) for pair in paired
                    for side, name in enumerate(("chosen", "rejected"))]
    return named(source, examples, report)


def one_side(pair: Example, side: int, name: str) -> Example:
    return dataclasses.replace(pair, where=f"{pair.where}, {name}", sides=[pair.sides[side]],
                               steps=[pair.steps[side]], row=pair.row | {"label": name == "chosen"})


def named(source, examples: list[Example], report: Report):
    report.source = str(source)
    return examples, report


def main(argv: list[str] | None = None) -> int:
    args = stepdpo.parser(options, __doc__, DEFAULTS).parse_args(argv)

    def run() -> int:
        stepdpo.settle(args)
        if args.method == "sft" or args.reference:
            raise DataError("SACPO is two stages of dpo or stepdpo, the second against what the first left: "
                            f"{'--reference' if args.reference else 'sft'} has no place in it")
        if not 0 < args.lam < math.inf:
            raise DataError(f"--lam is {args.lam:g}: expected a number above 0")
        if wrong := [q for q in args.merge if not 0 <= q <= 1]:
            raise DataError(f"--merge {wrong[0]:g}: expected a share from 0 to 1")
        return chain(args)
    return data.run_command(run, args.debug)


if __name__ == "__main__":
    sys.exit(leave_processes(main()))
