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
        ModelError: a `model_type` that is not counted here, a width that is missing or no number, or layers that differ
            in a way that is not counted.
    """
    kind = document.get("model_type", "")
    if kind not in (*_LATENT, *_DENSE, *_MOE):
        known = ", ".join(sorted((*_LATENT, *_DENSE, *_MOE)))
        raise ModelError(f"model_type {kind!r} is not counted by the planner", f"these are: {known}")
    latent = kind in _LATENT
    experts = _deepseek_experts(document) if latent else _plain_experts(document, kind)
    return Architecture(
        name=name or str(kind),
        hidden_size=_number(document, "hidden_size"),
        num_layers=_number(document, "num_hidden_layers"),
        vocab_size=_number(document, "vocab_size"),
        attention=_latent(document) if latent else _grouped(document, kind),
        intermediate_size=_intermediate_size(document, experts),
        mlp_bias=bool(document.get("mlp_bias")),
        experts=experts,
        num_mtp=_number(document, "num_nextn_predict_layers", 0, silent=0),
        tied=bool(document.get("tie_word_embeddings")),
        train_seq_len=None,
        source="config.json",
    )


def _number(document: Mapping[str, Any], field: str, least: int = 1, silent: int | None = None) -> int:
    """A field that counts something, from `least` on; `silent` is what it means where it is missing or null."""
    value = silent if document.get(field) is None else document[field]
    kind = document.get("model_type")
    if value is None:
        raise ModelError(f"config.json of {kind} lacks {field!r}", "take the published config.json")
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ModelError(
            f"config.json of {kind} has {field} = {value!r}, which is no whole number from {least} on",
            "take the published config.json",
        )
    return value


def _intermediate_size(document: Mapping[str, Any], experts: Experts | None) -> int:
    """Of the dense layers; a model whose every layer has experts needs none."""
    if experts is None or experts.first_dense or experts.every > 1:
        return _number(document, "intermediate_size")
    return _number(document, "intermediate_size", 0, silent=0)


def _latent(document: Mapping[str, Any]) -> LatentAttention:
    return LatentAttention(
        num_heads=_number(document, "num_attention_heads"),
        kv_lora_rank=_number(document, "kv_lora_rank"),
        qk_nope_head_dim=_number(document, "qk_nope_head_dim"),
        qk_rope_head_dim=_number(document, "qk_rope_head_dim"),
        v_head_dim=_number(document, "v_head_dim"),
        q_lora_rank=None if document.get("q_lora_rank") is None else _number(document, "q_lora_rank"),
        bias=bool(document.get("attention_bias")),
    )


def _grouped(document: Mapping[str, Any], kind: str) -> GroupedQueryAttention:
    heads = _number(document, "num_attention_heads")
    is_oss = kind == "gpt_oss"
    bias = document.get("attention_bias", kind in ("qwen2", "gpt_oss"))
    kinds = _list(document, "layer_types")
    windowed = sum(each == "sliding_attention" for each in kinds) / len(kinds) if kinds else 0.0
    if document.get("sliding_window") and not kinds and document.get("use_sliding_window", kind == "mistral"):
        windowed = 1.0
    return GroupedQueryAttention(
        num_heads=heads,
        num_kv_heads=_number(document, "num_key_value_heads", silent=heads),
        head_dim=_number(document, "head_dim", silent=_number(document, "hidden_size") // heads),
        bias=bool(bias),
        out_bias=bool(bias) and kind != "qwen2" and kind != "glm4_moe",
        qk_norm=kind in ("qwen3", "qwen3_moe") or bool(document.get("use_qk_norm")),
        window=_number(document, "sliding_window") if windowed else None,
        window_share=windowed,
        num_sinks=heads if is_oss else 0,
    )


def _list(document: Mapping[str, Any], field: str) -> list[Any]:
    value = document.get(field) or []
    if not isinstance(value, list):
        raise ModelError(
            f"config.json of {document.get('model_type')} has {field} = {value!r}, which is no list of layers",
            "take the published config.json",
        )
    return value


def _deepseek_experts(document: Mapping[str, Any]) -> Experts | None:
    if not _number(document, "n_routed_experts", 0, silent=0):
        return None
    if _number(document, "moe_layer_freq", silent=1) > 1:
        raise _uncounted(document, "moe_layer_freq")
    return Experts(
        num_experts=_number(document, "n_routed_experts"),
        per_token=_number(document, "num_experts_per_tok"),
        intermediate_size=_number(document, "moe_intermediate_size"),
        num_shared=_number(document, "n_shared_experts", 0, silent=0),
        first_dense=_number(document, "first_k_dense_replace", 0, silent=0),
    )


def _uncounted(document: Mapping[str, Any], field: str) -> ModelError:
    return ModelError(
        f"config.json of {document.get('model_type')} has {field} = {document[field]!r}: which of its layers are dense "
        "is not counted by the planner",
        "plan a model whose layers are dense up to one of them, and have experts from there on",
    )


def _plain_experts(document: Mapping[str, Any], kind: str) -> Experts | None:
    if kind not in _MOE:
        return None
    if kind == "glm4_moe":
        return _deepseek_experts(document)
    if _list(document, "mlp_only_layers"):
        raise _uncounted(document, "mlp_only_layers")
    own = "moe_intermediate_size" if document.get("moe_intermediate_size") is not None else "intermediate_size"
    return Experts(
        num_experts=_number(document, "num_local_experts" if document.get("num_local_experts") else "num_experts"),
        per_token=_number(document, "num_experts_per_tok"),
        intermediate_size=_number(document, own),
        every=_number(document, "decoder_sparse_step", silent=1),
        bias=kind == "gpt_oss",
    )
