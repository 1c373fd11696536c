"""The form of a bundle, as `record` writes it: whoever can seal a manifest anew can write anything into it. No files.

Each check gives the first thing that has another form, in words, or None.
"""

from __future__ import annotations

import re
from types import NoneType
from typing import Any

from numpy.typing import NDArray

__all__ = ["arrays_misfit", "manifest_misfit"]

_NUMBER = (int, float)
_ANSWERS = {"mean_kl": _NUMBER, "logprob": _NUMBER}
_TENSOR: dict[Any, Any] = {
    **dict.fromkeys(("dtype", "sha256", "sha256_bf16"), str),
    "shape": [int],
    **dict.fromkeys(("sum_squares", "rows", "columns", "sorted_rows", "sorted_columns"), _NUMBER),
    "projections?": [_NUMBER],  # older bundles are without
    ...: None,
}
_MANIFEST: dict[Any, Any] = {
    **dict.fromkeys(("recorded_on", "recorded_at", "source", "compute_dtype", "weights_dtype"), str),
    **dict.fromkeys(("seed", "top_k", "sketch_width", "vocab_size", "num_nextn_predict_layers"), int),
    "sha256": {...: str},
    "rows": [{"length": int, "origin": str}],
    "lengths_left_out": [int],
    "points": [str],
    "config": {},
    "fingerprint": {},
    "curve_plan": {
        **dict.fromkeys(("num_steps", "batch_size", "length", "num_batches", "seed"), int),
        "learning_rate": _NUMBER,
        ...: None,
    },
    "curve": (NoneType, {"loss": [_NUMBER], "gradient_norm": [_NUMBER]}),
    "noise_floor": {
        **_ANSWERS,
        **dict.fromkeys(("router_margin", "loss", "gradient_norm"), _NUMBER),
        "points": {...: {"error": _NUMBER, "gain": _NUMBER}},
        "without_choices": _ANSWERS,
    },
    "weights": {...: _TENSOR},
}
_WORDS = {str: "a text", int: "a whole number", float: "a number", NoneType: "nothing"}
_MOST_DEEP = 32  # a configuration of another library has tables in tables
_MOST = 1 << 63  # larger whole numbers fit into no tensor and no float

_POINT = r"(embed_tokens|norm|lm_head|layers\.\d{1,6}(\.self_attn|\.mlp)?)"
# Arrays by name: the kinds of their dtype, and how many dimensions they have.
_ARRAYS = {
    "lengths|input_ids|top1_id": ("iu", 1),
    "rest_logprob|target_logprob": ("f", 1),
    "topk_ids": ("iu", 2),
    "topk_logprobs": ("f", 2),
    f"sketch/{_POINT}": ("f", 2),
    f"norm/{_POINT}": ("f", 1),
    r"router_ids/layers\.\d{1,6}": ("iu", 2),
    r"router_margin/layers\.\d{1,6}": ("f", 1),
}
_NEEDED = ("input_ids", "lengths", "top1_id", "topk_ids", "topk_logprobs", "rest_logprob", "target_logprob")
_PAIRS = (("sketch/", "norm/"), ("router_ids/", "router_margin/"))


def manifest_misfit(manifest: dict[str, Any]) -> str | None:
    """What in a manifest is missing, or is something else than a replay reads there."""
    if _is_deep(manifest):
        return f"it is nested over {_MOST_DEEP} deep"
    found = _misfit(manifest, _MANIFEST, "manifest")
    if found is not None:
        return found
    curve, steps = manifest["curve"], manifest["curve_plan"]["num_steps"]
    if curve is not None and not len(curve["loss"]) == len(curve["gradient_norm"]) == steps:
        return (
            f"the training curve has {len(curve['loss'])} losses and {len(curve['gradient_norm'])} norms, not {steps}"
        )
    return None


