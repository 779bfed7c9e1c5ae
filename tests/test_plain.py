"""The ladder's first rung holds the others: plain Step-DPO and stepdpo.py are the same method."""
import json
import math

import pytest
import torch
from conftest import write_rows

import stepdpo
from examples import arithmetic, plain
from model import Llama


def test_stepdpo_gives_the_losses_and_weights_of_the_plain_loop(tmp_path):
    """The same pairs in the same order: every loss to 1e-5, every weight to 2e-5 after six updates of 1e-3, the first
    loss log 2. (The difference is the order of sums; AdamW divides small gradients by small ones.)"""
    arithmetic.make_model(tmp_path / "start", seed=0)
    pairs = plain.pairs_of_the_task(24)
    policy, losses = plain.train(tmp_path / "start", pairs, batch_size=4, lr=1e-3, beta=0.4)
    file = write_rows(tmp_path / "pairs.jsonl", pairs)
    in_order = lambda epoch, examples, score: range(len(examples))
    assert stepdpo.main(
        ["stepdpo", "--model", str(tmp_path / "start"), "--data", str(file), "--out", str(tmp_path / "out"), "--prompt", "raw",
         "--epochs", "1", "--batch_size", "4", "--lr", "1e-3", "--warmup", "0", "--schedule", "constant", "--beta", "0.4",
         "--device", "cpu"], order=in_order) == 0
    theirs = [json.loads(line)["loss"] for line in (tmp_path / "out" / "metrics.jsonl").open()]
    assert losses == pytest.approx(theirs, abs=1e-5) and losses[0] == pytest.approx(math.log(2), abs=1e-6)
    trained = Llama.from_pretrained(tmp_path / "out")
    for (name, ours), plain_one in zip(trained.named_parameters(), policy.parameters()):
        torch.testing.assert_close(ours, plain_one, atol=2e-5, rtol=0, msg=name)


def test_the_command_trains_and_saves(tmp_path, monkeypatch, capsys):
    """One command, some seconds: the loss falls from log 2, and OUT is a checkpoint."""
    monkeypatch.setattr(plain, "pairs_of_the_task", lambda count, make=plain.pairs_of_the_task: make(12))
    monkeypatch.setattr("sys.argv", ["plain", "--out", str(tmp_path / "out"), "--batch_size", "4"])
    plain.main()
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if line.startswith("update")]
    assert losses[0] == 0.6931 and losses[-1] < 0.6 and Llama.from_pretrained(tmp_path / "out")
