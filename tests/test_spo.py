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
    for before in (30, 20):
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
    (["--eta", "0"], "--eta is 0.0: expected above 0 (without noise there is no density)"),
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
    with pytest.raises(FloatingPointError, match="the preference scores are not all numbers"):
        spo.train(settings(tmp_path), task, tmp_path)
    assert same_weights(before, task.policy.state_dict())


# ---------------------------------------------------------------------------------------------------------- real pipelines

PROMPTS = ["a red disc", "a blue cube", "stripes"]
SCORER = """
import torch
seen = []

def score(pictures, prompts, t):
    seen.append((tuple(pictures.shape), pictures.min().item(), pictures.max().item(), prompts, t))
    return 30 * pictures.mean((1, 2, 3)) + 3 * pictures.std((1, 2, 3))
"""


def clip_tokenizer(folder: Path):
    """One token a letter, in CLIP's format."""
    from transformers import CLIPTokenizer
    letters = [chr(code) for code in range(33, 127)]
    vocab = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def make_pipeline(folder: Path, wide: bool):
    """A random pipeline of diffusers' own classes, in the shape of Stable Diffusion 1.5 or (wide) SDXL: latents of 4 x 8 x 8."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    torch.manual_seed(0)
    tokenizer = clip_tokenizer(folder.parent / f"tokenizer_{folder.name}")
    text = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                          max_position_embeddings=16, projection_dim=16, eos_token_id=tokenizer.eos_token_id)
    more = dict(addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 16,
                cross_attention_dim=32) if wide else dict(cross_attention_dim=16)
    parts = dict(
        unet=diffusers.UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
            attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **more),
        vae=diffusers.AutoencoderKL(
            block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_size=16),
        scheduler=diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                                          set_alpha_to_one=False, steps_offset=1),
        text_encoder=CLIPTextModel(text), tokenizer=tokenizer)
    if wide:
        pipe = diffusers.StableDiffusionXLPipeline(**parts, text_encoder_2=CLIPTextModelWithProjection(text), tokenizer_2=tokenizer)
    else:
        pipe = diffusers.StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    pytest.importorskip("peft", reason="peft is not installed")
    folder = tmp_path_factory.mktemp("pipelines")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (folder / "tiny_scorer.py").write_text(SCORER)
    return {name: make_pipeline(folder / name, name == "sdxl") for name in ("sd", "sdxl")}


@pytest.fixture
def scorer(pipelines, monkeypatch):
    """Where `tiny_scorer:score` can be imported from."""
    monkeypatch.syspath_prepend(str(pipelines["sd"].parent))


def pipeline_argv(pipelines, name, out, *more) -> list[str]:
    folder = pipelines[name]
    return ["--out", str(out), "--pipeline", str(folder), "--prompts", str(folder.parent / "prompts.txt"), "--scorer", "tiny_scorer:score",
            "--prompts_per_round", "3", "--steps", "5", "--first_steps", "2", "--threshold", "0", "--lr", "1e-3", "--rounds", "2",
            "--device", "cpu", *more]


def open_pipeline(pipelines, name, *more):
    args = spo.arguments().parse_args(pipeline_argv(pipelines, name, "nowhere", "--precision", "fp32", *more))
    kind, shape = spo.kind_of(pipelines[name])
    spo.settle(args, kind, shape, len(PROMPTS))
    return spo.Pipeline(args, shape, PROMPTS, spo.load_scorer("tiny_scorer:score")[0], torch.device("cpu"))


def test_densities_are_those_of_diffusers_scheduler():
    """Timesteps, mean and sigma of every step of 20, and the density of what it draws, for both kinds of prediction, against
    DDIMScheduler and torch.distributions: to 1e-6. The embedded task's schedule is Stable Diffusion's."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    g = spo.generator_of("densities")
    for predicts in ("epsilon", "v_prediction", "sample"):
        theirs = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                                         set_alpha_to_one=False, steps_offset=1, prediction_type=predicts)
        theirs.set_timesteps(20)
        ours = spo.evenly(20)
        ours.predicts = predicts
        assert ours.timesteps == theirs.timesteps.tolist()
        torch.testing.assert_close(ours.alpha_bar, theirs.alphas_cumprod, atol=1e-6, rtol=0)
        for t in ours.timesteps:
            x, output, z = torch.randn(3, 2, 4, 4, 4, generator=g)
            step = lambda noise: theirs.step(output, t, x, eta=1.0, variance_noise=noise)
            wanted_mean, drawn = step(torch.zeros_like(z)).prev_sample, step(z).prev_sample
            x_0, mean, sigma = ours.step(x, output, t)
            near = dict(atol=1e-6 * max(1, x_0.abs().max().item()), rtol=0)     # x_0 is up to 20 at t = 951
            torch.testing.assert_close(x_0, step(z).pred_original_sample, **near)
            torch.testing.assert_close(mean, wanted_mean, **near)
            torch.testing.assert_close(mean + sigma * z, drawn, **near)
            wanted = torch.distributions.Normal(mean.double(), theirs._get_variance(t, t - 50).double().sqrt()).log_prob(drawn.double())
            logps = spo.log_density(drawn.double(), mean.double(), sigma.double())
            torch.testing.assert_close(logps, wanted.flatten(1).sum(1), atol=1e-6 * z[0].numel(), rtol=0)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_sampling_is_that_of_diffusers_pipeline(pipelines, scorer, name):
    """From the same noise, with guidance 5 and eta 1, our sampler ends in the latents that the pipeline's own call ends in: text
    encoders, guidance, SDXL's sizes and every step."""
    import diffusers
    task = open_pipeline(pipelines, name, "--guidance", "5")
    g = torch.Generator().manual_seed(1)
    start = torch.randn(2, 4, 8, 8, generator=g)
    wanted = diffusers.DiffusionPipeline.from_pretrained(pipelines[name])(
        PROMPTS[:2], latents=start, num_inference_steps=5, guidance_scale=5.0, eta=1.0, output_type="latent",
        generator=torch.Generator().manual_seed(2)).images
    x, rows, g = start, torch.tensor([0, 1]), torch.Generator().manual_seed(2)
    for t in task.sampler.timesteps:
        with torch.no_grad():
            output = task.predict(task.policy, x, torch.full((2,), t), rows)
        _, mean, sigma = task.sampler.step(x, output, t)
        x = mean + sigma * torch.randn(x.shape, generator=g)
    torch.testing.assert_close(x, wanted, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_lora_trains_the_attention_alone_and_diffusers_loads_it(pipelines, scorer, tmp_path, name, capsys):
    """The first loss is log 2; base weights, text encoder and VAE stay as they were; the saved adapter gives diffusers' pipeline the
    policy's predictions, which are no longer the reference's. The defaults are the released code's for this kind."""
    import diffusers
    out = tmp_path / "out"
    assert spo.main(pipeline_argv(pipelines, name, out)) == 0
    said, rank = capsys.readouterr().out, {"sd": 4, "sdxl": 64}[name]
    first, last = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7) and last["updates"] == 2 and str(out / "lora") in said
    settings = json.loads((out / "run.json").read_text())["settings"]
    assert (settings["lora"], settings["candidates"], settings["inner_steps"]) == {"sd": (4, 4, 1), "sdxl": (64, 2, 4)}[name]
    weights = load_file(out / "lora" / "pytorch_lora_weights.safetensors")
    assert all("lora" in k and any(part in k for part in (".to_q.", ".to_k.", ".to_v.", ".to_out.0.")) for k in weights)
    assert {w.shape[0] for k, w in weights.items() if "lora.down" in k or "lora_A" in k} == {rank}

    pipe = diffusers.DiffusionPipeline.from_pretrained(pipelines[name])
    task = open_pipeline(pipelines, name, "--lora", "0")
    x, t, rows = torch.randn(2, 4, 8, 8), torch.tensor([501, 1]), torch.tensor([0, 2])
    before = task.predict(pipe.unet, x, t, rows)
    torch.testing.assert_close(before, task.predict(task.reference, x, t, rows))
    pipe.load_lora_weights(out / "lora")
    after = task.predict(pipe.unet, x, t, rows)
    assert (after - before).abs().max() > 1e-5