def _misfit(value: Any, form: Any, place: str) -> str | None:
    """Where a value has another form.

    A form is a type, several of which one must fit, a list of the form of each entry, or a table.
    """
    if isinstance(form, dict):
        return _misfit_of_table(value, form, place)
    if isinstance(form, list):
        if not isinstance(value, list):
            return f"{place} is {_shown(value)}, not a list"
        pairs = [(f"{place}[{number}]", each, form[0]) for number, each in enumerate(value)]
        return next((found for at, each, own in pairs if (found := _misfit(each, own, at))), None)
    if isinstance(form, tuple):
        tried = [_misfit(value, each, place) for each in form]
        return None if None in tried else tried[-1]
    fits = isinstance(value, form) and not isinstance(value, bool) and not (form is int and abs(value) >= _MOST)
    return None if fits else f"{place} is {_shown(value)}, not {_WORDS[form]}"


def _misfit_of_table(value: Any, form: dict[Any, Any], place: str) -> str | None:
    """The table's keys must be there but for those that end in `?`; `...` stands for every other, None for no other."""
    if not isinstance(value, dict):
        return f"{place} is {_shown(value)}, not an object"
    named = {key.removesuffix("?"): own for key, own in form.items() if key is not ...}
    missing = [key for key in named if key in form and key not in value]
    if missing:
        return f"{place} has no {missing[0]}"
    for key, each in value.items():
        own = named.get(key, form.get(..., Any))
        if own is None:
            return f"{place} has a field {key[:60]!r}, which is not known here"
        if own is not Any and (found := _misfit(each, own, f"{place}.{key[:200]}")):
            return found
    return None


def _shown(value: Any) -> str:
    return f"a {type(value).__name__}" if isinstance(value, dict | list) else repr(value)[:60]


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_MOST_DEEP):
        level = [
            each
            for part in level
            if isinstance(part, dict | list)
            for each in (part.values() if isinstance(part, dict) else part)
        ]
    return bool(level)


def arrays_misfit(manifest: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> str | None:
    """What in the arrays does not fit the manifest, which has its form, or does not fit the other arrays."""
    missing = [name for name in _NEEDED if name not in arrays]
    missing += [f"{b}{name.removeprefix(a)}" for a, b in _PAIRS for name in arrays if name.startswith(a)]
    missing = [name for name in missing if name not in arrays]
    if missing:
        return f"the array {missing[0]} is missing"
    for name, array in arrays.items():
        kinds, dimensions = next((own for names, own in _ARRAYS.items() if re.fullmatch(names, name)), ("", 0))
        if array.ndim != dimensions or array.dtype.kind not in kinds:
            return f"the array {name[:60]} is {array.dtype} {list(array.shape)}, which a recording never has"
    lengths, num_positions = arrays["lengths"].tolist(), len(arrays["input_ids"])
    if not lengths or min(lengths) < 1 or sum(lengths) != num_positions:
        return f"the rows have {sum(lengths)} positions and there are {num_positions} token ids"
    if lengths != [row["length"] for row in manifest["rows"]]:
        return "the rows have other lengths than the manifest says"
    other = [name for name, array in arrays.items() if name != "lengths" and len(array) != num_positions]
    if other:
        return f"the array {other[0]} has {len(arrays[other[0]])} positions, not {num_positions}"
    return _widths_misfit(manifest, arrays)


def _widths_misfit(manifest: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> str | None:
    """Token ids that the model has not got, and arrays of another width."""
    vocab_size = manifest["vocab_size"]
    for name in ("input_ids", "topk_ids", "top1_id"):
        if int(arrays[name].min(initial=0)) < 0 or int(arrays[name].max(initial=-1)) >= vocab_size:
            return f"the array {name} holds token ids beyond the vocabulary of {vocab_size}"
    widths = {"topk_ids": "top_k", "topk_logprobs": "top_k"}
    widths |= dict.fromkeys((name for name in arrays if name.startswith("sketch/")), "sketch_width")
    for name, field in widths.items():
        if arrays[name].shape[1] != manifest[field] or not manifest[field]:
            return f"the array {name} has a width of {arrays[name].shape[1]}, and {field} is {manifest[field]}"
    return None
