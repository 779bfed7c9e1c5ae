"""benchmarks/ in their smallest form: that the scripts run, and that what they compare is the same work. No
figure of speed is looked at."""
import json
import os
import subprocess
import sys

import pytest

from conftest import ROOT

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the benchmarks read /proc")


def python(*arguments, cwd) -> str:
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=cwd,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run(script: str, tmp_path) -> dict:
    out = tmp_path / "report.json"
    python(ROOT / "benchmarks" / script, "--quick", "--json", out, cwd=tmp_path)
    report = json.loads(out.read_text())
    assert report["machine"]["versions"]["torch"] and report["machine"]["date"]
    assert report["settings"]["quick"] in (True, "True")
    return report


@pytest.fixture(scope="module")
def training(tmp_path_factory) -> dict:
    return run("train.py", tmp_path_factory.mktemp("train"))


def test_train_compares_equal_work(training):
    """Each contestant starts at log 2 and takes the same path, all sets of ideas give the same log-probs, and
    every figure of the tables is there."""
    facts = ("all_ran", "same_tokens", "log2_at_step_0", "same_losses")
    assert training["peers"]["checks"] == dict.fromkeys(facts, True)
    ours = training["peers"]["contestants"]["this project"]
    figures = ("seconds_per_pair", "score_seconds_per_pair", "peak_bytes", "tokens_per_second", "gemm_share")
    assert min(ours[name] for name in figures) > 0
    ideas = training["ideas"]
    assert ideas["checks"]["same_logps"] and list(ideas["cumulative"]) == list(ideas["without"])
    assert all(0.5 < r["tokens"] < r["flops"] < 1 for r in training["prefix"]["lengths"])


def test_the_tree_is_counted_and_computes_the_same(training, tmp_path):
    """Eight pairs of a problem: log-probs and losses are those of separate rows, and each way has as many
    tokens as a set of prefixes counts in the same rows."""
    script = "import json, train; print(json.dumps(train.grouped_rows(2, 300, (10, 20), (4, 12))))"
    rows = json.loads(python("-c", script, cwd=ROOT / "benchmarks"))
    found = training["tree"]["materials"]["generated rows"]
    assert set(training["tree"]["checks"].values()) == {True}
    assert (found["pairs"], found["passes"]) == (16, 2)          # a pass is a problem

    texts = [[(row["prompt"] + row["initial_reason_steps"] + row[side]).split()
              for side in ("chosen", "rejected")] for row in rows]

    def beginnings(pairs):
        return len({tuple(text[:n]) for pair in pairs for text in pair for n in range(1, len(text) + 1)})

    counted = {"none": sum(len(text) for pair in texts for text in pair),
               "pair": sum(beginnings([pair]) for pair in texts),
               "tree": beginnings(texts[:8]) + beginnings(texts[8:])}
    assert {share: way["tokens"] for share, way in found["ways"].items()} == counted
    assert counted["tree"] * 2 < counted["pair"]
    assert all(way["seconds_per_pair"] > 0 and way["peak_bytes"] > 0 for way in found["ways"].values())


def test_logprobs_measures_error_and_memory(tmp_path):
    """Every way to the log-probs agrees with float64, at every size."""
    report = run("logprobs.py", tmp_path)
    assert report["checks"] == {"error_below_1e-05": True, "all_ran": True}
    assert {case["way"] for case in report["cases"]} >= {"this project", "plain"}
    for case in report["cases"]:
        assert case["seconds"] > 0 and case["logits_bytes"] == 4 * case["M"] * case["V"]
        assert max(case["error"].values()) < 1e-5


def test_generate_counts_its_tokens(tmp_path):
    """Nothing ends a sample early where nothing should, so tokens a second are comparable."""
    report = run("generate.py", tmp_path)
    assert report["checks"] and all(report["checks"].values())
    made = [case["this project"]["tokens"] for case in report["cases"].values()]
    assert made[:2] == [8 * 32, 8 * 64] and 64 < made[2] <= 24 * 64
