"""variants/sdpo.py: a chain of preference runs, each from and against what the last one left."""
import json
import math
import random
import signal
from pathlib import Path

import pytest
import torch
from conftest import ROOT, pair_rows, tiny_checkpoint, write_rows
from test_kill import numbered

import data
import stepdpo
from model import Llama, fingerprint
from variants import sdpo

COMMON = ["--prompt", "alpaca", "--batch_size", "4", "--lr", "1e-3", "--epochs", "2", "--device", "cpu", "--beta", "0.5"]


@pytest.fixture(scope="module")
def chained(tmp_path_factory):
    """A tiny model; `liked`, pairs whose chosen step it finds likelier, and `disliked`, the other way around."""
    folder = tmp_path_factory.mktemp("sdpo")
    tiny_checkpoint(folder / "model")
    rows = pair_rows(16)
    table = stepdpo.log_probs(folder / "model", rows, "stepdpo", "alpaca")
    liked = []
    for row, (chosen, rejected) in zip(rows, table.tolist()):
        turned = row | {"chosen": row["rejected"], "rejected": row["chosen"]}
        liked.append(row if chosen > rejected else turned)
    write_rows(folder / "liked.jsonl", liked[:6])
    write_rows(folder / "disliked.jsonl", [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in liked[6:]])
    return folder


def arguments(folder, out, *more, first="disliked", second="liked", method="stepdpo"):
    return [method, "--model", str(folder / "model"), "--data", str(folder / f"{first}.jsonl"), "--more_data", str(folder / f"{second}.jsonl"), "--out", str(out),
            *COMMON, *more]


def kept(out) -> dict:
    return json.loads((out / "sdpo.json").read_text())


def test_a_chain_is_its_stages_one_by_one(chained, tmp_path, capsys):
    """Easy first; each stage is the run that one would start by hand on the last one's result, with a fresh optimizer, schedule and reference: the same
    bits, and log 2 at its first step."""
    assert sdpo.main(arguments(chained, tmp_path / "chain")) == 0
    said = capsys.readouterr().out
    by_hand = [tmp_path / "one", tmp_path / "two"]
    for source, start, out in zip(("liked", "disliked"), (chained / "model", by_hand[0]), by_hand):
        assert stepdpo.main(["stepdpo", "--model", str(start), "--data", str(chained / f"{source}.jsonl"), "--out", str(out), "--schedule", "linear", *COMMON]) == 0
    for ours, theirs in zip((tmp_path / "chain" / "stage1", tmp_path / "chain"), by_hand):
        assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    stages = kept(tmp_path / "chain")["stages"]
    assert [stage["first_loss"] for stage in stages] == pytest.approx([math.log(2)] * 2, abs=1e-5)
    assert [stage["accuracy_of_S"] for stage in stages] == [1.0, 0.0]
    assert [stage["reference"] for stage in stages] == [fingerprint(chained / "model"), fingerprint(by_hand[0])]
    assert all(stage["reference"][:12] in said for stage in stages)
    assert stages[1]["gamma_of_result"] > stages[1]["gamma_of_reference"]


def test_gamma_is_the_log_ratio_of_the_two_sides(chained, tmp_path):
    """What is printed about a stage's reference is the mean of log pi(chosen) - log pi(rejected) on its pairs."""
    assert sdpo.main(arguments(chained, tmp_path / "out", "--kl_samples", "0")) == 0
    rows = [row for _, row in data.read_rows(chained / "disliked.jsonl")]
    for folder, of in ((chained / "model", "S"), (tmp_path / "out" / "stage1", "reference"), (tmp_path / "out", "result")):
        chosen_logps, rejected_logps = stepdpo.log_probs(folder, rows, "stepdpo", "alpaca").unbind(1)
        stage = kept(tmp_path / "out")["stages"][1]
        assert stage[f"gamma_of_{of}"] == pytest.approx((chosen_logps - rejected_logps).mean().item(), abs=1e-3)


def test_order_and_split(chained, tmp_path):
    """--as_given keeps the order; --random_split deals out the same pairs in parts of the sources' sizes, by the seed."""
    assert sdpo.main(arguments(chained, tmp_path / "given", "--as_given", "--kl_samples", "0")) == 0
    assert [stage["file"] for stage in kept(tmp_path / "given")["stages"]] == [str(chained / f"{name}.jsonl") for name in ("disliked", "liked")]
    parts = {}
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert sdpo.main(arguments(chained, tmp_path / name, "--random_split", "--seed", seed, "--kl_samples", "0", "--max_steps", "1")) == 0
        parts[name] = [[row for _, row in data.read_rows(tmp_path / name / f"part{t}.jsonl")] for t in (1, 2)]
    assert parts["a"] == parts["b"] != parts["c"] and list(map(len, parts["a"])) == [6, 10]
    pool = [row for name in ("liked", "disliked") for _, row in data.read_rows(chained / f"{name}.jsonl")]
    key = lambda row: json.dumps(row, sort_keys=True)
    assert sorted(map(key, parts["a"][0] + parts["a"][1])) == sorted(map(key, pool))


