"""Counts against the real modules: ours exactly, and transformers' on the meta device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from crosschip.errors import ModelError
from crosschip.model import ModelConfig, Transformer
from crosschip.plan.architecture import Architecture
from crosschip.plan.counts import (
    active_parameters,
    attended_tokens,
    cache_bytes_per_token,
    num_parameters,
    train_flops_per_token,
)
from crosschip.plan.known_architectures import known_architecture, known_architectures, likely_architecture
from crosschip.plan.reading_architectures import architecture_from_hf
from crosschip.train.flops import train_flops_per_token as trained_flops

SMALL = ModelConfig(
    vocab_size=97, hidden_size=48, intermediate_size=80, moe_intermediate_size=24, num_hidden_layers=3,
    num_attention_heads=2, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=10,
)  # fmt: skip


def counted(config: ModelConfig) -> Architecture:
    return architecture_from_hf({**config.to_hf(), "tie_word_embeddings": config.tie_word_embeddings}, "small")


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"q_lora_rank": 16},
        {"num_nextn_predict_layers": 2},
        {"tie_word_embeddings": True},
        {"n_shared_experts": 0},
        {"first_k_dense_replace": 3},
        {"first_k_dense_replace": 0},
        {"attention_bias": True, "q_lora_rank": 16},
        {"attention_bias": True},
    ],
)
def test_parameters_are_those_of_our_modules(change: dict[str, Any]) -> None:
    config = replace(SMALL, **change)
    with torch.device("meta"):
        model = Transformer(config)
    assert num_parameters(counted(config)) == sum(p.numel() for p in model.parameters())


def test_a_miscounted_norm_would_be_seen() -> None:
    with torch.device("meta"):
        model = Transformer(SMALL)
    wrong = replace(counted(SMALL), norms_per_layer=1)
    assert num_parameters(wrong) != sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("change", [{}, {"q_lora_rank": 16}, {"num_nextn_predict_layers": 1}, {"n_shared_experts": 0}])
def test_operations_are_those_that_the_trainer_counts(change: dict[str, Any]) -> None:
    config = replace(SMALL, **change)
    assert train_flops_per_token(counted(config), 64) == pytest.approx(trained_flops(config, 64), rel=1e-12)


def hugging_face(name: str, **sizes: Any) -> tuple[Any, int]:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(**sizes)
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    return config, sum(p.numel() for p in model.parameters())


BASE = {
    "vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("Llama", {}),
        ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("Qwen3", {"head_dim": 24}),
        ("Qwen2", {}),
        ("Qwen3Moe", {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
        (
            "Qwen3Moe",
            {
                "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                "decoder_sparse_step": 2,
            },
        ),
        ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        ("GptOss", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
        (
            "DeepseekV3",
            {
                "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
                "qk_rope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
                "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
            },
        ),
    ],
)  # fmt: skip
def test_parameters_are_those_of_transformers(name: str, more: dict[str, Any]) -> None:
    config, num = hugging_face(name, **{**BASE, **more})
    assert num_parameters(architecture_from_hf(config.to_dict()), with_mtp=False) == num


def test_published_totals() -> None:
    published = {  # billions: total, for one token; the models' own cards and papers, rounded as there
        "Llama 3.1 405B": (405, 405), "DeepSeek-V3": (671, 37), "DeepSeek-V2": (236, 21), "Kimi K2": (1026, 32),
        "Qwen3 235B-A22B": (235, 22), "Mixtral 8x7B": (46.7, 12.9), "DBRX": (132, 36), "GPT-OSS 120B": (117, 5.1),
        "Pangu Ultra MoE 718B": (718, 39), "Llama 4 Maverick": (400, 17),
    }  # fmt: skip
    for name, (total, active) in published.items():
        found = known_architecture(name)
        assert found is not None
        assert num_parameters(found, with_mtp=False) / 1e9 == pytest.approx(total, rel=0.01)
        # Papers leave embeddings in or out of what a token meets.
        assert active_parameters(found) / 1e9 == pytest.approx(active, rel=0.13)


def test_every_known_model_is_found_by_its_own_name() -> None:
    for _, architecture in known_architectures():
        assert known_architecture(architecture.name) == architecture


@pytest.mark.parametrize(("total", "active"), [(7e9, None), (70e9, None), (1e12, None), (30e9, 3e9), (300e9, 47e9)])
def test_a_likely_shape_has_about_the_size(total: float, active: float | None) -> None:
    shape = likely_architecture("unheard of", total, active)
    assert num_parameters(shape) == pytest.approx(total, rel=0.1)
    assert "unheard of" in shape.assumed


def test_attended_tokens_by_counting() -> None:
    found = known_architecture("GPT-OSS 120B")
    assert found is not None
    windowed = sum(min(position + 1, 128) for position in range(1000)) / 1000
    assert attended_tokens(found, 1000) == pytest.approx((windowed + 500.5) / 2)


def test_the_cache_is_the_latent_or_keys_and_values() -> None:
    deepseek, llama = known_architecture("DeepSeek-V3"), known_architecture("Llama 3.1 8B")
    assert deepseek is not None
    assert llama is not None
    assert cache_bytes_per_token(deepseek) == 61 * (512 + 64) * 2
    assert cache_bytes_per_token(llama) == 32 * 2 * 8 * 128 * 2


def test_an_unknown_architecture_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="'mamba' is not counted"):
        architecture_from_hf({"model_type": "mamba"})
    with pytest.raises(ModelError, match="lacks 'hidden_size'"):
        architecture_from_hf({"model_type": "llama"})


LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 100, "num_attention_heads": 4,
    "intermediate_size": 96,
}  # fmt: skip
QWEN = LLAMA | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DEEPSEEK = LLAMA | {
    "model_type": "deepseek_v3", "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    ("document", "change", "words"),
    [
        (LLAMA, {"hidden_size": "4096"}, "hidden_size = '4096', which is no whole number from 1 on"),
        (LLAMA, {"num_attention_heads": 0}, "num_attention_heads = 0"),
        (LLAMA, {"num_hidden_layers": 4.5}, "num_hidden_layers = 4.5"),
        (LLAMA, {"vocab_size": True}, "vocab_size = True"),
        (LLAMA, {"intermediate_size": None}, "lacks 'intermediate_size'"),
        (LLAMA, {"layer_types": 7}, "layer_types = 7, which is no list"),
        (DEEPSEEK, {"q_lora_rank": -1}, "q_lora_rank = -1"),
        (DEEPSEEK, {"n_shared_experts": "two"}, "n_shared_experts = 'two', which is no whole number from 0 on"),
        (DEEPSEEK, {"moe_layer_freq": 2}, "moe_layer_freq = 2: which of its layers are dense is not counted"),
        (QWEN, {"mlp_only_layers": [0, 2]}, r"mlp_only_layers = \[0, 2\]: which of its layers are dense"),
        (QWEN, {"decoder_sparse_step": 0}, "decoder_sparse_step = 0"),
    ],
)
def test_a_damaged_or_uncounted_config_is_refused_by_its_field(
    document: dict[str, Any], change: dict[str, Any], words: str
) -> None:
    assert num_parameters(architecture_from_hf(document)) > 0
    with pytest.raises(ModelError, match=words):
        architecture_from_hf(document | change)
