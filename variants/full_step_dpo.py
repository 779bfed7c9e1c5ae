"""Full-Step-DPO (Xu et al. 2025, arXiv 2502.14356): DPO's gradient on whole answers, shared out over their
tokens by a process reward for each step.

For responses i, j to one prompt with rewards R_i > R_j: tokens t of response i, D_t = log pi/ref of token t
and rho_i = beta sum_t D_t, both without gradient; w_t the score of the step that token t is of:

    G_ij  = sigmoid(rho_j - rho_i)                                     DPO's own coefficient
    u+_t  = sigmoid(-kappa D_t) softmax_t( tau w_t)                    of response i: good steps more
    u-_t  = sigmoid( kappa D_t) softmax_t(-tau w_t)                    of response j: bad steps more
    L     = -mean_{ij} G_ij ( sum_t u+_t log pi(i_t)  -  sum_t u-_t log pi(j_t) )

sigmoid(-+kappa D_t) damps tokens that have moved already. L is a surrogate: only its gradient means anything.
It is no log-sigmoid, does not begin at 0.6931, and may be negative. Watch `dpo_loss` and `margin`, which are
logged beside it and mean what they do in DPO. With kappa = tau = 0 the gradient is 0.5 G / n on each of n
tokens: that of DPO, an average over the tokens instead of a sum, without the factor beta.

--loss weighted_dpo is another loss: the weights over steps inside the log-sigmoid,

    -log sigmoid( beta [ sum_k a+_k log pi/ref(s_k of i)  -  sum_k a-_k log pi/ref(s_k of j) ] )
    a+ = n softmax_k(tau w),  a- = n softmax_k(-tau w),   k over the n steps of a response

which is probably what the paper prints (a third party's script has this shape, its a summing to 1). With
tau = 0 it is DPO on all ordered pairs of a prompt.

From the released code, which was read and run: L, beta 0.05, kappa 1, tau 0.5, lr 5e-7 constant after 50
updates of warm-up, 8 prompts an update, 1 epoch. The paper's own equation was not seen; its step scores come
of M solutions a problem and N continuations a step, like those of variants/prm.py. Ours: the end token is
trained like any other, a score of exactly 0 counts like any other (the released code drops both, and so does
--as_released), a prompt whose rewards tie is left out by name, AdamW in fp32 instead of 8 bits, the warm-up
as a share (4 %: 50 of the 1,250 updates that 10,000 prompts make).

    python -m examples.siblings --method full_step_dpo --out runs/siblings --seeds 0,1,2,3,4   embedded task

    python -m variants.prm score --model PRM --attempts attempts.jsonl --out scored.jsonl
    python -m variants.full_step_dpo groups --scored scored.jsonl --out groups.jsonl  responses of one prompt
    python -m variants.full_step_dpo dpo --model SFT --data groups.jsonl --out OUT    one GPU
    torchrun --nproc_per_node 8 -m variants.full_step_dpo dpo --model SFT --data groups.jsonl --out OUT \\
        --shard --gradient_checkpointing

A row has the released columns {prompt, responses, rewards, rewards_list}: K responses, a number for each, and
for each a list of scores, one a step. It is one tree: what its responses have in common is computed once.

Shapes: B rows of a micro-batch (prompts), R responses of them, M response tokens. """
import argparse
import math
import os
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import stepdpo
from data import DataError
from model import leave_processes, locked
from stepdpo import response_logps

# the released configuration
DEFAULTS = dict(lr=5e-7, epochs=1, batch_size=8, warmup=0.04, schedule="constant", beta=0.05, max_length=3072)


# ----------------------------------------------------------------------------------------------------------
# the losses

