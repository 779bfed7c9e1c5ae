"""LoRA: --lora in training, PEFT's files in and out, adapters wherever a checkpoint is taken, and the merge. The oracle is PEFT on transformers' models."""
import importlib
import json
import math
import shutil

import pytest
import torch
from conftest import ROOT, byte_tokenizer, tiny_checkpoint, tiny_model, write_json
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_train import arguments, fails, metrics
from torch.utils._python_dispatch import TorchDispatchMode

import data
import eval as evaluation
import model as models
import stepdpo
from model import LORA_LAYERS, CheckpointError, Llama, LoRA
from variants import prm, scdpo

SHORT = ["--max_steps", "3", "--lora", "4"]
IDS = torch.arange(3, 60)[None]


@pytest.fixture(scope="module")
def trained(work):
    """An adapter of rank 4 of `model`, after three updates of Step-DPO."""
    assert stepdpo.main(arguments(work, "stepdpo", work / "adapter", *SHORT)) == 0
    return work / "adapter"


def adapter(out) -> dict:
    return load_file(out / "adapter_model.safetensors")


def logits(folder, **how) -> torch.Tensor:
    with torch.no_grad():
        return Llama.from_pretrained(folder, **how)(IDS).float()


def peft_and_base(base):
    peft = pytest.importorskip("peft", reason="peft is the oracle of this test")
    import transformers
    return peft, transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def made_by_peft(base, out, seed=0, **config):
    """An adapter with random A and B, saved by PEFT; the logits of PEFT's model."""
    peft, theirs = peft_and_base(base)
    settings = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | config
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    theirs.save_pretrained(out)
    with torch.no_grad():
        return theirs(IDS).logits


# ------------------------------------------------------------------------------------------------------- PEFT's files

def test_peft_loads_what_was_trained_here(work, trained):
    """PeftModel.from_pretrained on OUT gives the logits that this project's model gives, and others than the base model's."""
    peft, theirs = peft_and_base(work / "model")
    theirs = peft.PeftModel.from_pretrained(theirs, trained).eval()
    with torch.no_grad():
        expected = theirs(IDS).logits
    torch.testing.assert_close(logits(trained), expected, atol=1e-5, rtol=0)
    assert (logits(work / "model") - expected).abs().max() > 1e-3
    assert json.loads((trained / "adapter_config.json").read_text())["base_model_name_or_path"] == str(work / "model")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("layers", ["all-linear", ["q_proj", "v_proj"]])
def test_what_peft_trained_loads_here(tmp_path, family, layers):
    """Merged (fp32) and beside the weights; all layers or some; biases, tied embeddings and norms of heads do not disturb. What it has no files for, the
    tokenizer, is the base's."""
    byte_tokenizer(tmp_path / "base")
    tiny_model(family=family, vocab_size=259, head_dim=8, tie_word_embeddings=family == "qwen2").save_pretrained(tmp_path / "base")
    expected = made_by_peft(tmp_path / "base", tmp_path / "out", target_modules=layers)
    torch.testing.assert_close(logits(tmp_path / "out"), expected, atol=1e-5, rtol=0)
    beside = Llama.skeleton(tmp_path / "out")
    beside.add_lora(*beside.adapter.kind).read_weights()
    with torch.no_grad():
        torch.testing.assert_close(beside(IDS), expected, atol=1e-5, rtol=0)
    assert sum(isinstance(m, LoRA) for m in beside.modules()) == 2 * len(LORA_LAYERS if layers == "all-linear" else layers)
    ours, bases = (data.Tokenizer.from_pretrained(tmp_path / name) for name in ("out", "base"))
    assert ours.eos_ids == bases.eos_ids == (2,) and ours.bos_id == 1


