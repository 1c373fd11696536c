"""Architectures from a recipe's `[model]` table and from a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crosschip.errors import ModelError
from crosschip.plan.architecture import Architecture, Experts, GroupedQueryAttention, LatentAttention
from crosschip.recipe import ModelSettings
from crosschip.rundir import read_json

__all__ = ["architecture_from_directory", "architecture_from_hf", "architecture_from_settings"]

_LATENT = ("deepseek_v2", "deepseek_v3", "kimi_k2")
_DENSE = ("llama", "mistral", "qwen2", "qwen3")
_MOE = ("mixtral", "qwen3_moe", "gpt_oss", "glm4_moe")


def architecture_from_settings(settings: ModelSettings, vocab_size: int, name: str = "") -> Architecture:
    """What a recipe's `[model]` table describes; without `directory`, which has its own `config.json`."""
    document = settings.model_dump(exclude={"directory"})
    return architecture_from_hf({**document, "vocab_size": vocab_size, "model_type": "deepseek_v3"}, name or "recipe")


def architecture_from_directory(directory: Path) -> Architecture:
    """The architecture of a published model directory.

    Raises:
        ModelError: no `config.json`, or one of an architecture that is not counted here.
    """
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory} has no config.json", "give a model directory as Hugging Face publishes them")
    document = read_json(directory / "config.json")
    if not isinstance(document, dict):
        raise ModelError(f"{directory / 'config.json'} is not a JSON object", "download it again")
    return architecture_from_hf(document, directory.name)


def architecture_from_hf(document: Mapping[str, Any], name: str = "") -> Architecture:
    """Read a `config.json`.

    Raises:
        ModelError: a `model_type` that is not counted here, or a width that is missing.
    """
    kind = document.get("model_type", "")
    if kind not in (*_LATENT, *_DENSE, *_MOE):
        known = ", ".join(sorted((*_LATENT, *_DENSE, *_MOE)))
        raise ModelError(f"model_type {kind!r} is not counted by the planner", f"these are: {known}")
    try:
        latent = kind in _LATENT
        return Architecture(
            name=name or str(kind),
            hidden_size=document["hidden_size"],
            num_layers=document["num_hidden_layers"],
            vocab_size=document["vocab_size"],
            attention=_latent(document) if latent else _grouped(document, kind),
            intermediate_size=document.get("intermediate_size") or 0,
            mlp_bias=bool(document.get("mlp_bias")),
            experts=_deepseek_experts(document) if latent else _plain_experts(document, kind),
            num_mtp=int(document.get("num_nextn_predict_layers") or 0),
            tied=bool(document.get("tie_word_embeddings")),
            train_seq_len=None,
            source="config.json",
        )
    except KeyError as error:
        raise ModelError(f"config.json of {kind} lacks {error.args[0]!r}", "take the published config.json") from None


def _latent(document: Mapping[str, Any]) -> LatentAttention:
    return LatentAttention(
        num_heads=document["num_attention_heads"],
        kv_lora_rank=document["kv_lora_rank"],
        qk_nope_head_dim=document["qk_nope_head_dim"],
        qk_rope_head_dim=document["qk_rope_head_dim"],
        v_head_dim=document["v_head_dim"],
        q_lora_rank=document.get("q_lora_rank"),
        bias=bool(document.get("attention_bias")),
    )


def _grouped(document: Mapping[str, Any], kind: str) -> GroupedQueryAttention:
    heads = document["num_attention_heads"]
    is_oss = kind == "gpt_oss"
    bias = document.get("attention_bias", kind in ("qwen2", "gpt_oss"))
    kinds = document.get("layer_types") or []
    windowed = sum(each == "sliding_attention" for each in kinds) / len(kinds) if kinds else 0.0
    if document.get("sliding_window") and not kinds and document.get("use_sliding_window", kind == "mistral"):
        windowed = 1.0
    return GroupedQueryAttention(
        num_heads=heads,
        num_kv_heads=document.get("num_key_value_heads") or heads,
        head_dim=document.get("head_dim") or document["hidden_size"] // heads,
        bias=bool(bias),
        out_bias=bool(bias) and kind != "qwen2" and kind != "glm4_moe",
        qk_norm=kind in ("qwen3", "qwen3_moe") or bool(document.get("use_qk_norm")),
        window=document.get("sliding_window") if windowed else None,
        window_share=windowed,
        num_sinks=heads if is_oss else 0,
    )


def _deepseek_experts(document: Mapping[str, Any]) -> Experts | None:
    if not document.get("n_routed_experts"):
        return None
    return Experts(
        num_experts=document["n_routed_experts"],
        per_token=document["num_experts_per_tok"],
        intermediate_size=document["moe_intermediate_size"],
        num_shared=int(document.get("n_shared_experts") or 0),
        first_dense=int(document.get("first_k_dense_replace") or 0),
    )


def _plain_experts(document: Mapping[str, Any], kind: str) -> Experts | None:
    if kind not in _MOE:
        return None
    if kind == "glm4_moe":
        return _deepseek_experts(document)
    num = document.get("num_local_experts") or document["num_experts"]
    return Experts(
        num_experts=num,
        per_token=document["num_experts_per_tok"],
        intermediate_size=document.get("moe_intermediate_size") or document["intermediate_size"],
        bias=kind == "gpt_oss",
    )
