"""Step-DPO without any trick: the first rung of the ladder that ends in stepdpo.py.

A pair is four rows of their own (two under the policy, two under the reference), each with all its logits;
the reference is a second model; one loop, one process. stepdpo.py gives the same losses and weights
(tests/test_plain.py) and computes once what is computed here again and again.

    python -m examples.plain                                    pairs of the embedded task, some seconds
    python -m examples.plain --model FOLDER --data pairs.jsonl  your own; questions are taken as they stand
"""
import argparse
import random
from pathlib import Path

import torch
import torch.nn.functional as F

from data import Tokenizer, read_rows, split_steps
from examples.arithmetic import (demonstration, first_wrong_step, make_model, make_problem, solve,
                                 write_solution)
from model import Llama


def step_logp(model: Llama, tokenizer: Tokenizer, context: str, step: str) -> torch.Tensor:
    """log pi(step | context), a scalar: the sum over the step's tokens."""
    ids, offsets = tokenizer.encode(context + step)
    start = next(t for t, (_, end) in enumerate(offsets) if end > len(context))     # the step's first token
    ids = torch.tensor(ids)
    logps = model(ids[None])[0].log_softmax(-1)             # (T, V): row t scores token t + 1
    return logps[start - 1:-1].gather(1, ids[start:, None]).sum()


def step_dpo_loss(policy: Llama, reference: Llama, tokenizer: Tokenizer, pair: dict, beta: float):
    """Eq. 2: -log sigmoid(beta [log pi/ref (s_win | x, s_1..s_{k-1}) - log pi/ref (s_lose | the same)])."""
    context = pair["prompt"] + pair["initial_reason_steps"]                         # x, s_1..s_{k-1}
    log_ratios = []
    for step in (pair["chosen"], pair["rejected"]):                                 # s_win, s_lose
        with torch.no_grad():
            ref_logp = step_logp(reference, tokenizer, context, step)
        log_ratios.append(step_logp(policy, tokenizer, context, step) - ref_logp)
    return -F.logsigmoid(beta * (log_ratios[0] - log_ratios[1]))


def train(folder: Path, pairs: list[dict], batch_size: int, lr: float, beta: float):
    """One epoch: (the trained model, the loss of every update). The first loss is log 2 = 0.6931, since the
    policy is still the reference."""
    tokenizer = Tokenizer.from_pretrained(folder)
    policy, reference = Llama.from_pretrained(folder), Llama.from_pretrained(folder)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0)
    losses = []
    for begin in range(0, len(pairs), batch_size):
        batch = pairs[begin:begin + batch_size]
        loss = torch.stack([step_dpo_loss(policy, reference, tokenizer, pair, beta) for pair in batch]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"update {len(losses):>3}   loss {losses[-1]:.4f}", flush=True)
    return policy, losses


def pairs_of_the_task(count: int) -> list[dict]:
    """First wrong steps of the embedded task's pupil, against the right steps at the same places."""
    rng, pairs = random.Random("plain"), []
    while len(pairs) < count:
        problem = make_problem(rng, early=2, tail=(1, 2))
        wrong, right = demonstration(problem, rng), write_solution(problem, solve(problem), rng)
        wrong, right = split_steps(wrong), split_steps(right)
        if (k := first_wrong_step(problem.question(), wrong, "")) is not None:
            before, label, rejected = wrong[k].partition(f"Step {k + 1}:")
            pairs.append({"prompt": problem.question(), "chosen": right[k].partition(label)[2],
                          "initial_reason_steps": "".join(wrong[:k]) + before + label, "rejected": rejected})
    return pairs


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--model", type=Path, metavar="FOLDER", help="a checkpoint (default: the embedded task's, untrained)")
    add("--data", metavar="FILE", help="rows with prompt, initial_reason_steps, chosen, rejected")
    add("--out", type=Path, metavar="OUT", default=Path("runs/plain"), help="default: %(default)s")
    add("--batch_size", type=int, default=16, help="pairs an update (default: %(default)s)")
    add("--lr", type=float, default=1e-3, help="default: %(default)s, for the untrained model")
    add("--beta", type=float, default=0.4, help="default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(1)                                # the model is too small to share out
    if args.model is None:
        args.model = args.out / "start"
        make_model(args.model, seed=0)
    pairs = pairs_of_the_task(96) if args.data is None else [row for _, row in read_rows(args.data)]
    policy, _ = train(args.model, pairs, args.batch_size, args.lr, args.beta)
    policy.save_pretrained(args.out)
    print(f"saved {args.out}")


if __name__ == "__main__":
    main()