def surrogate_loss(token_logps, ref_token_logps, response, scores, above, beta, kappa, tau, trained=None):
    """The released loss. token_logps, ref_token_logps, scores (M,): a token's log-probs and its step's score.
    response (M,): which response it is of. above (R, R) bool: whether response i (row) beats j (column).
    trained (M,) bool: which tokens get a gradient at all; by default all of them.

    -> (R, R): the loss of each ordered pair, 0 elsewhere."""
    delta = (token_logps - ref_token_logps).detach()                                        # (M,)
    rho = beta * sums(delta, response, len(above))                                          # (R,)
    G = torch.sigmoid(rho[None, :] - rho[:, None])                                          # (R, R)
    u_win = softmax_within(tau * scores, response, len(above), trained) * torch.sigmoid(-kappa * delta)
    u_lose = softmax_within(-tau * scores, response, len(above), trained) * torch.sigmoid(kappa * delta)
    win, lose = (sums(u * token_logps, response, len(above)) for u in (u_win, u_lose))      # (R,) each
    return torch.where(above, -G * (win[:, None] - lose[None, :]), 0)


def weighted_dpo_loss(token_logps, ref_token_logps, response, scores, step, above, beta, tau):
    """The weights over steps inside the log-sigmoid. step (M,): which step of its response a token is of;
    the rest, and the (R, R) that it returns, as in `surrogate_loss`."""
    R, steps = len(above), int(step.max()) + 1
    cell = response * steps + step                                                          # (M,)
    there = torch.zeros(R * steps, dtype=torch.bool, device=step.device)
    there[cell] = True
    of_step = torch.zeros_like(there, dtype=scores.dtype).scatter_(0, cell, scores)
    ratio = sums(token_logps - ref_token_logps, cell, R * steps).view(R, steps)             # log pi/ref(s_k)
    n = there.view(R, steps).sum(1, keepdim=True)

    def weights(sign):
        logits = (sign * tau * of_step).masked_fill(~there, -math.inf).view(R, steps)
        return n * logits.softmax(1)
    win, lose = ((beta * weights(sign) * ratio).sum(1) for sign in (1, -1))                 # (R,) each
    return torch.where(above, -F.logsigmoid(win[:, None] - lose[None, :]), 0)


def sums(values, index, count):
    """(M,) -> (count,): of each response (or step of it) the sum over its tokens."""
    return values.new_zeros(count).index_add(0, index, values)


def softmax_within(logits, response, count, trained=None):
    """(M,) -> (M,): a softmax over the (trained) tokens of each response, 0 where there is none. Longer steps
    get more of it, as released."""
    if trained is not None:
        logits = logits.masked_fill(~trained, -math.inf)
    top = logits.new_full((count,), -math.inf).scatter_reduce(0, response, logits, "amax")
    top = top.nan_to_num(neginf=0)
    weight = (logits - top[response]).exp()
    return weight / sums(weight, response, count).clamp(min=1)[response]        # the largest weight is 1


def as_released(scores, response):
    """(M,) bool: the tokens that the released code trains, all but a response's last one, the end token, and
    those of steps whose score is exactly 0."""
    last = torch.ones_like(response, dtype=torch.bool)
    last[:-1] = response[1:] != response[:-1]
    return (scores != 0) & ~last


