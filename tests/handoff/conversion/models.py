"""Tiny models in every form that can be a source."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from crosschip.model import ModelConfig, Transformer
from crosschip.model.weights import DCP_DIRECTORY, MODEL_PREFIX, own_tensors
from crosschip.rundir import write_json

SQUARE = ModelConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=64,  # square experts: a transposed one still has the right shape
    num_hidden_layers=2,
    num_nextn_predict_layers=1,
    num_attention_heads=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    kv_lora_rank=32,
    q_lora_rank=24,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=16,
    max_position_embeddings=130,
)

FAMILY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


class MemorySource:
    """Tensors that are in memory already, as a source."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def save_training_checkpoint(model: Transformer, directory: Path) -> Path:
    """What training saves of a model, without the optimizer."""
    import torch.distributed.checkpoint as dcp

    state = {f"{MODEL_PREFIX}{name}": tensor for name, tensor in own_tensors(model).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=directory / DCP_DIRECTORY, no_dist=True)
    write_json(directory / "config.json", model.config.to_hf())
    if model.config.tie_word_embeddings:
        write_json(directory / "config.json", {**model.config.to_hf(), "tie_word_embeddings": True})
    return directory


def save_family(family: str, directory: Path, *, dtype: torch.dtype = torch.float32, tied: bool = False) -> Path:
    """A model of another architecture as transformers writes it."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    kind = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}[family]
    extra = {"head_dim": 16} if family == "qwen3" else {}
    config = kind(**FAMILY, **extra, tie_word_embeddings=tied)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.to(dtype).save_pretrained(directory)
    return directory
