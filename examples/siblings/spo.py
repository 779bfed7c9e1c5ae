"""SPO on drawn shapes: does judging single denoising steps do what the paper says, and is it the step-aware
judge that does it?

    python -m examples.siblings --method spo --out DIR --seeds 0,1,2,3,4

One seed: a small diffusion model and two preference models, one that knows the timestep and one that does
not, are trained from scratch (variants/spo.py, "the embedded task"). All arms start from the same diffusion
model and take the same number of rounds, pairs and updates, the same sampler, and (but for the control) the
same preference model. What is reported is the true reward, which no arm has seen, on fresh noise.

Settings were chosen on seed 100 with larger networks, then made smaller without looking again; --dev draws
the noise that pictures are scored on from another stream. """
import json
import math
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import data
import stepdpo
from examples.arithmetic import over_seeds
from examples.siblings import Arm, plus_minus
from variants import spo


@dataclass(frozen=True)
class Plan:
    """How much of everything."""
    networks: spo.Size = spo.Size()
    rounds: int = 10
    prompts: int = 16               # trajectories a round
    pairs: int = 128                # of each round, drawn from all that it gave
    batch: int = 64                 # pairs an update
    lr: float = 2e-5
    pictures: int = 128             # that an arm is scored on
    curve: tuple = (2, 4, 7, 10)    # rounds after which an arm is scored
    trajectories: int = 48          # for the two claims about labels
    completions: int = 2            # of each side of a pair


QUICK = Plan(spo.Size(base=40, preference=20, batch=16), rounds=2, prompts=4, pairs=16, batch=8, pictures=24,
             curve=(1, 2), trajectories=6, completions=1)

ARMS = {
    "base": Arm("before training", "Where all others start from."),
    "spo": Arm("SPO", "The paper's: pairs from a shared x_t, judged at t; goes on from a candidate drawn "
               "uniformly.", ("base", "trajectory", "trajectory_3")),
    "trajectory": Arm("trajectory labels", "Diffusion-DPO's labels: best and worst of four whole "
                      "trajectories, each step gets the label of the final picture.", ("base",)),
    "trajectory_3": Arm("trajectory labels, 3 x lr", "The same with three times the learning rate: in case "
                        "SPO's suits it badly.", ("base",)),
    "winner": Arm("SPO, goes on from the winner", "The paper's ablation; there the worst (3.963 against "
                  "5.887).", ("spo",)),
    "loser": Arm("SPO, goes on from the loser", "The paper's ablation; there in between (5.338).", ("spo",)),
    "blind": Arm("SPO, judge without t", "Control: a preference model trained alike that is not told t. As "
                 "good as SPO would mean that being step-aware is not what helps.", ("spo",)),
    "random": Arm("SPO, random labels", "Control: SPO's own pairs, a coin says which side won. Any gain here "
                  "would not come from preferences.", ("base",)),
}
COLUMNS = {     # what is measured on pictures -> heading, format
    "detail": ("detail", ".3f"), "layout": ("layout", ".3f"), "light": ("light", ".2f"),
    "quarters": ("quarters", ".2f"), "hues": ("hues", ".2f"), "kl": ("KL", ".1f")}


# ----------------------------------------------------------------------------------------------------------
# arms

class Collect:
    """Makes a round's pairs for one arm, and keeps `count` of them. `round` is set before each."""

    def __init__(self, arm: str, task: spo.Shapes, plan: Plan, seed: int):
        self.arm, self.task, self.plan, self.seed, self.round = arm, task, plan, seed, 0

    def __call__(self, denoise, score, sampler, noise, **how) -> spo.Pairs:
        if self.arm.startswith("trajectory"):
            starts = [self.noise(("trajectory", k), noise) for k in range(len(noise.steps[-1]))]
            pairs = trajectory_pairs(denoise, score, sampler, starts, how["first_steps"], how["threshold"])
        else:
            go_on = {"winner": lambda drawn, win, lose: win,
                     "loser": lambda drawn, win, lose: lose}.get(self.arm, spo.uniform)
            pairs = spo.sample_pairs(denoise, score, sampler, noise, go_on=go_on, **how)
        g = spo.generator_of(self.seed, self.round, "experiment")
        if self.arm == "random":
            coin = torch.randint(2, pairs.kept.shape, generator=g).bool()
            coin = coin.view(*coin.shape, 1, 1, 1, 1)
            pairs = pairs._replace(x_prev=torch.where(coin, pairs.x_prev.flip(2), pairs.x_prev))
        order = torch.rand(pairs.kept.shape, generator=g) * pairs.kept          # those not kept: 0, the last
        least = order.flatten().sort(descending=True).values[self.plan.pairs - 1]
        return pairs._replace(kept=pairs.kept & (order >= least))

    def noise(self, key, like: spo.Noise) -> spo.Noise:
        """Another trajectory's noise."""
        steps, count = len(like.steps), like.start.shape[0]
        return spo.draw_noise((self.seed, self.round, *key), list(range(count)), self.task.shape,
                              like.start.device, steps=steps, first_steps=steps, inner_steps=1, candidates=1)