def test_what_lora_leaves_alone(pipelines, scorer, tmp_path):
    """In one process: after a round the adapters have moved, and no other tensor of the policy, of the reference or of the text
    encoder has; what was saved and loaded again predicts what the policy does."""
    import diffusers
    task = open_pipeline(pipelines, "sd")
    trained = [k for k, p in task.policy.named_parameters() if p.requires_grad]
    assert trained and all("lora" in k for k in trained)
    frozen = {k: v.clone() for k, v in task.policy.state_dict().items() if "lora" not in k}
    others = {k: v.clone() for part in (task.reference, task.pipe.text_encoder, task.pipe.vae) for k, v in part.state_dict().items()}
    assert spo.train(task.args, task, tmp_path) == 0
    assert all(torch.equal(v, task.policy.state_dict()[k]) for k, v in frozen.items())
    assert same_weights(others, {k: v for part in (task.reference, task.pipe.text_encoder, task.pipe.vae) for k, v in part.state_dict().items()})
    task.save(tmp_path)
    pipe = diffusers.DiffusionPipeline.from_pretrained(pipelines["sd"])
    pipe.load_lora_weights(tmp_path / "lora")
    x, t, rows = torch.randn(2, 4, 8, 8), torch.tensor([501, 1]), torch.tensor([0, 2])
    with torch.no_grad():
        policy, reference, loaded = (task.predict(network, x, t, rows) for network in (task.policy, task.reference, pipe.unet))
    torch.testing.assert_close(loaded, policy, atol=1e-6, rtol=1e-5)
    assert (policy - reference).abs().max() > 1e-4


