"""examples.siblings: the experiment of each sibling that trains a language model, once and small, on one pool."""
import json
from dataclasses import replace

import pytest

from examples import arithmetic
from examples.arithmetic import QUICK, rows_of
from examples.siblings import Bench, prm, table
from examples.siblings.__main__ import main

TINY = replace(QUICK, sft=6000, collect=60, held_out=8, pairs=8, epochs=1, test=4)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """SFT, attempts, errors and pairs of a task made small, as the first command leaves them."""
    folder = tmp_path_factory.mktemp("pool")
    arithmetic.make_pool(folder / "seed0", TINY, 0, "test")
    return folder


@pytest.mark.parametrize("method", ["sdpo", "sacpo", "scdpo", "full_step_dpo", "stepco"])
def test_an_experiment_small_and_again(method, pool, tmp_path, monkeypatch, capsys):
    """All arms, each with its sentence, and results.json; the same command again trains nothing anew and says the same."""
    monkeypatch.setattr(arithmetic, "QUICK", TINY)
    for name, value in (("UPDATES", 4), ("FEW", 12)):
        monkeypatch.setattr(prm, name, value)
    argv = ["--method", method, "--out", str(tmp_path), "--start", str(pool), "--quick"]
    capsys.readouterr()
    assert main(argv) == 0
    said = capsys.readouterr().out
    arms = __import__(f"examples.siblings.{method}", fromlist=["ARMS"]).ARMS
    first = json.loads((tmp_path / method / "results.json").read_text())
    assert set(first["arms"]) == set(arms) and all(arm.about in said for arm in arms.values())
    assert main(argv) == 0
    again, said = json.loads((tmp_path / method / "results.json").read_text()), capsys.readouterr().out
    assert again["arms"] == first["arms"] and "this run is complete" in said
    if method == "scdpo":       # equal data; where forks are undone, another right answer faces the wrong one
        folder = tmp_path / "scdpo" / "seed0"
        assert len({len(rows_of(folder / f"{arm}.jsonl")) for arm in arms if arm != "sft"}) == 1
        assert all(row["full_chosen"] != row["full_rejected"] for row in rows_of(folder / "undone.jsonl"))


def test_other_settings_are_another_experiment(pool, tmp_path, monkeypatch, capsys):
    """--dev in a folder that holds the test problems' scores: one line, and nothing is mixed."""
    monkeypatch.setattr(arithmetic, "QUICK", TINY)
    bench = Bench(pool / "seed0", tmp_path / "sdpo" / "seed0", TINY, 0, "test")
    from examples.siblings import write_problems
    write_problems(bench)
    assert main(["--method", "sdpo", "--out", str(tmp_path), "--start", str(pool), "--quick", "--dev"]) == 2
    assert "holds an experiment with other settings" in capsys.readouterr().err


def test_the_table_by_hand():
    """Means over two seeds, what is compared with what, and an empty cell where an arm has no figure."""
    from examples.siblings import Arm
    arms = {"a": Arm("A", "The start."), "b": Arm("B", "The method.", ("a",))}
    runs = [{"arms": {"a": {"verdicts": [True, False]}, "b": {"verdicts": [True, True], "kl": kl}}} for kl in (0.1, 0.3)]
    summary, text = table(arms, runs, {"kl": ("KL", ".2f")}, "accuracy")
    assert summary["arms"]["a"]["accuracy"] == 0.5 and summary["arms"]["b"]["accuracy_per_seed"] == [1.0, 1.0]
    assert "0.20" in text and "The method." in text and "+50.0 +- 0.0 points against A: within noise (2 : 0 problems, p = 0.5)" in text