@torch.no_grad()
def trajectory_pairs(denoise, score, sampler, noises: list, first_steps: int, threshold: float) -> spo.Pairs:
    """Diffusion-DPO's labels on the same sampler: K whole trajectories a prompt, best and worst by the
    preference score of the final picture, which becomes the label of every step."""
    x, path = torch.stack([noise.start for noise in noises]), []                        # (K, B, *D)
    for i, t in enumerate(sampler.timesteps):
        _, mean, sigma = sampler.step(x, denoise(x, t), t)
        following = mean + sigma * torch.cat([noise.steps[i] for noise in noises])
        path.append((t, x, following))
        x = following
    scores = score(x, 0)
    win, lose, kept = spo.choose_pair(scores, threshold)
    sides = lambda x: torch.stack([spo.pick(x, win), spo.pick(x, lose)], 1)             # (B, 2, *D)
    at, before, after = zip(*path[first_steps:])
    return spo.Pairs(torch.tensor(at), torch.stack([sides(x) for x in before]),
                     torch.stack([sides(x) for x in after]), kept.expand(len(at), -1).clone(), scores[None])


def train_arm(arm: str, tasks: dict, folder: Path, plan: Plan, seed: int, key: str, base: dict) -> dict:
    """Train one arm, scored on the way: what it ends with, and the whole curve, which begins at `base`."""
    task = tasks["blind" if arm == "blind" else "preference"]
    task.policy.load_state_dict(task.reference.state_dict())
    out = folder / arm
    out.mkdir(parents=True, exist_ok=True)
    curve = out / "eval.jsonl"
    if not (out / "policy.safetensors").exists():
        stepdpo.keep_lines(curve, 10**9)                    # a kill may have cut the last line
        lr = plan.lr * (3 if arm == "trajectory_3" else 1)
        args = spo.arguments().parse_args(
            ["--out", str(out), "--seed", str(seed), "--threshold", "0", "--rounds", str(plan.rounds),
             "--prompts_per_round", str(plan.prompts), "--batch_size", str(plan.batch), "--lr", str(lr)])
        spo.settle(args, "shapes", task.shape, task.prompts)
        collect = Collect(arm, task, plan, seed)

        def watch(round: int):
            collect.round = round
            seen = [row["step"] for row in data_rows(curve)]
            if round in plan.curve and round not in seen:
                stepdpo.append(curve, {"step": round, **measure(task, task.policy, plan.pictures, key)})

        print(f"\n{ARMS[arm].title}, seed {seed}")
        if spo.train(args, task, out, collect=collect, watch=watch):
            raise KeyboardInterrupt
        spo.save_weights(task.policy, out / "policy.safetensors")
    task.policy.load_state_dict(spo.load_file(out / "policy.safetensors"))
    points = [{"step": 0, **base}, *data_rows(curve)]
    return {**measure(task, task.policy, plan.pictures, key), "curve": points}


def data_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ----------------------------------------------------------------------------------------------------------
# what is measured

@torch.no_grad()
def measure(task: spo.Shapes, network, count: int, key: str) -> dict:
    """The true reward's two parts, diversity, and how far the policy has gone from the reference.

    light: brightness of a picture, 1 that of a drawn one: contrast may also be had by less haze, or by
    fading. quarters: effective number of quarters that shapes stand in, exp(entropy), at most 4. hues: 1 -
    |mean of e^(i hue)|, 1 where all hues are alike frequent. kl: KL(policy || reference) of a whole picture,
    in nats: the sum over the steps of |difference of the means|^2 / 2 sigma^2, along the policy's samples."""
    steps, kinds = task.sampler.timesteps, torch.arange(count) % len(spo.KINDS)
    noise = spo.draw_noise((key,), range(count), task.shape, task.device, steps=len(steps),
                           first_steps=len(steps), inner_steps=1, candidates=1)
    x, kl = noise.start, 0
    for t, z in zip(steps, noise.steps):
        times = torch.full_like(kinds, t)
        _, mean, sigma = task.sampler.step(x, network(x, times, kinds), t)
        _, ref_mean, _ = task.sampler.step(x, task.reference(x, times, kinds), t)
        kl = kl + ((mean - ref_mean)**2 / (2 * sigma**2)).flatten(1).sum(1)
        x = mean + sigma * z[0]
    shares = quarter_of(x).bincount(minlength=4) / count
    drawn = spo.draw_shapes(torch.arange(999) % len(spo.KINDS), spo.generator_of("drawn"))
    parts = {"detail": spo.detail(x).mean().item(), "layout": spo.layout(x).mean().item(),
             "light": (spo.brightness(x).mean() / spo.brightness(drawn).mean()).item(),
             "quarters": torch.special.entr(shares).sum().exp().item(),
             "hues": 1 - hue_of(x).exp().mean().abs().item(), "kl": kl.mean().item()}
    return parts