def test_full_training_saves_a_whole_pipeline(pipelines, scorer, tmp_path):
    """--lora 0: OUT/pipeline is a pipeline whose UNet has moved in every matrix, and whose other parts have not; gradient
    checkpointing changes no number."""
    import diffusers
    logs = []
    for more in ((), ("--gradient_checkpointing",)):
        out = tmp_path / f"out{len(more)}"
        assert spo.main(pipeline_argv(pipelines, "sd", out, "--lora", "0", *more)) == 0
        logs.append([row["loss"] for row in lines(out)])
    assert logs[0] == pytest.approx(logs[1], abs=1e-6)
    before, after = (diffusers.DiffusionPipeline.from_pretrained(folder) for folder in (pipelines["sd"], tmp_path / "out0" / "pipeline"))
    old, new = before.unet.state_dict(), after.unet.state_dict()
    assert all(not torch.equal(old[k], new[k]) for k in old if k.endswith("weight") and old[k].ndim > 1)
    for part in ("text_encoder", "vae"):
        assert same_weights(getattr(before, part).state_dict(), getattr(after, part).state_dict())


def test_the_scorer_gets_pictures_prompts_and_the_next_timestep(pipelines, scorer, tmp_path):
    """Decoded pictures in [0, 1], the prompts that they were drawn for, and t of the call that predicted them (0: the picture)."""
    import tiny_scorer
    tiny_scorer.seen.clear()
    assert spo.main(pipeline_argv(pipelines, "sd", tmp_path / "out", "--rounds", "1", "--micro_batch_size", "99")) == 0
    assert [t for *_, t in tiny_scorer.seen] == [201, 1, 0]
    for shape, low, high, prompts, _ in tiny_scorer.seen:
        assert shape == (12, 3, 16, 16) and 0 <= low < high <= 1 and prompts == prompts[:3] * 4 and sorted(prompts[:3]) == sorted(PROMPTS)


