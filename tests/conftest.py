"""What the tests share: the folder of real checkpoints and data (not part of the project; tests that need it skip where it is absent) and tiny models."""
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT.parent / "shared" / "assets"
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)      # the models here are too small to share out; a second thread would only wait


@pytest.fixture(scope="session")
def assets() -> Path:
    if not ASSETS.is_dir():
        pytest.skip(f"real material is not here ({ASSETS})")
    return ASSETS


TINY = dict(vocab_size=97, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=128, rms_norm_eps=1e-6, bos_token_id=1, eos_token_id=2)


def tiny_config(family: str = "llama", **changes) -> dict:
    return {"model_type": family, "architectures": [{"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral"}[family] + "ForCausalLM"],
            **TINY, **changes}


def tiny_model(seed: int = 0, **changes):
    from model import Config, Llama
    return Llama(Config.from_dict(tiny_config(**changes))).init_weights(seed)


def write_json(path: Path, value) -> Path:
    path.write_text(json.dumps(value))
    return path


def byte_tokenizer(folder: Path):
    """A tokenizer.json of single bytes with <s> = 1 in front and </s> = 2: small, exact on any text, needs no download."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, **{c: i + 3 for i, c in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True})


def tiny_checkpoint(folder: Path, seed: int = 0, **changes) -> Path:
    """A random tiny Llama with the byte tokenizer, as a checkpoint folder."""
    byte_tokenizer(folder)
    tiny_model(seed, **{"vocab_size": 259, "max_position_embeddings": 512, **changes}).save_pretrained(folder)
    return folder


def pair_rows(n: int, seed: int = 0) -> list[dict]:
    """Rows with the columns of Math-Step-DPO-10K, of uneven lengths."""
    import random
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        a, b, c = rng.randint(2, 99), rng.randint(2, 99), rng.randint(2, 9)
        prefix = f"Let's think step by step.\nStep 1: Add the two, {a} + {b} = {a + b}.\nStep 2:" if rng.random() < 0.7 else "Let's think step by step.\nStep 1:"
        good = f" Then {a + b} * {c} = {(a + b) * c}{'.' * rng.randint(1, 9)}"
        bad = f" Then {a + b} * {c} = {(a + b) * c + rng.randint(1, 9)}, I think."
        rows.append(dict(dataset="made up", prompt=f"What is ({a} + {b}) * {c}?", initial_reason_steps=prefix, chosen=good, rejected=bad,
                         full_chosen=good + f"\nThe answer is: {(a + b) * c}", full_rejected=bad + "\nThe answer is: no idea", answer=str((a + b) * c)))
    return rows


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