def centre_of(pictures):
    """(N, 2): where the shape stands, row and column in pixels."""
    light = (spo.brightness(pictures) - 0.05).clamp(min=0)
    pixels = torch.arange(spo.SIZE).float()
    mass = light.sum((1, 2)) + 1e-3
    return torch.stack([light.sum(2) @ pixels, light.sum(1) @ pixels], 1) / mass[:, None]


def quarter_of(pictures):
    return (centre_of(pictures) > 7.5).long() @ torch.tensor([2, 1])


def hue_of(pictures):
    """(N,) complex: i times the hue's angle."""
    rgb = ((pictures + 1) / 2).clamp(min=0).sum((2, 3))
    angles = 2 * math.pi * torch.arange(3) / 3
    return 1j * torch.atan2(rgb @ angles.sin(), rgb @ angles.cos())


@torch.no_grad()
def about_labels(tasks: dict, plan: Plan, seed: int, key: str) -> dict:
    """Claims (i) and (ii), on the diffusion model before training. Each side of a pair is completed to
    pictures, several times, both sides with the same noise.

    moved: pixels from one side's shape to the other's. agreement: how often the side that the step's label
    prefers is the one whose pictures have the higher true reward on average."""
    task, found = tasks["preference"], {}
    rows = torch.arange(plan.trajectories) % len(spo.KINDS)
    network = task.reference
    run = lambda x, t: network(x.flatten(0, 1), torch.full((x.shape[0] * x.shape[1],), t),
                               rows.repeat(len(x))).view_as(x)
    how = dict(first_steps=4, inner_steps=1)
    steps = task.sampler.timesteps
    noise = spo.draw_noise((seed, key, "labels"), range(plan.trajectories), task.shape, task.device,
                           steps=len(steps), candidates=4, **how)
    ends = [spo.draw_noise((seed, key, "completion", i), range(plan.trajectories), task.shape, task.device,
                           steps=len(steps), candidates=1, first_steps=len(steps), inner_steps=1)
            for i in range(plan.completions)]

    def complete(sides, begin, end):                    # (B, 2, *D) at steps[begin] -> pictures
        x = sides.transpose(0, 1)                       # (2, B, *D)
        for i in range(begin, len(steps)):
            _, mean, sigma = task.sampler.step(x, run(x, steps[i]), steps[i])
            x = mean + sigma * end.steps[i]
        return x.flatten(0, 1)

    for name, judge in tasks.items():
        score = lambda x, t: judge.score(x.flatten(0, 1), rows.repeat(len(x)), t).view(x.shape[:2])
        pairs = spo.sample_pairs(run, score, task.sampler, noise, **how)
        moved, agreement, of_detail = [], [], []
        for m in range(len(pairs.t)):
            pictures = [complete(pairs.x_prev[m], how["first_steps"] + m + 1, end) for end in ends]
            centres = [centre_of(x).view(2, -1, 2) for x in pictures]
            moved.append(torch.stack([(c[0] - c[1]).norm(dim=1) for c in centres]).mean().item())
            gap = lambda part: torch.stack([part(x).view(2, -1) for x in pictures]).mean(0).diff(dim=0)[0]
            agreement.append((gap(spo.reward) < 0).float().mean().item())
            of_detail.append((gap(spo.detail) < 0).float().mean().item())
        found[name] = {"t": pairs.t.tolist(), "moved": moved, "agreement": agreement, "detail": of_detail}

    # two whole trajectories: how far apart, and is their order at t their order at the end?
    score = lambda x, t: task.score(x.flatten(0, 1), rows.repeat(len(x)), t).view(x.shape[:2])
    collect = Collect("trajectory", task, plan, seed)
    collect.round = f"labels {key}"
    both = [collect.noise((k,), noise) for k in range(2)]
    x, order = torch.stack([z.start for z in both]), []
    for i, t in enumerate(steps):
        output = run(x, t)
        x_0, mean, sigma = task.sampler.step(x, output, t)
        order.append(score(x_0, t).diff(dim=0)[0])
        x = mean + sigma * torch.cat([z.steps[i] for z in both])
    final = spo.reward(x.flatten(0, 1)).view(2, -1).diff(dim=0)[0]
    centres = centre_of(x.flatten(0, 1)).view(2, -1, 2)
    found["two trajectories"] = {
        "t": steps, "agreement": [((o > 0) == (final > 0)).float().mean().item() for o in order],
        "moved": (centres[0] - centres[1]).norm(dim=1).mean().item()}
    return found


