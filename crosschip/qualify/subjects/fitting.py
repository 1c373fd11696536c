"""Making a model of the DeepSeek-V3 architecture fit: into the memory of the examining host, or into a rehearsal.

What an inner product runs over (hidden and head sizes) decides how large its error may get, so it is cut last.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from crosschip.errors import QualifyError
from crosschip.model import ModelConfig, Transformer

__all__ = ["BYTES_PER_PARAMETER", "fitted_config", "most_bytes_to_train", "num_active_parameters", "small_config"]

BYTES_PER_PARAMETER = 16  # fp32 weight, gradient and AdamW's two states
_MOST_BYTES = 8 << 30
_HOST_SHARE = 0.3
_SMALL_WIDTHS = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "moe_intermediate_size": 96,
    "num_attention_heads": 4,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "vocab_size": 512,
}


def most_bytes_to_train() -> int:
    """How much memory a subject may take: a share of the host's, and no more than is computed in seconds."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(_MOST_BYTES, int(_HOST_SHARE * host))


def fitted_config(config: ModelConfig, most_bytes: int | None = None) -> tuple[ModelConfig, list[str]]:
    """The architecture cut until it can be trained on the host, and what was cut in words.

    Layers go first, then experts and vocabulary, then the inner width of the MLPs and the number of heads; hidden and
    head sizes stay. The limit is a share of the host's whole memory, so that every process on it cuts alike.

    Raises:
        QualifyError: it does not fit even then.
    """
    limit = most_bytes if most_bytes is not None else most_bytes_to_train()
    fitted = config
    needed = _bytes_to_train(fitted)
    for cut in _cuts(config):
        if needed <= limit:
            break
        fitted = replace(fitted, **cut)
        needed = _bytes_to_train(fitted)
    if needed > limit:
        raise QualifyError(
            f"one layer of each kind of this model still needs {needed / 2**30:.1f} GiB to train, and qualify uses at "
            f"most {limit / 2**30:.1f} GiB of this machine's memory",
            "use a machine with more memory, or a recipe with smaller widths",
        )
    return fitted, _differences(config, fitted)


def small_config(config: ModelConfig) -> ModelConfig:
    """The same kinds of layers, each once (twice where there is one kind only), at most as wide as the first recipe."""
    widths: dict[str, Any] = {name: min(most, getattr(config, name)) for name, most in _SMALL_WIDTHS.items()}
    if config.q_lora_rank is not None:
        widths["q_lora_rank"] = min(64, config.q_lora_rank)
    small = replace(config, **widths, **_experts(config, 4), num_nextn_predict_layers=_one_at_most(config))
    return replace(small, **_layers(config))


def num_active_parameters(config: ModelConfig) -> int:
    """Parameters that take part in the computation of one token."""
    inner = 3 * config.hidden_size * config.moe_intermediate_size
    idle = config.num_moe_layers * (config.n_routed_experts - config.num_experts_per_tok) * inner
    return _num_parameters(config) - idle


def _cuts(config: ModelConfig) -> Iterator[dict[str, Any]]:
    """What may be cut, the most harmless first; each is tried on top of those before."""
    yield {**_layers(config), "num_nextn_predict_layers": _one_at_most(config)}
    experts = config.n_routed_experts
    while experts > 8:
        experts //= 2
        yield _experts(config, experts)
    yield {"vocab_size": min(config.vocab_size, 4096)}
    dense, moe = config.intermediate_size, config.moe_intermediate_size
    while dense > config.hidden_size:
        dense, moe = dense // 2, max(moe // 2, 256)
        yield {"intermediate_size": dense, "moe_intermediate_size": min(moe, config.moe_intermediate_size)}
    heads = config.num_attention_heads
    while heads > 8:
        heads //= 2
        yield {"num_attention_heads": heads}
    yield {"num_nextn_predict_layers": 0}


def _one_at_most(config: ModelConfig) -> int:
    return min(1, config.num_nextn_predict_layers)


def _layers(config: ModelConfig) -> dict[str, Any]:
    """One dense layer and one with experts; two where all are of one kind."""
    num_dense = min(config.first_k_dense_replace, config.num_hidden_layers)
    num_moe = config.num_hidden_layers - num_dense
    if num_dense and num_moe:
        return {"num_hidden_layers": 2, "first_k_dense_replace": 1}
    layers = min(2, config.num_hidden_layers)
    return {"num_hidden_layers": layers, "first_k_dense_replace": layers if num_dense else 0}


def _experts(config: ModelConfig, most: int) -> dict[str, Any]:
    """At most `most` experts, in groups of two or more; groups are chosen among where they were before."""
    if config.n_routed_experts <= most:
        return {}
    groups = min(config.n_group, most // 2)
    while most % groups:
        groups -= 1
    chosen = min(config.topk_group, max(1, groups // 2)) if config.topk_group < config.n_group else groups
    per_token = min(config.num_experts_per_tok, most // groups * chosen, max(2, most // 2))
    return {"n_routed_experts": most, "n_group": groups, "topk_group": chosen, "num_experts_per_tok": per_token}


def _num_parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        model = Transformer(config)
    return sum(parameter.numel() for parameter in model.parameters())


def _bytes_to_train(config: ModelConfig) -> int:
    return BYTES_PER_PARAMETER * _num_parameters(config)


def _differences(config: ModelConfig, fitted: ModelConfig) -> list[str]:
    changed = [
        f"{name} {getattr(config, name)} -> {getattr(fitted, name)}"
        for name in config.__dataclass_fields__
        if getattr(config, name) != getattr(fitted, name)
    ]
    return [f"cut to fit this machine's memory: {', '.join(changed)}"] if changed else []
