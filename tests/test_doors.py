"""What a variant needs of the training loop is an argument of `stepdpo.main`: each door, used by a variant of a few lines."""
import json
import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, pair_rows, tiny_checkpoint, write_rows

import data
import stepdpo
from model import Llama

COMMON = ["--prompt", "alpaca", "--batch_size", "8", "--lr", "1e-3", "--device", "cpu", "--max_steps", "3"]


def arguments(work, method, out, *more):
    return [method, "--model", str(work / "model"), "--data", str(work / "pairs.jsonl"), "--out", str(out), *COMMON, *more]


def metrics(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


# ---------------------------------------------------------------------------------------------------- flags and columns

def gain_options(group):
    group.add_argument("--gain", type=float, default=1.0, help="100 %% more where it says 2")


def gain_objective(token_logps, ref_token_logps, batch, args):
    """Losses weighted by a column of the rows, times a flag."""
    losses, metrics = stepdpo.preference_objective(token_logps, ref_token_logps, batch, args)
    weight = torch.tensor([example.row["weight"] for example in batch.examples])
    return args.gain * weight * losses, metrics | {"weight": weight}


@pytest.fixture(scope="module")
def weighted(work):
    rows = [row | {"weight": 1.0 + i % 3} for i, row in enumerate(pair_rows(27))]
    return write_rows(work / "weighted.jsonl", rows)


def test_a_variants_flag_is_in_its_help_in_its_loss_and_in_its_identity(work, weighted, tmp_path, capsys):
    """--gain is explained, multiplies the loss, its metric is a column on the screen, and another value does not
    continue the run."""
    with pytest.raises(SystemExit):
        stepdpo.main(["stepdpo", "--help"], gain_objective, options=gain_options)
    said = capsys.readouterr().out
    assert "of this variant" in said and "100 % more where it says 2" in said
    go = lambda *more: stepdpo.main(arguments(work, "stepdpo", tmp_path / "out", "--data", str(weighted), *more),
                                    gain_objective, options=gain_options)
    assert go("--gain", "2") == 0
    assert "weight" in capsys.readouterr().out.split("time left")[0]
    first = metrics(tmp_path / "out")[0]
    assert first["loss"] == pytest.approx(2 * math.log(2) * first["weight"], abs=1e-6) and 1 < first["weight"] < 3
    assert go("--gain", "3") == 2 and "gain: 2.0 then, 3.0 now" in capsys.readouterr().err
    assert go("--gain", "2") == 0 and "is complete" in capsys.readouterr().out


def test_a_variants_columns_are_in_its_identity(work, weighted, tmp_path, capsys):
    """The same tokens with other weights are another run of a variant that reads them; for Step-DPO they are the same."""
    rows = [json.loads(line) for line in weighted.read_text().splitlines()]
    other = write_rows(work / "other.jsonl", [row | {"weight": 9.0} for row in rows])
    for objective, options, status in ((gain_objective, gain_options, 2), (None, None, 0)):
        out = tmp_path / f"out{status}"
        go = lambda file: stepdpo.main(arguments(work, "stepdpo", out, "--data", str(file)), objective, options=options)
        assert go(weighted) == 0 and go(other) == status
    assert "data: " in capsys.readouterr().err


def test_a_variants_docstring_is_its_manual(capsys):
    """`python -m variants.NAME --help` shows what stands at the head of the variant's file."""
    with pytest.raises(SystemExit):
        stepdpo.main(["--help"], gain_objective, options=gain_options)
    assert "What a variant needs of the training loop" in capsys.readouterr().out


def test_a_preference_loss_run_as_sft_says_so(work, tmp_path, capsys):
    """A newcomer's slip: `python -m variants.NAME sft` has no reference to compare with."""
    assert stepdpo.main(arguments(work, "sft", tmp_path / "out"), gain_objective, options=gain_options) == 2
    assert "run it as dpo or stepdpo" in capsys.readouterr().err


def test_every_setting_but_the_harmless_ones_is_in_the_identity(work, tmp_path):
    """A new flag of stepdpo.py is compared on continuing unless it is listed as harmless."""
    assert stepdpo.main(arguments(work, "stepdpo", tmp_path / "out")) == 0
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    flags = set(vars(stepdpo.parser().parse_args(arguments(work, "stepdpo", "out"))))
    assert flags - set(stepdpo.HARMLESS) <= set(run["identity"]) and set(stepdpo.HARMLESS) <= flags


# ------------------------------------------------------------------------------------------- log-probs token by token

def test_the_reference_is_kept_per_token(work, tmp_path):
    """A loss on single tokens: at step 0 every token's log-ratio is 0, and later the sum over a response is what the
    pair's reward is made of."""
    seen = []

    def per_token(token_logps, ref_token_logps, batch, args):
        seen.append((token_logps - ref_token_logps).detach())
        ratio = stepdpo.response_logps(token_logps - ref_token_logps, batch)
        losses, metrics = stepdpo.preference_objective(token_logps, ref_token_logps, batch, args)
        chosen_rewards = args.beta * ratio.view(-1, 2)[:, 0]
        torch.testing.assert_close(metrics["chosen_reward"], chosen_rewards, atol=1e-4, rtol=1e-4)
        return losses, metrics

    assert stepdpo.main(arguments(work, "stepdpo", tmp_path / "out"), per_token) == 0
    assert seen[0].abs().max() < 1e-5 < seen[-1].abs().max()


def test_a_weight_for_each_step_of_a_whole_answer(work, tmp_path):
    """`batch.step` says which step of its solution every token is of. Whole answers that share their first step: where
    only that one counts the margin stays 0, where only the second counts it grows."""
    rows = [row for row in pair_rows(40) if row["initial_reason_steps"].endswith("Step 2:")]
    file = write_rows(work / "two_steps.jsonl", rows)

    def only(step):
        def objective(token_logps, ref_token_logps, batch, args):
            assert set(batch.step.tolist()) == {0, 1}
            counts = (batch.step == step).float()
            return stepdpo.preference_objective(token_logps * counts, ref_token_logps * counts, batch, args)
        return objective

    for step in (0, 1):
        go = arguments(work, "dpo", tmp_path / str(step), "--data", str(file))
        assert stepdpo.main(go, only(step)) == 0
    first, second = (metrics(tmp_path / str(step)) for step in (0, 1))
    assert all(abs(line["margin"]) < 1e-5 for line in first) and second[-1]["margin"] > 0.05


# ----------------------------------------------------------------------------------------------------- other examples

def one_sided(source, tokenizer, method, style, max_length):
    """KTO's rows: one response each, with a reference; the label is a column."""
    examples, report = data.encode_dataset(source, tokenizer, "sft", style, max_length)
    for example in examples:
        example.reference, example.units = True, 1
    return examples, report


def one_sided_objective(token_logps, ref_token_logps, batch, args):
    rewards = args.beta * stepdpo.response_logps(token_logps - ref_token_logps, batch)
    return 1 - torch.sigmoid(rewards), {"reward": rewards}


def test_rows_of_one_side_with_a_reference(work, tmp_path):
    """What has a reference, and what the mean is over, follow from the examples: 1 - sigmoid(0) = 0.5 a row at step 0,
    also for held-out rows."""
    go = arguments(work, "dpo", tmp_path / "out", "--eval_data", str(work / "held.jsonl"), "--eval_every", "1")
    assert stepdpo.main(go, one_sided_objective, encode=one_sided) == 0
    assert metrics(tmp_path / "out")[0]["loss"] == pytest.approx(0.5, abs=1e-6)
    held = [json.loads(line) for line in (tmp_path / "out" / "eval.jsonl").read_text().splitlines()]
    assert held[0]["loss"] == pytest.approx(0.5, abs=1e-6) and held[-1]["loss"] < 0.5


def verifier(source, tokenizer, method, style, max_length):
    """Two tokens asked for behind every fifth token, no reference; the mean is over the places."""
    examples, report = data.encode_dataset(source, tokenizer, "sft", style, max_length)
    for example in examples:
        places = np.arange(example.start, len(example.chosen), 5)
        tokens = np.full(len(places), 7)
        example.asked = [(np.concatenate([places, places]), np.concatenate([tokens, tokens + 1]))]
        example.steps = [np.zeros(2 * len(places), dtype=np.int32)]
        example.units = len(places)
    return examples, report


def verifier_objective(token_logps, ref_token_logps, batch, args):
    assert ref_token_logps is None
    counts = [len(example.predicted[0][0]) for example in batch.examples]
    logits = torch.cat([torch.sub(*part.chunk(2)) for part in token_logps.split(counts)])
    return torch.nn.functional.softplus(-logits), {"value": logits.sigmoid()}


def test_a_verifier_in_the_loop(work, tmp_path):
    """Examples may ask for tokens of their own choice; the loss is a mean over what they count as units."""
    assert stepdpo.main(arguments(work, "sft", tmp_path / "out", "--max_steps", "6"), verifier_objective, encode=verifier) == 0
    got = metrics(tmp_path / "out")
    assert 0.2 < got[0]["loss"] < 2 and got[-1]["loss"] < got[0]["loss"] and 0 < got[0]["value"] < 1


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_held_out_rows_for_every_method(work, tmp_path, method):
    """--eval_data in SFT too: a mean over answer tokens, that of the training rows when they are the held-out ones."""
    more = ["--batch_size", "27", "--eval_data", str(work / "pairs.jsonl"), "--eval_every", "1", "--lr", "1e-9"]
    assert stepdpo.main(arguments(work, method, tmp_path / "out", *more)) == 0
    held = [json.loads(line)["loss"] for line in (tmp_path / "out" / "eval.jsonl").read_text().splitlines()]
    assert held[0] == pytest.approx(metrics(tmp_path / "out")[0]["loss"], rel=1e-5)


# ------------------------------------------------------------------------------------------------------- the order

HARD_FIRST = """
import os, signal, sys, stepdpo

def hard_first(epoch, examples, score):
    logps = score()
    margins = (logps[:, 0] - logps[:, 1]).tolist()
    return sorted(range(len(examples)), key=margins.__getitem__)

record, left = stepdpo.Screen.record, int(sys.argv.pop(1))
def counted(self, values):
    global left
    record(self, values)
    left -= 1
    if left == 0:
        os.killpg(0, signal.SIGKILL)
stepdpo.Screen.record = counted
sys.exit(stepdpo.main(order=hard_first))
"""


@pytest.mark.parametrize("world", [1, 2])
def test_an_order_by_the_policys_margins_killed_in_mid_epoch(processes, work, tmp_path, world):
    """The pairs with the smallest margin first, measured anew in every epoch: the run that is killed in mid-epoch, when
    the policy is no longer the one that gave the order, ends in the same bits."""
    script = tmp_path / "ordered.py"
    script.write_text(HARD_FIRST)
    for out, kills in (("whole", []), ("killed", [2, 3, 1])):
        argv = arguments(work, "stepdpo", tmp_path / out, "--max_steps", "10", "--lr", "1e-2", "--checkpoint_every", "1")
        for after in kills:
            processes.start([str(script), str(after), *argv], world)
            assert -signal.SIGKILL in processes.wait(), processes.log.read_text()
        processes.run(script, "0", *argv, world=world)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == (tmp_path / "killed" / "model.safetensors").read_bytes()


def test_the_order_is_another_one_in_another_epoch(work, tmp_path):
    """score() is of the policy as it is when the epoch begins; each epoch's order is asked for once."""
    orders = []

    def by_margin(epoch, examples, score):
        logps = score()
        assert logps.shape == (27, 2)
        orders.append(sorted(range(27), key=lambda row: float(logps[row, 0] - logps[row, 1])))
        return orders[-1]

    go = arguments(work, "stepdpo", tmp_path / "out", "--max_steps", "8", "--lr", "1e-2")
    assert stepdpo.main(go, order=by_margin) == 0
    assert len(orders) == 2 and orders[0] != orders[1]
    assert stepdpo.main(go, order=lambda epoch, examples, score: range(27)) == 2        # another order, another run


def test_an_order_that_forgets_a_row_is_refused(work, tmp_path, capsys):
    """A row twice and one never: no silent change of what an epoch is."""
    wrong = lambda epoch, examples, score: [0, *range(26)]
    assert stepdpo.main(arguments(work, "stepdpo", tmp_path / "out"), order=wrong) == 2
    assert "every row of 27 once" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ scores outside

def test_scores_without_a_training_run(work):
    """`log_probs` of rows under a folder is `score` of the encoded rows, and the plain sum over tokens."""
    rows = pair_rows(5)
    table = stepdpo.log_probs(work / "model", rows, "stepdpo", "alpaca")
    tokenizer = data.Tokenizer.from_pretrained(work / "model")
    examples, _ = data.encode_dataset([(f"row:{i}", row) for i, row in enumerate(rows)], tokenizer, "stepdpo", "alpaca")
    model = Llama.from_pretrained(work / "model")
    for example, sums in zip(examples, table):
        for side, found in zip(example.sides, sums):
            ids = torch.from_numpy(side).long()
            plain = model(ids[None])[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[example.start - 1:].sum()
            assert found.item() == pytest.approx(plain.item(), abs=1e-3)
    policy = stepdpo.Policy(model)
    torch.testing.assert_close(stepdpo.score(policy, examples, micro_batch_tokens=200), table, atol=1e-4, rtol=0)
    with pytest.raises(data.DataError, match="not every row can be scored"):
        stepdpo.log_probs(work / "model", [*rows, rows[0] | {"rejected": ""}], "stepdpo", "alpaca")