def full_step_objective(token_logps, ref_token_logps, batch, args):
    """losses (B,): of each prompt the mean over its ordered pairs; and metrics, likewise. accuracy, margin
    and dpo_loss are those of DPO on whole answers: at step 0 margin 0 and dpo_loss 0.6931.

    Raises DataError for a flag of the other loss."""
    if args.loss != "surrogate" and (args.as_released or args.kappa != 1):
        raise DataError("--as_released and --kappa are of the surrogate loss: leave them out with --loss "
                        f"{args.loss}")
    device, rows = token_logps.device, batch.examples
    prompt = torch.tensor([b for b, example in enumerate(rows) for _ in example.sides], device=device)
    rewards = torch.tensor([r for example in rows for r in example.row["rewards"]], device=device)
    above = (prompt[:, None] == prompt[None, :]) & (rewards[:, None] > rewards[None, :])    # (R, R)
    scores = token_scores(batch).to(token_logps)
    common = token_logps, ref_token_logps, batch.response, scores
    if args.loss == "surrogate":
        trained = as_released(scores, batch.response) if args.as_released else None
        losses = surrogate_loss(*common, above, args.beta, args.kappa, args.tau, trained)
    else:
        losses = weighted_dpo_loss(*common, batch.step, above, args.beta, args.tau)

    def of_prompts(pairs):                      # (R, R) -> (B,): means over the ordered pairs of each
        total = lambda x: sums(x.sum(1).to(token_logps), prompt, len(rows))
        return total(torch.where(above, pairs, 0)) / total(above)
    reward = args.beta * response_logps(token_logps - ref_token_logps, batch).detach()
    margin = reward[:, None] - reward[None, :]
    wins = lambda x: x[:, None].expand_as(margin)
    return of_prompts(losses), {
        "accuracy": of_prompts((margin > 0).float()), "margin": of_prompts(margin),
        "dpo_loss": of_prompts(-F.logsigmoid(margin)), "chosen_reward": of_prompts(wins(reward)),
        "rejected_reward": of_prompts(wins(reward).T)}


def token_scores(batch: data.Batch) -> torch.Tensor:
    """(M,): the score of the step that each token is of; the end token is of the last step."""
    of_responses = [scores for example in batch.examples for scores in example.row["rewards_list"]]
    width = max(map(len, of_responses))
    table = torch.tensor([scores + [0.0] * (width - len(scores)) for scores in of_responses])
    return table.to(batch.step.device)[batch.response, batch.step]


def options(group):
    add = group.add_argument
    add("--loss", choices=("surrogate", "weighted_dpo"), default="surrogate",
        help="surrogate (default): as released; weighted_dpo: the weights inside DPO's log-sigmoid")
    add("--kappa", type=float, default=1.0,
        help="surrogate: damps tokens that have moved already (default 1)")
    add("--tau", type=float, default=0.5,
        help="how much the steps' scores count; 0: not at all (default 0.5)")
    add("--as_released", action="store_true",
        help="surrogate: leave out what the released code leaves out, the end token and every step whose "
             "score is exactly 0")


# ----------------------------------------------------------------------------------------------------------
# rows to examples

def encode(source, tokenizer, method, style, max_length=None):
    """Rows {prompt, responses, rewards, rewards_list} as examples of K sides; see data.encode_dataset."""
    if method != "dpo":
        raise DataError(f"the responses are whole answers, and are compared: run it as dpo, not {method}")
    return data.encode_dataset(source, tokenizer, method, style, max_length, of_row=group_of)


def group_of(row: dict, method: str, where: str) -> tuple[str, str, list[str]]:
    """(prompt, no steps that are context, responses), as data.texts_of. Unfit, with the reason, where there
    is nothing to learn from the row."""
    question, responses = data.text_field(row, "prompt", where), row.get("responses")
    check_row(row, where)
    if len(set(row["rewards"])) < 2:
        raise data.Unfit("the rewards tie: no response beats another")
    if len({response.strip() for response in responses}) < len(responses):
        raise data.Unfit("two responses are the same")
    for k, (response, scores) in enumerate(zip(responses, row["rewards_list"]), 1):
        if len(scores) != (steps := len(data.split_steps(response))):
            raise DataError(f"{where}: field 'rewards_list': found {len(scores)} scores for response {k}, "
                            f"which has {steps} steps; score it again with python -m variants.prm score")
    return question, "", responses