REFUSED = {     # of LoraConfig -> what the message names
    "dora": (dict(use_dora=True), "use_dora is True"), "rslora": (dict(use_rslora=True), "use_rslora is True"),
    "bias": (dict(bias="lora_only"), "bias is 'lora_only'"), "head": (dict(target_modules=["q_proj", "lm_head"]), "lm_head."),
    "embedding": (dict(target_modules=["embed_tokens"]), "embed_tokens."),
    "saved": (dict(modules_to_save=["lm_head"]), "modules_to_save is ['lm_head']"),
    "ranks": (dict(rank_pattern={"q_proj": 2}), "rank_pattern is {'q_proj': 2}"),
    "alphas": (dict(alpha_pattern={"q_proj": 2}), "alpha_pattern is {'q_proj': 2}"),
    "layers": (dict(target_modules=["q_proj"], layers_to_transform=[0]), "layers_to_transform is [0]"),
    "pissa": (dict(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
    "parameters": (dict(trainable_token_indices=[1]), "trainable_token_indices")}


@pytest.mark.parametrize("case", REFUSED)
def test_adapters_of_another_kind_are_refused_by_name(work, tmp_path, case):
    """What would be computed wrongly here, as PEFT itself writes it, with the way out."""
    settings, named = REFUSED[case]
    made_by_peft(work / "model", tmp_path, **settings)
    with pytest.raises(CheckpointError) as e:
        Llama.from_pretrained(tmp_path)
    assert named in str(e.value) and "merge the adapter with PEFT" in str(e.value) and "\n" not in str(e.value)


def test_damaged_or_unfitting_adapters_are_named(work, trained, tmp_path):
    """Another method of PEFT, a feature of the future, no base, a base of another shape, half a file, a pickle, a base model beside it."""
    def found(*parts, **how):
        with pytest.raises(CheckpointError) as e:
            Llama.from_pretrained(folder, **how)
        assert all(part in str(e.value) for part in parts), str(e.value)

    folder = tmp_path / "a"
    shutil.copytree(trained, folder)
    config, tensors = json.loads((folder / "adapter_config.json").read_text()), adapter(folder)
    for change, *parts in (({"peft_type": "LOHA"}, "peft_type is 'LOHA'"), ({"use_what_comes": True}, "use_what_comes is True"),
                           ({"base_model_name_or_path": None}, "base_model_name_or_path is None", "--base"), ({"r": 0}, "r is 0"),
                           ({"r": 5}, "they do not belong together"), ({"lora_alpha": "x"}, "lora_alpha is 'x'"),
                           ({"base_model_name_or_path": "/nowhere"}, "the base model", "/nowhere: no such folder", "--base")):
        write_json(folder / "adapter_config.json", config | change)
        found(*parts)
    assert torch.equal(logits(folder, base=work / "model"), logits(trained)), "the last of these, helped by --base"
    write_json(folder / "adapter_config.json", config)
    wide = tiny_checkpoint(tmp_path / "wide", hidden_size=48)
    found("down_proj.lora_B.weight has the shape (32, 4), expected (48, 4)", str(wide), base=wide)
    save_file({}, folder / "adapter_model.safetensors")
    found("has the shape None, expected")
    name = next(iter(tensors))
    save_file({k: w for k, w in tensors.items() if k != name}, folder / "adapter_model.safetensors")
    found(name.removeprefix("base_model.model."), "has the shape None")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    found("adapter_model.safetensors: no such file", "pickle")
    shutil.copy(work / "model" / "model.safetensors", folder)
    found("a model and an adapter")
    folder = work / "model"
    found("is no LoRA adapter", "--base", base=work / "model")


def test_a_base_that_has_changed_is_noticed(work, tmp_path, capsys):
    """A newcomer trains the base model anew, into the same folder: its adapter no longer belongs to it. --base says that it is meant all the same."""
    base, out = tiny_checkpoint(tmp_path / "base"), tmp_path / "out"
    assert stepdpo.main(arguments(work, "sft", out, "--model", str(base), *SHORT)) == 0
    before = logits(out)
    tiny_checkpoint(base, seed=1)
    with pytest.raises(CheckpointError, match="has other weights than when this adapter was trained on it"):
        Llama.from_pretrained(out)
    assert not torch.equal(logits(out, base=base), before)


# ----------------------------------------------------------------------------------------------------------- training

def test_the_twin(work, tmp_path):
    """Three updates of Step-DPO beside PEFT's layers in transformers' model, two rows a pair, a frozen copy as reference, torch's AdamW: losses and adapters
    agree; the first loss is log 2."""
    peft, theirs = peft_and_base(work / "model")
    assert stepdpo.main(arguments(work, "stepdpo", tmp_path, "--lora", "4", "--lora_alpha", "6", "--max_steps", "3", "--schedule", "constant",
                                  "--warmup", "0")) == 0
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM"))
    start = Llama.skeleton(work / "model").add_lora(4, 6).read_weights()
    mine = {f"base_model.model.{k.replace('.weight', '.default.weight')}": p for k, p in start.named_parameters() if ".lora_" in k}
    with torch.no_grad():
        for k, p in theirs.named_parameters():
            if p.requires_grad:
                p.copy_(mine.pop(k))
    assert not mine
    _, reference = peft_and_base(work / "model")
    examples, _ = data.encode_dataset(work / "pairs.jsonl", data.Tokenizer.from_pretrained(work / "model"), "stepdpo", "alpaca", 1024)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)

    def logps(model, example):
        sums = []
        for side, (places, _) in zip(example.sides, example.predicted):
            log_p = model(torch.as_tensor(side)[None].long()).logits[0, :-1].log_softmax(-1)
            sums.append(log_p.gather(1, torch.as_tensor(side)[1:, None].long())[places[0]:].sum())
        return sums

    for step, record in enumerate(metrics(tmp_path)):
        rows = [row for rank in data.epoch_plan(examples, batch_size=8, seed=0, epoch=0)[step] for part in rank for row in part]
        losses = []
        for row in rows:
            (win, lose), (ref_win, ref_lose) = logps(theirs, examples[row]), logps(reference, examples[row])
            losses.append(-torch.nn.functional.logsigmoid(0.4 * (win - ref_win - lose + ref_lose)))
        loss = torch.stack(losses).mean()
        assert record["loss"] == pytest.approx(loss.item(), abs=1e-5)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step(), optimizer.zero_grad()
    assert metrics(tmp_path)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    ours = adapter(tmp_path)
    for k, p in theirs.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(ours.pop(k.replace(".default.", ".")), p.detach(), atol=2e-5, rtol=0)
    assert not ours


class Made(TorchDispatchMode):
    """How many tensors of a shape the operations below it make."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.count += isinstance(out, torch.Tensor) and out.shape == self.shape
        return out


@pytest.mark.parametrize("lora", [False, True])
def test_no_gradient_is_computed_for_what_is_frozen(work, lora):
    """lm_head is the costliest: with LoRA no operation of the backward pass makes a tensor of its shape, without it some do. Only A and B get a gradient."""
    model = Llama.skeleton(work / "model")
    model = (model.add_lora(4, 8) if lora else model).read_weights()
    examples, _ = data.encode_dataset(work / "pairs.jsonl", data.Tokenizer.from_pretrained(work / "model"), "stepdpo", "alpaca", 1024)
    logps = stepdpo.Policy(model)(data.collate(examples, [0, 1]))
    with Made(model.lm_head.weight.shape) as made:
        logps.sum().backward()
    assert (made.count == 0) == lora
    assert all((p.grad is not None) == (".lora_" in name or not lora) for name, p in model.named_parameters())


def test_a_run_keeps_only_the_adapter_and_goes_on_to_the_same_bits(work, trained, tmp_path, monkeypatch):
    """The checkpoint on the way holds A, B and their moments, nothing of the model; continued from it, OUT is bit-identical."""
    def interrupted(run, step, *rest):
        if step == 2:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as m:
        m.setattr(stepdpo, "check", interrupted)
        assert stepdpo.main(arguments(work, "stepdpo", out, *SHORT, "--checkpoint_every", "2")) == 130
    kept = set()
    for path in (out / "checkpoint").glob("step-*/*.safetensors"):
        with safe_open(path, framework="pt") as f:
            kept |= set(f.keys())
    names = {name.removeprefix("base_model.model.") for name in adapter(trained)}
    assert kept == names | {f"{kind}.{name}" for kind in ("exp_avg", "exp_avg_sq") for name in names}
    assert stepdpo.main(arguments(work, "stepdpo", out, *SHORT, "--checkpoint_every", "2")) == 0
    assert metrics(out) == metrics(trained)
    assert (out / "adapter_model.safetensors").read_bytes() == (trained / "adapter_model.safetensors").read_bytes()
    assert {p.name for p in out.iterdir()} == {"adapter_base.json", "adapter_config.json", "adapter_model.safetensors", "generation_config.json",
                                               "metrics.jsonl", "run.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize("more", [[], ["--shard", "--gradient_checkpointing"]])
def test_two_processes_give_what_one_gives(processes, work, trained, tmp_path, more):
    """Replicated and sharded (rank 4 over two, and a base that is cut too): losses, gradient norms and adapters agree but for rounding."""
    processes.run(ROOT / "stepdpo.py", *arguments(work, "stepdpo", tmp_path / "two", *SHORT, *more), world=2)
    for x, y in zip(metrics(tmp_path / "two"), metrics(trained), strict=True):
        assert x == pytest.approx(y, abs=2e-5, rel=2e-5)
    ours = adapter(tmp_path / "two")
    assert ours.keys() == adapter(trained).keys()
    for k, w in adapter(trained).items():
        torch.testing.assert_close(ours[k], w, atol=2e-5, rtol=0)


def test_in_bf16_arithmetic_the_frozen_weights_stay_as_they_are_stored(processes, work, tmp_path):
    """A bf16 checkpoint takes 2 bytes a weight; the numbers are those of the same weights held in fp32, bit for bit; two processes that share it agree."""
    folders = [tmp_path / "bf16", tmp_path / "fp32"]
    for folder in folders:
        shutil.copytree(work / "model", folder)
    Llama.from_pretrained(work / "model").save_pretrained(folders[0], dtype=torch.bfloat16)
    Llama.from_pretrained(folders[0]).save_pretrained(folders[1])
    go = lambda folder: arguments(work, "stepdpo", f"{folder} out", "--model", str(folder), *SHORT, "--precision", "bf16")
    args = stepdpo.parser().parse_args(go(folders[0]))
    stepdpo.settle(args)
    policy = stepdpo.load_policy(folders[0], args, 1, torch.device("cpu"))
    assert {(p.dtype, p.requires_grad) for p in policy.parameters()} == {(torch.bfloat16, False), (torch.float32, True)}
    for folder in folders:
        assert stepdpo.main(go(folder)) == 0
    a, b = (tmp_path / f"{folder.name} out" for folder in folders)
    assert metrics(a) == metrics(b) and all(torch.equal(w, adapter(b)[k]) and w.dtype == torch.float32 for k, w in adapter(a).items())
    processes.run(ROOT / "stepdpo.py", *go(folders[0]), "--out", str(tmp_path / "two"), "--shard", world=2)
    for x, y in zip(metrics(tmp_path / "two"), metrics(a), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], abs=5e-3) and x["grad_norm"] == pytest.approx(y["grad_norm"], rel=0.05)


def test_what_is_not_said_is_ten_times_the_rate_and_twice_the_rank(work, tmp_path, capsys):
    """lr and lora_alpha by default; said explicitly they are the same run; another rank, alpha or no --lora at all is another one."""
    argv = arguments(work, "dpo", tmp_path / "out", "--max_steps", "1", "--lora", "4")
    at = argv.index("--lr")
    del argv[at:at + 2]
    assert stepdpo.main(argv) == 0
    settings = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]
    assert settings["lr"] == pytest.approx(5e-6) and settings["lora_alpha"] == 8
    assert stepdpo.main([*argv, "--lr", str(settings["lr"]), "--lora_alpha", "8"]) == 0 and "is complete" in capsys.readouterr().out
    assert "lora_alpha: 8.0 then, 4.0 now" in fails(capsys, [*argv, "--lora_alpha", "4"])
    assert "lora: 4 then, 2 now" in fails(capsys, [*argv, "--lora", "2"])
    assert "lora: 4 then, None now" in fails(capsys, argv[:-2])


# -------------------------------------------------------------------------------------- an adapter is a checkpoint too

def test_the_next_stage_trains_the_adapter_on(work, tmp_path, capsys):
    """sft --lora, then stepdpo --lora: it begins at the first stage's policy (log 2, and the same log-probs), and ends as one adapter of the same base, which
    PEFT loads. Without --lora all of the merged weights are trained. One of another rank is refused, with the way out."""
    sft, out = tmp_path / "sft", tmp_path / "out"
    assert stepdpo.main(arguments(work, "sft", sft, *SHORT)) == 0
    go = arguments(work, "stepdpo", out, *SHORT, "--model", str(sft))
    assert stepdpo.main(go) == 0
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(work / "model")
    assert stepdpo.main(arguments(work, "stepdpo", tmp_path / "full", "--max_steps", "3", "--model", str(sft))) == 0
    first = [metrics(folder)[0] for folder in (out, tmp_path / "full")]
    assert all(line["loss"] == pytest.approx(math.log(2), abs=1e-6) for line in first)
    assert first[0]["chosen_logps"] == pytest.approx(first[1]["chosen_logps"], abs=1e-3)
    assert not torch.equal(adapter(out)[next(iter(adapter(sft)))], adapter(sft)[next(iter(adapter(sft)))])
    assert load_file(tmp_path / "full" / "model.safetensors").keys() == load_file(work / "model" / "model.safetensors").keys()
    peft, theirs = peft_and_base(work / "model")
    with torch.no_grad():
        expected = peft.PeftModel.from_pretrained(theirs, out).eval()(IDS).logits
    torch.testing.assert_close(logits(out), expected, atol=1e-5, rtol=0)
    for other in (["--lora", "2"], ["--lora_alpha", "4"]):
        error = fails(capsys, [*go, "--out", str(tmp_path / "other"), *other])
        assert "rank 4, alpha 8" in error and f"python model.py merge {sft} --out FOLDER" in error


@pytest.mark.parametrize("name", ["sdpo", "sacpo"])
def test_methods_of_several_stages_train_one_adapter(work, tmp_path, name):
    """The second stage goes on with the first one's adapter, from log 2; both are of the model that the user named."""
    variant = importlib.import_module(f"variants.{name}")
    more = {"sdpo": ["--more_data", str(work / "held.jsonl"), "--kl_samples", "0"], "sacpo": ["--then", str(work / "held.jsonl"), "--merge", "0.5"]}[name]
    assert variant.main(arguments(work, "dpo", tmp_path, "--lora", "2", "--max_steps", "2", *more)) == 0
    for out in (tmp_path / "stage1", tmp_path):
        assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(work / "model")
        assert metrics(out)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert not torch.equal(logits(tmp_path), logits(tmp_path / "stage1"))
    if name == "sacpo":
        assert (tmp_path / "q0.5" / "model.safetensors").exists()


def test_a_full_run_after_a_lora_run_in_one_out(work, tmp_path):
    """--restart without --lora: OUT holds a checkpoint, and nothing is left of the adapter; and the reverse."""
    for more, there, gone in ((["--lora", "2"], "adapter_config.json", "config.json"), ([], "config.json", "adapter_config.json"),
                              (["--lora", "2"], "adapter_config.json", "config.json")):
        assert stepdpo.main(arguments(work, "sft", tmp_path, "--max_steps", "1", "--restart", *more)) == 0
        assert (tmp_path / there).exists() and not (tmp_path / gone).exists() and len(list(tmp_path.glob("*.safetensors"))) == 1


@pytest.mark.parametrize("more", [["--lora", "2"], ["--lora", "2", "--precision", "bf16"], []])
def test_an_adapter_as_reference(work, trained, tmp_path, more):
    """--reference ADAPTER, of another rank than --lora's or beside full training: against the merged model it is log 2, against the base it is not."""
    assert models.main(["merge", str(trained), "--out", str(tmp_path / "merged")]) == 0
    for name, model in (("a", tmp_path / "merged"), ("b", work / "model")):
        out = tmp_path / name
        assert stepdpo.main(arguments(work, "stepdpo", out, "--max_steps", "1", "--model", str(model), "--reference", str(trained), *more)) == 0
        assert (abs(metrics(out)[0]["margin"]) < (3e-2 if "bf16" in more else 1e-4)) == (name == "a")


def test_merged_it_is_a_checkpoint_of_its_own(work, trained, tmp_path, capsys):
    """`python model.py merge`: the same logits, the tokenizer, no trace of the base; in bf16 it says how many weights the adapter moves in vain. An OUT that
    holds something, and a folder that is no adapter, are refused."""
    go = lambda out, *more: models.main(["merge", str(trained), "--out", str(tmp_path / out), *more])
    assert go("fp32") == 0 and go("bf16", "--save_dtype", "bf16") == 0
    torch.testing.assert_close(logits(tmp_path / "fp32"), logits(trained), atol=1e-6, rtol=0)
    assert data.Tokenizer.from_pretrained(tmp_path / "fp32").eos_ids == (2,)
    before, exact, rounded = (load_file(folder / "model.safetensors") for folder in (work / "model", tmp_path / "fp32", tmp_path / "bf16"))
    lost = sum(int(((before[k] != w) & (before[k].bfloat16() == rounded[k])).sum()) for k, w in exact.items())
    assert 0 < lost and f"{lost:,} more (" in capsys.readouterr().out
    assert go("fp32") == 2 and "holds config.json already" in capsys.readouterr().err
    assert models.main(["merge", str(work / "model"), "--out", str(tmp_path / "new")]) == 2 and "nothing to merge" in capsys.readouterr().err


def test_in_half_precision_it_stays_beside_the_weights(work, trained):
    """What the adapter adds to a weight is there to a percent, ten times nearer than in a merged bf16 weight. In fp32 it is merged."""
    name = "model.layers.0.mlp.up_proj"
    beside, merged, base = (Llama.from_pretrained(folder, dtype=dtype).get_submodule(name) for folder, dtype in
                            ((trained, torch.bfloat16), (trained, torch.float32), (work / "model", torch.float32)))
    assert isinstance(beside, LoRA) and not isinstance(merged, LoRA)
    with torch.no_grad():
        change = merged.weight - base.weight
        there = beside.scale * beside.lora_B.weight.float() @ beside.lora_A.weight.float()
        rounded = merged.weight.bfloat16().float() - base.weight.bfloat16().float()
    error = (there - change).norm()
    assert error < 0.01 * change.norm() and error < 0.1 * (rounded - change).norm()


def test_it_is_scored_sampled_and_averaged_like_any_other(work, trained, tmp_path):
    """`stepdpo.log_probs`, `eval.Sampler` and `average_checkpoints` give of the adapter what they give of the merged checkpoint; a fingerprint counts
    the base's weights, alpha and the adapter's own."""
    assert models.main(["merge", str(trained), "--out", str(tmp_path / "merged")]) == 0
    rows = [row for _, row in data.read_rows(work / "held.jsonl")]
    a, b = (stepdpo.log_probs(folder, rows, "stepdpo", "alpaca") for folder in (trained, tmp_path / "merged"))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    samplers = [evaluation.Sampler(folder, prompt="alpaca", device="cpu") for folder in (trained, tmp_path / "merged")]
    assert samplers[0].stop_ids == samplers[1].stop_ids
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(samplers[0].model.parameters(), samplers[1].model.parameters(), strict=True))
    for folder in (trained, tmp_path / "merged"):
        models.average_checkpoints([folder, work / "model"], [0.5, 0.5], tmp_path / f"average {folder.name}")
    x, y = (load_file(tmp_path / f"average {name}" / "model.safetensors") for name in (trained.name, "merged"))
    assert all(torch.allclose(w, y[k], atol=1e-6) for k, w in x.items())
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    prints = {models.fingerprint(trained), models.fingerprint(tmp_path / "merged"), models.fingerprint(copy, tiny_checkpoint(tmp_path / "x", seed=9))}
    assert models.fingerprint(copy) in prints
    config = json.loads((copy / "adapter_config.json").read_text())
    write_json(copy / "adapter_config.json", config | {"lora_alpha": 9})
    assert len(prints | {models.fingerprint(copy)}) == 4