def test_kl_is_that_of_the_two_models(chained, tmp_path):
    """One token after each of many prompts: the estimate agrees with the sum over the whole vocabulary; of a model against itself it is 0."""
    other = tiny_checkpoint(tmp_path / "other", seed=1)
    args = stepdpo.parser(sdpo.options).parse_args(arguments(chained, tmp_path / "out", "--max_length", "9"))
    stepdpo.settle(args)
    rng = random.Random(0)
    prompts = [[1, *(rng.randrange(3, 259) for _ in range(7))] for _ in range(400)]
    found, error = sdpo.kl(other, chained / "model", prompts, tmp_path / "samples.jsonl", args, torch.device("cpu"))
    ids = torch.tensor(prompts)
    p, q = (Llama.from_pretrained(folder)(ids)[:, -1].log_softmax(-1) for folder in (other, chained / "model"))
    exact = (p.exp() * (p - q)).sum(-1).mean().item()
    assert abs(found - exact) < 4 * error < exact
    assert sdpo.kl(other, other, prompts, tmp_path / "samples.jsonl", args, torch.device("cpu")) == (0.0, 0.0)


@pytest.mark.parametrize("more, said", [
    (["--random_split"], "split was 'easy first', is 'random'"), (["--seed", "1"], "seed was 0, is 1"), (["--beta", "2"], "beta: 0.5 then, 2.0 now"),
    (["--data", "other.jsonl"], "sources was")])
def test_a_chain_goes_on_only_as_it_began(chained, tmp_path, capsys, monkeypatch, more, said):
    """Another split, seed, beta or source is another chain, and one line says what differs."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "other.jsonl", pair_rows(6, seed=9))
    assert sdpo.main(arguments(chained, tmp_path / "out", "--max_steps", "1")) == 0
    capsys.readouterr()
    assert sdpo.main(arguments(chained, tmp_path / "out", "--max_steps", "1", *more)) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize("argv, said", [
    (["--kl_samples", "-1"], "--kl_samples is -1"), (["--kl_samples", "1"], "--kl_samples is 1"), (["--reference", "model"], "--reference has no place in it"),
    (["--shard", "--kl_samples", "8"], "a sharded model cannot sample")])
def test_what_a_chain_cannot_be(chained, tmp_path, capsys, argv, said):
    assert sdpo.main(arguments(chained, tmp_path / "out", *argv)) == 2
    assert said in capsys.readouterr().err


def test_one_source_is_no_chain(chained, tmp_path, capsys):
    """sDPO of one file would be DPO; SFT has no reference."""
    alone = ["stepdpo", "--model", str(chained / "model"), "--data", str(chained / "liked.jsonl"), "--out", str(tmp_path / "out"), *COMMON]
    assert sdpo.main(alone) == 2 and "--more_data" in capsys.readouterr().err
    assert sdpo.main(["sft", *(part for part in alone[1:] if part not in ("--beta", "0.5"))]) == 2
    assert "sft has no place in it" in capsys.readouterr().err


def killed_and_continued(processes, argv, folder, world, name):
    """argv(OUT) killed before four of its file operations, in as many runs, and then run to its end leaves what one
    undisturbed run leaves; returns the OUT that was disturbed."""
    rng, outs, count = random.Random(f"{name} {world}"), numbered(folder), processes.folder / "count"
    undisturbed = next(outs)
    processes.start(argv(undisturbed), world, undisturbed, count=count)
    assert processes.wait() == [0] * world, processes.log.read_text()
    operations, out = len(Path(f"{count}-0").read_bytes()), next(outs)
    for before in sorted(rng.sample(range(1, operations), 4), reverse=True):
        processes.start(argv(out), world, out, kill={"before": before, "rank": 0, "all": True})
        codes = processes.wait()
        assert -signal.SIGKILL in codes or codes == [0] * world, processes.log.read_text()
    processes.run(*argv(out), world=world)
    assert without_paths(whole(out), out) == without_paths(whole(undisturbed), undisturbed)
    return out


def whole(out) -> dict:
    """All that a chain leaves behind, without its timings."""
    found = {}
    for path in sorted(out.rglob("*")):
        if path.is_file():
            lines = path.read_text().splitlines() if path.suffix in (".jsonl", ".json") else path.read_bytes()
            if path.name == "metrics.jsonl":
                lines = [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "tokens_per_second")} for line in lines]
            if path.name == "run.json":
                lines = json.loads(path.read_text())["identity"]
            if path.name.endswith("summary.json"):
                lines = json.loads(path.read_text())["settings"]
            found[str(path.relative_to(out))] = lines
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_killed_anywhere(processes, chained, tmp_path, world):
    """A kill before any of its file operations, in any stage, and the same command again: the same files. (--random_split, so that also the parts are
    written.)"""
    more = ["--random_split", "--checkpoint_every", "1", "--kl_samples", "6", "--max_length", "330"]
    killed_and_continued(processes, lambda out: [str(ROOT / "variants" / "sdpo.py"), *arguments(chained, out, *more)], tmp_path, world, "sdpo")


def without_paths(found: dict, out) -> dict:
    return json.loads(json.dumps({name: value if not isinstance(value, bytes) else value.hex() for name, value in found.items()}).replace(str(out), "OUT"))
