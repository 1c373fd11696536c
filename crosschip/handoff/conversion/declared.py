"""The layouts that are declared here: our checkpoints, a change of dtype, and weights in 8 bits."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

from crosschip.errors import HandoffError
from crosschip.handoff.conversion.layout import Layout, TensorSource
from crosschip.handoff.conversion.operators import (
    Cast,
    Chain,
    Copy,
    Inverse,
    Operator,
    Quantise,
    Rename,
    Split,
    Stack,
)
from crosschip.model import ModelConfig
from crosschip.model.quantised import QUANTISED_DTYPES, Quantisation, scale_name
from crosschip.model.weights import TensorView, published_views

__all__ = ["checkpoint_layout", "dtype_layout", "is_quantised_weight", "quantised_layout", "stored_layout"]

# Kept in fp32 whatever the other weights are: routers compare these to scores, and positions are multiplied by those.
_ALWAYS_FP32 = ("e_score_correction_bias", "rotary_emb.inv_freq")
# What DeepSeek quantises, which is what all families name so: the matrices of attention, of dense layers and of
# experts. Not the router (`mlp.gate`), embeddings, output, norms, nor the projection into a prediction module.
_QUANTISED = re.compile(r"\.(self_attn|mlp)\.(\w+\.)*\w+_proj(_with_mqa)?\.weight$")
_NOT_QUANTISED = re.compile(
    r"(mlp\.gate|shared_expert_gate|eh_proj|embed_tokens|shared_head\.head|norm)\.(weight|bias)$"
)
_IN_LAYERS = re.compile(r"\.layers\.\d+\.")
_SCALES = ("_scale_inv", "_scale")


def checkpoint_layout(config: ModelConfig) -> Layout:
    """From the tensors of our own model to the published names; `published_views` is its declaration."""
    views: dict[str, list[TensorView]] = {}
    for view in published_views(config):
        tied = view.ours == "lm_head.weight" and config.tie_word_embeddings
        views.setdefault("embed_tokens.weight" if tied else view.ours, []).append(view)
    return Layout("checkpoint", tuple(_own_to_published(ours, parts, config) for ours, parts in views.items()))


def _own_to_published(ours: str, parts: list[TensorView], config: ModelConfig) -> Operator:
    if len(parts) == 1 and not parts[0].index:
        return Rename(ours, parts[0].published)
    if not any(part.index for part in parts):
        return Copy(ours, tuple(part.published for part in parts))
    experts: dict[int, list[str]] = {}
    for part in parts:
        expert = part.index[0]
        assert isinstance(expert, int)
        experts.setdefault(expert, []).append(part.published)
    if all(len(names) == 1 for names in experts.values()):
        return Inverse(Stack(tuple(experts[number][0] for number in sorted(experts)), ours))
    inner = config.moe_intermediate_size
    whole = {number: f"{ours}[{number}]" for number in sorted(experts)}
    halves = [Split(whole[number], tuple(experts[number]), (inner, inner)) for number in whole]
    return Chain((Inverse(Stack(tuple(whole.values()), ours)), *halves))


def dtype_layout(source: TensorSource, dtype: torch.dtype) -> Layout:
    """The same names, floating-point tensors in `dtype`."""
    operators = tuple(_cast(source, name, dtype) for name in source.names())
    return Layout(str(dtype).removeprefix("torch."), operators)


def _cast(source: TensorSource, name: str, dtype: torch.dtype) -> Operator:
    found = source.dtype(name)
    wanted = torch.float32 if name.endswith(_ALWAYS_FP32) else dtype
    if not found.is_floating_point or found == wanted:
        return Rename(name, name)
    return Cast(name, name, wanted, found)


def is_quantised_weight(name: str) -> bool:
    """Whether a tensor of this name is stored in 8 bits by the targets fp8 and w8a8."""
    return _QUANTISED.search(name) is not None


def quantised_layout(source: TensorSource, how: Quantisation, dtype: torch.dtype) -> Layout:
    """The weights of attention, dense layers and experts as `how` says, everything else in `dtype`.

    Raises:
        HandoffError: no tensor of the source is one that is quantised, or nobody knows of one whether it is.
    """
    code = torch.float8_e4m3fn if how.kind == "fp8" else torch.int8
    matrices = [name for name in source.names() if len(source.shape(name)) > 1 and source.dtype(name).is_floating_point]
    chosen = {name for name in matrices if is_quantised_weight(name) and len(source.shape(name)) == 2}
    for name in matrices:
        if _IN_LAYERS.search(name) and name not in chosen and not _NOT_QUANTISED.search(name):
            raise HandoffError(
                f"{name} {list(source.shape(name))} is named like no weight that {how.kind} quantises or keeps",
                "half of the model would stay as it is without a word: use the target hf for this architecture",
            )
    if not chosen:
        raise HandoffError(
            f"no tensor is named as the weights that {how.kind} quantises (...self_attn.q_proj.weight)",
            "use the target hf for this model",
        )
    operators = [
        Quantise(name, name, scale_name(name, code), how) if name in chosen else _cast(source, name, dtype)
        for name in source.names()
    ]
    return Layout(how.kind, tuple(operators))


def stored_layout(source: TensorSource, how: Quantisation) -> Layout:
    """The layout of which a quantised directory is the target's side: read backward, it gives weights in fp32.

    Raises:
        HandoffError: an 8-bit weight without its scale, or a scale without its weight.
    """
    names = list(source.names())
    stored = {name for name in names if source.dtype(name) in QUANTISED_DTYPES}
    scales = {scale_name(name, source.dtype(name)): name for name in stored}
    _check_scales(names, stored, scales, how)
    operators: list[Operator] = []
    for name in names:
        if name in stored:
            operators.append(Quantise(name, name, scale_name(name, source.dtype(name)), how))
        elif name not in scales:
            operators.append(Rename(name, name))
    return Layout(how.kind, tuple(operators))


def _check_scales(names: Iterable[str], stored: set[str], scales: dict[str, str], how: Quantisation) -> None:
    there = set(names)
    if missing := sorted(scale for scale in scales if scale not in there):
        raise HandoffError(
            f"{scales[missing[0]]} is stored in 8 bits but {missing[0]} is missing ({len(missing)} such tensors)",
            "without its scales the weight means nothing: convert or download the model again",
        )
    lonely = sorted(n for n in there if n.endswith((*_SCALES, "_zero_point")) and n not in scales)
    if lonely:
        raise HandoffError(
            f"{lonely[0]} belongs to no {how.kind} weight of the files ({len(lonely)} such tensors)",
            "config.json says another quantisation than the files hold, or a weight was replaced by an unquantised one",
        )