def test_the_siblings_take_an_adapter_whose_base_has_moved(work, trained, tmp_path):
    """--base reaches what SCDPO's credit and a process reward model read; without it the error names the adapter."""
    shutil.copytree(trained, tmp_path / "moved")
    settings = json.loads((trained / "adapter_config.json").read_text())
    write_json(tmp_path / "moved" / "adapter_config.json", settings | {"base_model_name_or_path": "/nowhere"})
    solutions = [("2 + 3?", "Step 1: 2 + 3 = 5.\nStep 2: So it is 5.")]
    there = scdpo.credit(trained, work / "model", solutions, prompt="alpaca")
    assert scdpo.credit(tmp_path / "moved", work / "model", solutions, prompt="alpaca", base=work / "model") == there
    asked = lambda folder, **how: (judge := prm.PRM(folder, "alpaca", **how)).scores([judge.read("row", *solutions[0][:1], [solutions[0][1]])])
    assert asked(tmp_path / "moved", base=work / "model") == asked(trained)
    for call in (lambda: scdpo.credit(tmp_path / "moved", work / "model", solutions, prompt="alpaca"), lambda: asked(tmp_path / "moved")):
        with pytest.raises(CheckpointError, match="/nowhere.*--base"):
            call()


def test_others_stop_where_the_adapter_learned_to(work, tmp_path):
    """SFT on a chat whose turns end otherwise than the base's texts: OUT names the learned end, and who loads or merges it stops there."""
    base = tiny_checkpoint(tmp_path / "base")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}<pad>{% endfor %}"
    write_json(base / "tokenizer_config.json", settings | {"chat_template": template})
    out, merged = tmp_path / "out", tmp_path / "merged"
    assert stepdpo.main(arguments(work, "sft", out, "--model", str(base), "--prompt", "chat", "--max_steps", "1", "--lora", "2")) == 0
    assert models.main(["merge", str(out), "--out", str(merged)]) == 0
    for folder in (out, merged):
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
        assert set(data.Tokenizer.from_pretrained(folder).eos_ids) == {2, 0}