# ----------------------------------------------------------------------------------------------------------
# all seeds, and the table

def run_seed(folder: Path, plan: Plan, seed: int, key: str) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {**vars(plan), "networks": vars(plan.networks)}
    settings = json.loads(json.dumps({"plan": sizes, "scored_on": key}))
    kept = folder / "settings.json"
    if kept.exists() and json.loads(kept.read_text()) != settings:
        raise data.DataError(f"{folder}: holds an experiment with other settings (--quick, --dev, or another "
                             "version); choose another --out")
    stepdpo.write_json(kept, settings)
    tasks = {name: spo.Shapes(folder, seed, size=plan.networks, blind=name == "blind")
             for name in ("preference", "blind")}
    labels = folder / "labels.json"
    if not labels.exists():
        stepdpo.write_json(labels, about_labels(tasks, plan, seed, key))
    base = measure(tasks["preference"], tasks["preference"].reference, plan.pictures, key)
    arms = {arm: train_arm(arm, tasks, folder, plan, seed, key, base) for arm in ARMS if arm != "base"}
    return {"arms": {"base": base, **arms}, "labels": json.loads(labels.read_text())}


def difference(runs: list[dict], a: str, b: str, name: str) -> dict:
    """Arm `a` against arm `b` by seed, in one of the measures; holds where the t interval leaves out 0."""
    values = [run["arms"][a][name] - run["arms"][b][name] for run in runs]
    mean, half = over_seeds(values)
    return {"a": a, "b": b, "measure": name, "difference": mean, "half_interval_over_seeds": half,
            "per_seed": values, "holds": half is not None and abs(mean) > half}


def table(runs: list[dict]) -> tuple[dict, str]:
    """results.json's arms and comparisons, and the table as text."""
    wide = 2 + max(len(arm.title) for arm in ARMS.values())
    lines = [" " * wide + "".join(f"{heading:>18}" for heading, _ in COLUMNS.values())]
    summary, comparisons = {}, []
    for name, arm in ARMS.items():
        values = {key: [run["arms"][name][key] for run in runs] for key in COLUMNS}
        summary[name] = {"title": arm.title} | values
        lines.append(f"{arm.title:<{wide}}" + "".join(f"{plus_minus(values[key], shape):>18}"
                                                     for key, (_, shape) in COLUMNS.items()))
        lines.append(f"    {arm.about}")
        for other in arm.against:
            said = []
            for key in ("detail", "layout", "light", "quarters"):
                test = difference(runs, name, other, key)
                comparisons.append(test)
                half = test["half_interval_over_seeds"]
                half = f" +- {half:.3f}" if half is not None else ""
                verdict = "" if test["holds"] else " (within noise)"
                said.append(f"{key} {test['difference']:+.3f}{half}{verdict}")
            lines.append(f"    against {ARMS[other].title}: {', '.join(said)}")
    return {"arms": summary, "comparisons": comparisons}, "\n".join(lines)


def curves(runs: list[dict], plan: Plan) -> str:
    """Claim (iii): detail after so many updates."""
    rounds = [row["step"] for row in runs[0]["arms"]["spo"]["curve"]]
    wide = 2 + max(len(arm.title) for arm in ARMS.values())
    updates = [f"{round * math.ceil(plan.pairs / plan.batch):>16}" for round in rounds]
    lines = [f"{'detail after updates:':<{wide}}" + "".join(updates)]
    for name, arm in ARMS.items():
        if name != "base":
            points = zip(*([row["detail"] for row in run["arms"][name]["curve"]] for run in runs))
            cells = "".join(f"{plus_minus(list(v), '.3f'):>16}" for v in points)
            lines.append(f"{arm.title:<{wide}}{cells}")
    return "\n".join(lines)


