"""Rotary parts of latent attention from halves to the pairs in which DeepSeek publishes them, and back.

`rope_interleave = false` in config.json says that a head's rotated rows lie as (a0 a1 .. b0 b1 ..). transformers reads
the field; vLLM, SGLang and llama.cpp rotate pairs (a0 b0 a1 b1 ..) whatever it says. Exported in pairs, with
`rope_interleave = true`, the weights mean the same to all of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from crosschip.handoff.conversion.layout import Layout, TensorSource
from crosschip.handoff.conversion.operators import Chain, Interleave, Inverse, Operator, Rename, Reshape, Split
from crosschip.handoff.conversion.sources import LayoutSource

if TYPE_CHECKING:
    from crosschip.handoff.source import ModelSource

__all__ = [
    "FIELD",
    "in_halves",
    "in_pairs",
    "is_rotated",
    "latent_in_pairs",
    "lies_in_pairs",
    "pairs_layout",
    "query_in_pairs",
]

FIELD = "rope_interleave"
MODEL_TYPES = ("deepseek_v3", "kimi_k2")  # whose readers in transformers know the field
_QUERY = re.compile(r"\.self_attn\.q(_b)?_proj\.weight$")
_LATENT = re.compile(r"\.self_attn\.kv_a_proj_with_mqa\.(weight|bias)$")


def lies_in_pairs(config: dict[str, Any]) -> bool:
    """Whether a `config.json` is of these architectures and says, or is silent and means, that they lie as pairs."""
    return config.get("model_type") in MODEL_TYPES and config.get(FIELD, True) is True


def is_rotated(name: str) -> bool:
    """Whether a tensor has rotary parts, so that it lies otherwise in pairs than in halves."""
    return bool(_QUERY.search(name) or _LATENT.search(name))


def query_in_pairs(config: dict[str, Any], source: str, target: str) -> Operator:
    """The rotated rows of each head of the queries' projection, from halves to pairs."""
    heads, plain, rotated = (int(config[n]) for n in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim"))
    columns = int(config["hidden_size"] if config.get("q_lora_rank") is None else config["q_lora_rank"])
    flat, cut = (heads * (plain + rotated), columns), (heads, plain + rotated, columns)
    parts = Split("heads", ("plain", "halves"), (plain, rotated), dim=1)
    back = Inverse(Split("paired", ("plain", "pairs"), (plain, rotated), dim=1))
    steps = (Reshape(source, "heads", flat, cut), parts, Interleave("halves", "pairs", dim=1), back)
    return Chain((*steps, Reshape("paired", target, cut, flat)))


def latent_in_pairs(config: dict[str, Any], source: str, target: str) -> Operator:
    """The rotated rows, or bias, behind the latent, which all heads share, from halves to pairs."""
    sizes = (int(config["kv_lora_rank"]), int(config["qk_rope_head_dim"]))
    parts = Split(source, ("latent", "halves"), sizes)
    return Chain((parts, Interleave("halves", "pairs"), Inverse(Split(target, ("latent", "pairs"), sizes))))


def pairs_layout(config: dict[str, Any], names: Sequence[str]) -> Layout:
    """All tensors under their names, rotary parts from halves to pairs."""
    return Layout("rotary pairs", tuple(_operator(config, name) for name in names))


def in_pairs(source: ModelSource) -> ModelSource:
    """The same model with rotary parts in pairs; itself where they lie so already.

    Raises:
        HandoffError: a tensor has another shape than config.json says.
    """
    if source.config.get("model_type") not in MODEL_TYPES or source.config.get(FIELD) is not False:
        return source
    layout = pairs_layout(source.config, source.tensors.names())
    tensors = LayoutSource(source.tensors, layout)
    return replace(source, tensors=tensors, config={**source.config, FIELD: True}, settings=None)


def in_halves(tensors: TensorSource, config: dict[str, Any]) -> TensorSource:
    """Tensors that lie in pairs, as they lay in halves before: `pairs_layout` read backwards."""
    return LayoutSource(tensors, pairs_layout(config, tensors.names()).inverse)


def _operator(config: dict[str, Any], name: str) -> Operator:
    if _QUERY.search(name):
        return query_in_pairs(config, name, name)
    return latent_in_pairs(config, name, name) if _LATENT.search(name) else Rename(name, name)
