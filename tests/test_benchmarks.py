"""benchmarks/ in their smallest form: that the scripts run, and that what they compare is the same work. No figure of speed is looked at."""
import json
import os
import subprocess
import sys

import pytest

from conftest import ROOT

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the benchmarks read /proc")


def run(script: str, tmp_path) -> dict:
    out = tmp_path / "report.json"
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / script), "--quick", "--json", str(out)], capture_output=True, text=True, timeout=120,
                          cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert report["machine"]["versions"]["torch"] and report["machine"]["date"] and report["settings"]["quick"] in (True, "True")
    return report


def test_train_compares_equal_work(tmp_path):
    """Each contestant starts at log 2 and takes the same path, all sets of ideas give the same log-probs, and every figure of the tables is there."""
    report = run("train.py", tmp_path)
    assert report["peers"]["checks"] == dict.fromkeys(("all_ran", "same_tokens", "log2_at_step_0", "same_losses"), True)
    ours = report["peers"]["contestants"]["this project"]
    assert min(ours[k] for k in ("seconds_per_pair", "score_seconds_per_pair", "peak_bytes", "tokens_per_second", "gemm_share")) > 0
    ideas = report["ideas"]
    assert ideas["checks"]["same_logps"] and list(ideas["cumulative"]) == list(ideas["without"])
    assert all(0.5 < r["tokens"] < r["flops"] < 1 for r in report["prefix"]["lengths"])


def test_logprobs_measures_error_and_memory(tmp_path):
    """Every way to the log-probs agrees with float64, at every size."""
    report = run("logprobs.py", tmp_path)
    assert report["checks"] == {"error_below_1e-05": True, "all_ran": True}
    assert {case["way"] for case in report["cases"]} >= {"this project", "plain"}
    for case in report["cases"]:
        assert case["seconds"] > 0 and case["logits_bytes"] == 4 * case["M"] * case["V"] and max(case["error"].values()) < 1e-5


def test_generate_counts_its_tokens(tmp_path):
    """Nothing ends a sample early where nothing should, so tokens a second are comparable."""
    report = run("generate.py", tmp_path)
    assert report["checks"] and all(report["checks"].values())
    made = [case["this project"]["tokens"] for case in report["cases"].values()]
    assert made[:2] == [8 * 32, 8 * 64] and 64 < made[2] <= 24 * 64