def at_equal_kl(runs: list[dict]) -> str:
    """Whether SPO is merely further away: its detail where its curve has the KL that trajectory labels end
    with. (Between two points the curve is taken as straight.)"""
    lines = []
    for arm in ("trajectory", "trajectory_3"):
        gains = []
        for run in runs:
            curve, other = run["arms"]["spo"]["curve"], run["arms"][arm]
            for before, after in zip(curve, curve[1:]):
                if before["kl"] <= other["kl"] <= after["kl"]:
                    share = (other["kl"] - before["kl"]) / (after["kl"] - before["kl"])
                    there = before["detail"] + share * (after["detail"] - before["detail"])
                    gains.append(there - other["detail"])
                    break
        said = "the curves do not meet"
        if gains:
            said = f"{plus_minus(gains, '+.3f')} ({len(gains)} of {len(runs)} seeds)"
        lines.append(f"detail of SPO at the KL where {ARMS[arm].title} end, against them: {said}")
    return "\n".join(lines)


def labels_table(runs: list[dict]) -> str:
    """Claims (i) and (ii), by timestep."""
    both = [run["labels"] for run in runs]
    at = both[0]["preference"]["t"]
    whole = both[0]["two trajectories"]["t"]
    lines = [f"{'t':>5}{'moved, pixels':>18}{'label right':>18}{'without t':>18}{'two trajectories':>20}"]
    for m in range(0, len(at), max(1, len(at) // 8)):
        cells = [plus_minus([run["preference"]["moved"][m] for run in both], ".2f"),
                 plus_minus([run["preference"]["agreement"][m] for run in both], ".2f"),
                 plus_minus([run["blind"]["agreement"][m] for run in both], ".2f")]
        order = plus_minus([run["two trajectories"]["agreement"][whole.index(at[m])] for run in both], ".2f")
        lines.append(f"{at[m]:>5}" + "".join(f"{cell:>18}" for cell in cells) + f"{order:>20}")
    apart = plus_minus([run["two trajectories"]["moved"] for run in both], ".2f")
    return "\n".join(lines) + f"""
moved: from one side's shape to the other's, once both are completed with the same noise; two whole
trajectories are {apart} pixels apart. label right: the side that the judge prefers at t has the higher true
reward at the end, on average over completions; chance is 0.5. two trajectories: their order at t, by the
judge, is that of their final true reward, which trajectory labels take for granted."""


def run(args) -> int:
    """All seeds, the tables, DIR/spo/results.json and DIR/spo/sheet.png."""
    if args.start is not None:
        raise data.DataError("--start: SPO begins with no language model; leave it out")
    torch.set_num_threads(1)            # networks this small gain little from a second thread
    plan, begun, key = QUICK if args.quick else Plan(), time.perf_counter(), "dev" if args.dev else "test"
    root = args.out / "spo"
    runs = [run_seed(root / f"seed{seed}", plan, seed, key) for seed in args.seeds]
    seconds, seeds = time.perf_counter() - begun, ", ".join(map(str, args.seeds))
    summary, text = table(runs)
    extra = {"curves": curves(runs, plan), "equal_kl": at_equal_kl(runs), "labels": labels_table(runs)}
    print(f"""
spo: {plan.pictures} pictures an arm from fresh {key} noise, true reward; seeds {seeds}; {plan.rounds} rounds,
{plan.pairs} pairs and {math.ceil(plan.pairs / plan.batch)} updates a round in every arm.
Mean over the seeds +- half of the 95 % t interval.

detail: contrast of the stripes, 0 to 1. layout: how high the shape stands, 0 to 1. light: brightness of a
picture, 1 that of a drawn one. quarters: effective number of quarters in use, at most 4. hues: spread of the
colours, 0 to 1. KL: from the model before training, nats a picture.

{text}

{extra['curves']}
{extra['equal_kl']}

{extra['labels']}
""")
    draw_sheet(root, args.seeds[0], plan)
    stepdpo.write_json(root / "results.json", {
        **summary, **extra, "runs": runs, "seeds": args.seeds, "scored_on": key, "quick": args.quick,
        "plan": {**vars(plan), "networks": vars(plan.networks)}, "seconds": round(seconds, 1),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}})
    print(f"{root / 'results.json'}; {seconds:.0f} s")
    return 0


def draw_sheet(root: Path, seed: int, plan: Plan):
    """Pictures from the same noise: before, SPO, trajectory labels."""
    task = spo.Shapes(root / f"seed{seed}", seed, size=plan.networks)
    blocks = [task.sample(task.reference, 60, "sheet")]
    for arm in ("spo", "trajectory"):
        task.policy.load_state_dict(spo.load_file(root / f"seed{seed}" / arm / "policy.safetensors"))
        blocks.append(task.sample(task.policy, 60, "sheet"))
    spo.contact_sheet(torch.stack([x.view(10, 6, *task.shape) for x in blocks]), root / "sheet.png")
    print(f"{root / 'sheet.png'}: from the same noise, before training, after SPO, after trajectory labels")
