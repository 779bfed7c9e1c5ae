"""SPO: the loop, the embedded task, and real pipelines. (Numbers of released code: test_siblings.py.)"""
import json
import math
import os
import signal
import struct
import zlib
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from examples.siblings import spo as experiment
from variants import spo

SMALL = spo.Size(base=2, preference=2, batch=8)
FAST = ["--prompts_per_round", "4", "--steps", "5", "--first_steps", "2", "--candidates", "3", "--threshold", "0", "--batch_size", "5",
        "--lr", "1e-3", "--rounds", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """The embedded task's networks after two updates: their numbers mean nothing, and cost nothing."""
    folder = tmp_path_factory.mktemp("networks")
    spo.Shapes(folder, 0, size=SMALL)
    return folder


def task_of(networks, **how):
    return spo.Shapes(networks, 0, size=SMALL, steps=5, **how)


def settings(out: Path, *more) -> object:
    args = spo.arguments().parse_args(["--out", str(out), *FAST, *more])
    spo.settle(args, "shapes", spo.Shapes.shape, spo.Shapes.prompts)
    return args


def train(networks, out: Path, *more, **how):
    out.mkdir(exist_ok=True)
    task = task_of(networks)
    return spo.train(settings(out, *more), task, out, **how), task.policy.state_dict()


def lines(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def same_weights(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------------------------------------------------- losses

def test_beta_means_a_step_in_one_loss_and_a_dimension_in_the_other():
    """Inside the band the released loss at beta is the paper's at beta / dimensions, gradients included."""
    sums = [torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    paper, _ = spo.paper_loss(*sums, 10 / 768)
    released, metrics = spo.released_loss(*(s / 768 for s in sums), 10, 0.1)
    assert not metrics["clipped"].any()
    torch.testing.assert_close(paper, released, rtol=1e-12, atol=0)
    for one, other in zip(torch.autograd.grad(paper.sum(), sums), torch.autograd.grad(released.sum(), sums)):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=0)


def test_what_the_clip_does():
    """The smallest loss within reach is 0.126; a pair that is ranked wrong beyond the band costs 2.13 and has no gradient; two
    sides beyond it on the same side read log 2 and have none either."""
    def loss(chosen, rejected):
        logps = [torch.tensor([v], requires_grad=True) for v in (chosen, rejected, 0.0, 0.0)]
        losses, metrics = spo.released_loss(*logps, 10, 0.1)
        losses.sum().backward()
        return losses.item(), [logp.grad.item() for logp in logps[:2]], metrics["clipped"].item()

    assert loss(0.2, -0.2) == (pytest.approx(0.1261, abs=1e-4), [0, 0], 1)
    assert loss(-0.2, 0.2) == (pytest.approx(2.1329, abs=2e-3), [0, 0], 1)
    assert loss(0.2, 0.3) == (pytest.approx(math.log(2), abs=1e-6), [0, 0], 1)
    assert loss(0.2, 0.0)[2] == 0.5


@pytest.mark.parametrize("loss", ["released", "paper"])
def test_the_first_loss_is_log_2_and_an_update_moves_both_sides(networks, tmp_path, loss):
    """Policy = reference before the first update; after it the chosen x_{t-1} of the same pairs are likelier than the rejected,
    relative to the reference, and no weight of the reference has moved."""
    seen = []

    def collect(*args, **how):
        seen.append(spo.sample_pairs(*args, **how))
        return seen[-1]

    task = task_of(networks)
    before = {k: v.clone() for k, v in task.reference.state_dict().items()}
    args = settings(tmp_path, "--rounds", "1", "--batch_size", "99", "--loss", loss, "--lr", "1e-4")
    assert spo.train(args, task, tmp_path, collect=collect) == 0
    (record,) = lines(tmp_path)
    assert record["loss"] == pytest.approx(math.log(2), abs=1e-7) and record["margin"] == 0 == record["clipped"]
    assert record["updates"] == 1 and record["pairs"] == 12 and record["kept"] == 1
    at, which = seen[0].kept.nonzero().unbind(1)
    rows = torch.tensor([spo.prompt_of(0, i, 3) for i in range(4)])
    losses, metrics = spo.losses_of(args, task, seen[0], at, which, rows)
    assert losses.mean() < math.log(2) and metrics["margin"].mean() > 0
    assert same_weights(before, task.reference.state_dict())
    assert not same_weights(before, task.policy.state_dict())


# -------------------------------------------------------------------------------------------------------------- pairs

def a_round(go_on=spo.uniform, inner_steps=1, steps=5, first_steps=2, score=None):
    how = dict(first_steps=first_steps, inner_steps=inner_steps)
    noise = spo.draw_noise(("a round",), range(3), (1, 2, 2), None, steps=steps, candidates=3, **how)
    score = score or (lambda x_0, t: x_0.flatten(2).sum(2))
    pairs = spo.sample_pairs(lambda x, t: 0.1 * x, score, spo.evenly(steps), noise, go_on=go_on, **how)
    return pairs, noise


def test_both_sides_come_from_one_x_t_and_the_next_one_from_a_drawn_candidate():
    """With one step a comparison a pair has one x_t; the next x_t is the winner, the loser or the one drawn, as `go_on` says, and
    what is drawn is not always the winner."""
    winner, _ = a_round(lambda drawn, win, lose: win)
    loser, _ = a_round(lambda drawn, win, lose: lose)
    drawn, noise = a_round()
    assert drawn.x_t.shape == (3, 3, 1, 1, 2, 2) and drawn.x_prev.shape == (3, 3, 2, 1, 2, 2) and drawn.t.tolist() == [401, 201, 1]
    assert torch.equal(winner.x_t[1:, :, 0], winner.x_prev[:-1, :, 0])
    assert torch.equal(loser.x_t[1:, :, 0], loser.x_prev[:-1, :, 1])
    assert not torch.equal(drawn.x_t[1:, :, 0], drawn.x_prev[:-1, :, 0])
    sampler, x_t = spo.evenly(5), drawn.x_t[0, :, 0]
    _, mean, sigma = sampler.step(x_t, 0.1 * x_t, 401)
    candidates = mean + sigma * noise.steps[2]
    torch.testing.assert_close(drawn.x_t[1, :, 0], spo.pick(candidates, noise.go_on[0]))


def test_inner_steps_give_each_side_its_own_way():
    """Two steps a comparison: both become pairs with the same verdict; x_t is shared in the first and each side's own in the
    second. A remainder of one step is judged by itself."""
    pairs, _ = a_round(inner_steps=2)
    assert pairs.t.tolist() == [401, 201, 1] and pairs.scores.shape == (2, 3, 3) and pairs.x_t.shape == (3, 3, 2, 1, 2, 2)
    assert torch.equal(pairs.x_t[0, :, 0], pairs.x_t[0, :, 1]) and torch.equal(pairs.kept[0], pairs.kept[1])
    assert torch.equal(pairs.x_t[1], pairs.x_prev[0])
    assert torch.equal(pairs.x_t[2, :, 0], pairs.x_t[2, :, 1])


def test_a_trajectorys_noise_depends_on_seed_round_and_its_number_alone():
    """So the processes that share a round draw what one alone would."""
    how = dict(steps=4, first_steps=2, inner_steps=1, candidates=2)
    everything = spo.draw_noise((0, 7), range(4), (1, 2), None, **how)
    alone = spo.draw_noise((0, 7), [2], (1, 2), None, **how)
    other = spo.draw_noise((0, 8), [2], (1, 2), None, **how)
    assert torch.equal(alone.start[0], everything.start[2]) and torch.equal(alone.go_on[:, 0], everything.go_on[:, 2])
    assert all(torch.equal(a[:, 0], b[:, 2]) for a, b in zip(alone.steps, everything.steps))
    assert [len(z) for z in alone.steps] == [1, 1, 2, 2] and not torch.equal(alone.start, other.start)


def test_continuation_is_uniform():
    drawn = spo.draw_noise((1,), range(500), (1,), None, steps=5, first_steps=1, inner_steps=1, candidates=4).go_on.flatten()
    counts = drawn.bincount(minlength=4)
    assert ((counts - 500).abs() < 5 * (2000 * 0.25 * 0.75)**0.5).all() and counts.sum() == 2000


def test_every_prompt_has_its_turn_before_any_comes_again():
    turns = [[spo.prompt_of(3, 5 * turn + i, 5) for i in range(5)] for turn in range(4)]
    assert all(sorted(turn) == [0, 1, 2, 3, 4] for turn in turns) and len(set(map(tuple, turns))) > 1


def test_labels_of_whole_trajectories_are_the_same_at_every_step():
    """The experiment's other arm: all steps of a pair come from the two trajectories whose final pictures are best and worst."""
    noises = [spo.draw_noise((k,), range(2), (1, 2, 2), None, steps=5, first_steps=5, inner_steps=1, candidates=1) for k in range(3)]
    score = lambda x, t: x.flatten(2).sum(2)
    pairs = experiment.trajectory_pairs(lambda x, t: 0.1 * x, score, spo.evenly(5), noises, 2, 0.0)
    assert pairs.t.tolist() == [401, 201, 1] and torch.equal(pairs.x_t[1:], pairs.x_prev[:-1])
    final = pairs.x_prev[-1].flatten(2).sum(2)                                                  # (B, 2)
    torch.testing.assert_close(final, torch.stack([pairs.scores[0].amax(0), pairs.scores[0].amin(0)], 1))


# ---------------------------------------------------------------------------------------- the preference model, shapes

def test_a_prompt_with_two_pairs_counts_once():
    """The released weighting: 1 / pairs of the prompt, over their sum."""
    winner, loser = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])
    losses = [math.log(1 + math.exp(-d)) for d in (1, 2, -1)]
    wanted = (losses[0] + losses[1] / 2 + losses[2] / 2) / 2
    assert spo.preference_loss(winner, loser, torch.tensor([1.0, 2.0, 2.0])).item() == pytest.approx(wanted, abs=1e-6)


def test_the_preference_model_sees_t_unless_it_is_blind(networks):
    task, blind = task_of(networks), task_of(networks, blind=True)
    for block in (task.scorer.fine, blind.scorer.fine):            # after two updates the adaptive norms hardly adapt
        torch.nn.init.normal_(block.adapt.weight, generator=spo.generator_of(0))
    kinds = torch.tensor([0, 1, 2])
    x = spo.draw_shapes(kinds, spo.generator_of(1))
    assert not torch.allclose(task.score(x, kinds, 1), task.score(x, kinds, 751), atol=1e-3)
    assert torch.equal(blind.score(x, kinds, 1), blind.score(x, kinds, 751))


def test_a_perfect_denoiser_shows_the_preference_model_the_picture_itself():
    """`as_seen_at` predicts x_0 from the picture with the noise that was added: with that very noise as prediction it is exact."""
    x, noise = torch.rand(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    seen = spo.as_seen_at(x, torch.tensor([1, 300, 600, 900]), noise, lambda x_t, t: noise, spo.evenly(20))
    torch.testing.assert_close(seen, x, atol=1e-4, rtol=0)


def test_the_reward_is_what_was_drawn():
    """Turned upside down a picture's layout is the other way round and its detail stays; without stripes detail is nearly 0."""
    x = spo.draw_shapes(torch.arange(60) % 3, spo.generator_of(2))
    torch.testing.assert_close(spo.layout(x) + spo.layout(x.flip(2)), torch.ones(60), atol=0.15, rtol=0)
    torch.testing.assert_close(spo.detail(x), spo.detail(x.flip(2)))
    plain = x.clone()
    plain[..., 1::2] = plain[..., 0::2]                             # dark columns as bright as their neighbours
    assert spo.detail(plain).max() < 1e-6 < spo.detail(x).mean() - 0.2
    assert len(experiment.quarter_of(x).unique()) == 4


def test_the_contact_sheet_is_a_picture(tmp_path):
    """A PNG of the right size whose pixels are those that were given (read back with zlib)."""
    x = torch.full((2, 1, 1, 3, 2, 2), -1.0)
    x[1, 0, 0, 0] = 1.0                                             # the second picture is red
    spo.contact_sheet(x, tmp_path / "sheet.png", zoom=2)
    raw = (tmp_path / "sheet.png").read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n" and raw[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", raw[16:24])
    length, = struct.unpack(">I", raw[33:37])
    pixels = zlib.decompress(raw[41:41 + length])
    assert (width, height) == (6 + 8 + 6, 6) and len(pixels) == height * (1 + 3 * width)
    middle = pixels[3 * (1 + 3 * width):][1:]
    assert middle[3 * 3:3 * 4] == b"\0\0\0" and middle[3 * 16:3 * 17] == b"\xff\0\0"


# --------------------------------------------------------------------------------------- interrupted, and many processes

def test_a_run_that_is_interrupted_goes_on_to_the_same_bits(networks, tmp_path):
    """Killed between two checkpoints, and stopped by SIGINT at the end of a round: weights and log are those of one run."""
    whole = train(networks, tmp_path / "whole", "--checkpoint_every", "0")
    assert whole[0] == 0

    def die(round):
        if round == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(networks, tmp_path / "killed", "--checkpoint_every", "2", watch=die)
    assert len(lines(tmp_path / "killed")) == 3 and (tmp_path / "killed/checkpoint/step-00000002").is_dir()
    again = train(networks, tmp_path / "killed", "--checkpoint_every", "2")
    stopped = train(networks, tmp_path / "stopped", watch=lambda round: round == 1 and os.kill(os.getpid(), signal.SIGINT))
    assert stopped[0] == 130 and len(lines(tmp_path / "stopped")) == 2
    on = train(networks, tmp_path / "stopped")
    for status, weights in (again, on):
        assert status == 0 and same_weights(weights, whole[1])
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole") == lines(tmp_path / "stopped")
    assert lines(tmp_path / "whole")[-1]["updates"] == 12           # 12 pairs a round, batches of 5


def command(networks, out: Path, *more) -> list[str]:
    """The command line of a run in `out`, which finds its networks there."""
    (out / "networks").mkdir(parents=True, exist_ok=True)
    for file in networks.glob("*.safetensors"):
        (out / "networks" / file.name).write_bytes(file.read_bytes())
    return [str(ROOT / "variants" / "spo.py"), "--out", str(out), *FAST, *more]


def test_two_processes_give_the_numbers_of_one(networks, tmp_path, processes):
    """Through the command line: score, pairs, loss and weights are those of one process, up to rounding. (Of 5 trajectories one
    process has more, and of an update of 2 pairs one often has none.)"""
    for world in (1, 2):
        said = processes.run(*command(networks, tmp_path / str(world), "--prompts_per_round", "5", "--batch_size", "2", "--rounds", "2",
                                      "--lr", "1e-4"), world=world)
        assert f"on {world} x cpu" in said
    one, two = (lines(tmp_path / str(world)) for world in (1, 2))
    assert [row["pairs"] for row in one] == [row["pairs"] for row in two] == [15, 15]
    for name in ("score", "score_sd", "loss", "margin", "grad_norm"):
        assert [row[name] for row in one] == pytest.approx([row[name] for row in two], abs=1e-4, rel=1e-3), name
    a, b, start = (load_file(path) for path in (*(tmp_path / str(world) / "policy.safetensors" for world in (1, 2)),
                                                networks / "base.safetensors"))
    moved = lambda x, y: max((x[k] - y[k]).abs().max().item() for k in x)
    assert moved(a, b) < 2e-4 < 5e-4 < moved(a, start)


def test_a_killed_command_goes_on_to_the_same_bits(networks, tmp_path, processes):
    """SIGKILL before each of some file operations on the way; the same command then ends with the same file as one that was
    left alone, and a complete run is left as it is."""
    processes.run(*command(networks, tmp_path / "whole"))
    wanted = load_file(tmp_path / "whole" / "policy.safetensors")
    argv = command(networks, tmp_path / "out", "--checkpoint_every", "1")
    for before in (12, 30, 50):
        processes.start(argv, 1, watched=tmp_path / "out", kill={"before": before, "rank": 0, "all": True})
        assert processes.wait() == [-signal.SIGKILL], processes.log.read_text()
        assert not (tmp_path / "out" / "policy.safetensors").exists()
    assert "continuing after round" in processes.run(*argv)
    assert same_weights(load_file(tmp_path / "out" / "policy.safetensors"), wanted)
    assert "is complete" in processes.run(*argv) and not (tmp_path / "out" / "checkpoint").exists()
    assert lines(tmp_path / "out") == lines(tmp_path / "whole") and (tmp_path / "out" / "sheet.png").exists()


# --------------------------------------------------------------------------------------------------------------- bad input

def test_other_settings_do_not_continue_a_run(networks, tmp_path, capsys):
    """What decides the numbers is compared; how a round is cut into network calls is not."""
    argv = command(networks, tmp_path / "out", "--rounds", "1")[1:]
    assert spo.main(argv) == 0
    assert spo.main([*argv, "--beta", "5"]) == 2 and "beta: 10.0 then, 5.0 now" in capsys.readouterr().err
    assert spo.main([*argv, "--micro_batch_size", "2"]) == 0 and "is complete" in capsys.readouterr().out


@pytest.mark.parametrize("more, said", [
    (["--lora", "4"], "--lora: is of real pipelines; give --pipeline too"),
    (["--pipeline", "x"], "--pipeline needs --prompts FILE and --scorer"),
    (["--pipeline", "x", "--prompts", "y", "--scorer", "m:f"], "model_index.json"),
    (["--eta", "0"], "--eta is 0.0: expected above 0"),
    (["--candidates", "1"], "a pair needs 2"),
    (["--first_steps", "20"], "--first_steps 20 of --steps 20"),
    (["--rounds", "0"], "--rounds is 0: expected a number above 0"),
    (["--beta", "nan"], "--beta is nan"),
])
def test_a_slip_gets_one_line(tmp_path, capsys, more, said):
    assert spo.main(["--out", str(tmp_path / "out"), "--device", "cpu", *more]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_scores_that_are_no_numbers_end_the_run(networks, tmp_path):
    """Before the weights are touched."""
    task = task_of(networks)
    task.scorer = lambda x, t, kinds: torch.full((len(x),), math.nan)
    before = {k: v.clone() for k, v in task.policy.state_dict().items()}
    with pytest.raises(FloatingPointError, match="the preference scores are not numbers"):
        spo.train(settings(tmp_path), task, tmp_path)
    assert same_weights(before, task.policy.state_dict())
