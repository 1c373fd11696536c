"""Small models of each architecture, with a tokenizer, as Hugging Face directories."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from crosschip.data import train_tokenizer
from crosschip.model import ModelConfig, save_model
from tests.model.configs import YARN, random_model

TEXT = ("Twelve apples and 345 pears, don't they grow?\n" * 20, "def f(x):\n    return x ** 2  # größer\n" * 20)
VOCAB = 300
SAME_MSCALE = {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}

DEEPSEEK = ModelConfig(
    vocab_size=VOCAB + 4,  # padded, as models are
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    routed_scaling_factor=2.5,
    first_k_dense_replace=1,
    kv_lora_rank=32,
    q_lora_rank=24,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=24,
    max_position_embeddings=96,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)

LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}

Made = Callable[..., Path]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXT, VOCAB).save(directory)
    return directory


@pytest.fixture
def deepseek(tmp_path: Path, tokenizer_dir: Path) -> Made:
    """A directory of our architecture; keywords change fields."""

    def make(name: str = "deepseek", dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
        directory = tmp_path / name
        save_model(random_model(ModelConfig(**{**vars(DEEPSEEK), **fields})), directory, dtype)
        return with_tokenizer(directory, tokenizer_dir)

    return make


@pytest.fixture
def dense(tmp_path: Path, tokenizer_dir: Path) -> Made:
    """A Llama or Qwen3 directory as transformers writes it; keywords change fields."""
    return lambda kind="llama", **fields: with_tokenizer(save_dense(tmp_path / kind, kind, **fields), tokenizer_dir)


def save_dense(directory: Path, kind: str, **fields: Any) -> Path:
    import transformers

    transformers.logging.set_verbosity_error()
    names = {"llama": "Llama", "qwen3": "Qwen3"}
    config = getattr(transformers, f"{names[kind]}Config")(
        **{
            "vocab_size": VOCAB + 4,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 96,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "initializer_range": 0.1,
            "rms_norm_eps": 1e-5,
            **fields,
        }
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{names[kind]}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms, which are all 1 at first
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(directory)
    return directory


def with_tokenizer(directory: Path, tokenizer_dir: Path) -> Path:
    for file in tokenizer_dir.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory
