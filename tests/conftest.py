"""What the tests share: the folder of real checkpoints and data (not part of the project; tests that need it skip where it is absent) and tiny models."""
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT.parent / "shared" / "assets"
sys.path.insert(0, str(ROOT))
torch.set_num_threads(2)


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