def test_mistakes_of_a_newcomer_end_in_one_line(work, trained, tmp_path, capsys):
    """What was wrong and what to do, before anything is written."""
    argv = arguments(work, "stepdpo", tmp_path / "out", "--max_steps", "1")
    assert "--lora is 0: expected a number above 0" in fails(capsys, [*argv, "--lora", "0"])
    assert "give its rank with --lora R" in fails(capsys, [*argv, "--lora_alpha", "8"])
    assert "--lora 33: a rank above the model's hidden_size 32" in fails(capsys, [*argv, "--lora", "33"])
    assert "is no LoRA adapter" in fails(capsys, [*argv, "--base", str(work / "model")])
    assert not (tmp_path / "out").exists()


def test_the_base_of_an_adapter_is_not_overwritten(work, tmp_path, capsys):
    """--out names the folder of the model that --model is an adapter of, with --restart: as the adapter's own file says, or --base."""
    full, out = tmp_path / "full", tmp_path / "adapter"
    assert stepdpo.main(arguments(work, "sft", full, "--max_steps", "1")) == 0
    assert stepdpo.main(arguments(work, "stepdpo", out, *SHORT, "--model", str(full))) == 0
    argv = arguments(work, "stepdpo", full, *SHORT, "--model", str(out), "--restart")
    assert "is read from it" in fails(capsys, argv) and "is read from it" in fails(capsys, [*argv, "--base", str(full)])


def test_a_new_adapter_changes_nothing_and_comes_from_the_seed(work):
    """At step 0 the model is the base, bit for bit; the same seed draws the same adapter, another one another."""
    def drawn(seed):
        return Llama.skeleton(work / "model").add_lora(4, 8).read_weights(seed=seed)
    with torch.no_grad():
        assert torch.equal(drawn(0)(IDS), logits(work / "model"))
    first, again, other = ([p for n, p in drawn(seed).named_parameters() if ".lora_" in n] for seed in (0, 0, 1))
    assert all(map(torch.equal, first, again)) and not all(map(torch.equal, first, other))