def check_row(row: dict, where: str):
    """DataError where the columns do not fit together."""
    if "rewards_list" not in row:
        data.expect(row, where, "groups")
    for name in ("responses", "rewards", "rewards_list"):
        if not isinstance(row.get(name), list):
            raise DataError(f"{where}: field {name!r}: expected a list, one entry a response; "
                            "python -m variants.full_step_dpo groups makes such rows")
        if len(row[name]) != len(row["responses"]):
            raise DataError(f"{where}: field {name!r}: found {len(row[name])} entries for "
                            f"{len(row['responses'])} responses")
    if not all(isinstance(text, str) and text.strip() for text in row["responses"]):
        raise DataError(f"{where}: field 'responses': expected texts, none of them empty")
    for name, numbers in (("rewards", row["rewards"]),
                          *(("rewards_list", scores) for scores in row["rewards_list"])):
        if not isinstance(numbers, list) or not numbers or not all(map(is_number, numbers)):
            raise DataError(f"{where}: field {name!r}: found {numbers!r:.60}; expected numbers")


def is_number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


# ----------------------------------------------------------------------------------------------------------
# groups: scored attempts -> rows

def groups(args) -> int:
    """The attempts at one problem, right and wrong, as one row. The reward of a response is its verdict."""
    bad, problems, dropped = [], {}, Counter()
    data.check_out(args.out, args.scored)
    for _, row in data.read_attempts(args.scored, bad, "attempts", "valued attempts", "rectified attempts"):
        scores = row.get("scores")
        if not isinstance(scores, list) or not scores or not all(map(is_number, scores)):
            raise DataError(f"{row['where']}: field 'scores': expected a number for each step; write them "
                            "with python -m variants.prm score")
        same = problems.setdefault(row["question"], {})
        if row.get("stop_reason") == "length":          # an end token would be trained where no end is
            dropped["cut off by the length limit"] += 1
        elif row["text"].strip() in same:
            dropped["the same answer again"] += 1
        else:
            same[row["text"].strip()] = row
    kept = []
    for question, same in problems.items():
        rows = list(same.values())[:args.most]
        if len({row["correct"] for row in rows}) < 2:
            dropped["problems with right answers only, or wrong ones only"] += 1
            continue
        kept.append({"dataset": rows[0].get("dataset", ""), "prompt": question, "answer": rows[0]["answer"],
                     "responses": [row["text"] for row in rows],
                     "rewards": [float(row["correct"]) for row in rows],
                     "rewards_list": [row["scores"] for row in rows]})
    data.complain(bad)
    print(data.funnel([("problems", len(problems)), *((f"    {why}", n) for why, n in dropped.items()),
                       ("groups", len(kept)), ("responses", sum(len(row["responses"]) for row in kept))]))
    if not kept:
        raise DataError(f"{args.scored}: no problem has right and wrong answers, nothing to write to "
                        f"{args.out}")
    with locked(args.out):
        return data.write_out(args, kept, bad, False)


def group_arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m variants.full_step_dpo groups",
                                description="Scored attempts -> one row for each problem that has right and "
                                            "wrong ones: the rows that the loss is trained on.")
    p.add_argument("--scored", required=True, metavar="FILE",
                   help="attempts with a score a step, as python -m variants.prm score writes them")
    p.add_argument("--out", required=True, type=Path, metavar="FILE", help="JSONL file to write")
    p.add_argument("--most", type=data.positive, metavar="K", help="at most K responses a problem")
    p.add_argument("--restart", action="store_true", help="begin anew, whatever an earlier run has left")
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return p


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["groups"]:
        args = group_arguments().parse_args(argv[1:])
        return data.run_command(lambda: groups(args), args.debug)
    surrogate = not any("weighted_dpo" in word for word in argv)
    if os.environ.get("RANK", "0") == "0" and surrogate and not {"-h", "--help"} & set(argv):
        print("`loss` is a surrogate, no log-sigmoid: it may be negative, and only its gradient means "
              "anything. `dpo_loss` begins at 0.6931.")
    return stepdpo.main(argv, full_step_objective, options=options, encode=encode, defaults=DEFAULTS)


if __name__ == "__main__":
    sys.exit(leave_processes(main()))