def test_more_prompts_than_are_kept_encoded(pipelines, scorer, monkeypatch):
    """The cache of encoded prompts may overflow in the middle of a call: what that call needs is there all the same."""
    task = open_pipeline(pipelines, "sd")
    rows = [torch.tensor(rows) for rows in ([0], [1, 0], [2, 1, 0, 2], [0, 2])]
    wanted = [task.conditions(each) for each in rows]
    monkeypatch.setattr(spo, "KEPT_PROMPTS", 2)
    task.encoded.clear()
    for each, (hidden,) in zip(rows, wanted):
        torch.testing.assert_close(task.conditions(each)[0], hidden)


def test_weights_stored_in_half_precision_are_trained_in_fp32(pipelines, scorer, tmp_path):
    """At lr 1e-5 an fp16 weight would not move."""
    import diffusers
    pipe = diffusers.DiffusionPipeline.from_pretrained(pipelines["sd"])
    pipe.to(torch.float16).save_pretrained(tmp_path / "half")
    task = open_pipeline({"sd": tmp_path / "half"}, "sd", "--lora", "0")
    assert {p.dtype for part in (task.policy, task.reference, task.pipe.vae) for p in part.parameters()} == {torch.float32}


def test_a_pipelines_run_goes_on_to_the_same_bits(pipelines, scorer, tmp_path, capsys):
    """Stopped after its first round; then continued with another micro-batch size; other prompts do not continue it."""
    whole = pipeline_argv(pipelines, "sd", tmp_path / "whole")
    assert spo.main(whole) == 0
    argv = pipeline_argv(pipelines, "sd", tmp_path / "out")
    import tiny_scorer
    original = tiny_scorer.score

    def stop(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_scorer, "score", stop)
        patch.setattr(signal, "SIG_DFL", signal.SIG_IGN)            # the second of its signals would be a kill
        assert spo.main(argv + ["--micro_batch_size", "99"]) == 130
    other = tmp_path / "other.txt"
    other.write_text("something else\n")
    assert spo.main([*argv, "--prompts", str(other)]) == 2 and "content: " in capsys.readouterr().err
    assert spo.main(argv) == 0 and "continuing after round 0" in capsys.readouterr().out
    a, b = (load_file(tmp_path / name / "lora" / "pytorch_lora_weights.safetensors") for name in ("whole", "out"))
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a) and a.keys() == b.keys()


def test_pipelines_that_are_none_of_ours_get_one_line(pipelines, scorer, tmp_path, capsys):
    """Another class, an inpainting UNet, a scheduler that thresholds, a scorer that returns something else, an empty file of prompts."""
    import shutil
    import tiny_scorer

    def changed(file, **fields):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(pipelines["sd"], tmp_path / "copy")
        config = json.loads((tmp_path / "copy" / file).read_text())
        (tmp_path / "copy" / file).write_text(json.dumps(config | fields))
        return ["--pipeline", str(tmp_path / "copy")]

    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    for more, said in ((lambda: changed("model_index.json", _class_name="FluxPipeline"), "_class_name 'FluxPipeline'"),
                       (lambda: changed("unet/config.json", in_channels=9), "in_channels 9 and out_channels 4"),
                       (lambda: changed("scheduler/scheduler_config.json", thresholding=True), "thresholds the predicted x_0"),
                       (lambda: ["--prompts", str(empty)], "holds no prompt"),
                       (lambda: ["--scorer", "tiny_scorer:nothing"], "expected a MODULE:FUNCTION"),
                       (lambda: ["--scorer", "tiny_scorer:wrong"], "expected a tensor of so many scores")):
        tiny_scorer.wrong = lambda *args: 1.0
        assert spo.main(pipeline_argv(pipelines, "sd", tmp_path / "out", "--restart", *more())) == 2
        error = capsys.readouterr().err
        assert said in error and len([line for line in error.splitlines() if line.startswith("error: ")]) == 1, error
