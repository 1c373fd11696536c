"""The dimensions of an operator call by name, and the same call with other sizes, strides and values. No torch.

A dimension is *free* (rows, columns, the batch: outputs are independent along it) or *deep* (K: outputs are sums over
it, or depend on all of it). Free ones may be made smaller without making the call easier; deep ones may not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from crosschip.qualify.tracing.trace import TracedCall, tensor_specs

__all__ = [
    "GRADIENT_OF",
    "MOVES",
    "Dimensions",
    "base_name",
    "is_contraction",
    "name_dimensions",
    "num_elements",
    "varied_dimensions",
    "with_each_tensor",
]

Encoded = tuple[list[Any], dict[str, Any]]  # args and kwargs as in a trace

GRADIENT_OF = "gradient of "

# Letters for the dimensions of each tensor; K is deep. A bias is aligned with the result from the right.
_CONTRACTIONS = {
    "mm": ("MK", "KN", "MN"),
    "bmm": ("BMK", "BKN", "BMN"),
    "addmm": ("MN", "MK", "KN", "MN"),
    "baddbmm": ("BMN", "BMK", "BKN", "BMN"),
    "addmv": ("M", "MK", "K", "M"),
    "mv": ("MK", "K", "M"),
    "dot": ("K", "K", ""),
    "vdot": ("K", "K", ""),
}
# Argument that says over which dimensions an operator reduces or works as a whole.
_DIMENSION_ARGUMENT = {
    "sum": 1, "mean": 1, "amax": 1, "amin": 1, "prod": 1, "any": 1, "all": 1, "argmax": 1, "argmin": 1,
    "logsumexp": 1, "softmax": 1, "_softmax": 1, "log_softmax": 1, "_log_softmax": 1, "cumsum": 1, "cumprod": 1,
    "var": 1, "std": 1, "var_mean": 1, "linalg_vector_norm": 2, "norm": 2, "_softmax_backward_data": 2,
    "_log_softmax_backward_data": 2, "sort": 1, "topk": 2, "max": 1, "min": 1, "logcumsumexp": 1,
}  # fmt: skip
# What moves, makes or chooses values works place by place: every dimension is free.
MOVES = frozenset(
    (
        *("cat", "stack", "split", "split_with_sizes", "unbind", "copy", "clone", "_to_copy", "contiguous", "alias"),
        *("fill", "zero", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "detach"),
        *("constant_pad_nd", "slice", "select", "narrow", "expand", "transpose", "permute", "t", "view", "reshape"),
        *("_unsafe_view", "squeeze", "unsqueeze", "index", "index_select", "index_copy", "embedding", "where"),
        *("masked_fill", "slice_backward", "select_backward", "tril", "triu", "flip", "roll", "repeat", "unfold"),
    )
)
# The same place by place, for each tensor of a list.
_LISTWISE = ("_foreach", "_fused_adam", "_fused_sgd", "_fused_adagrad")
# Operators whose tensors are aligned from the left, and that work along one dimension given by an argument.
_ALONG_ONE = {"gather": 1, "scatter": 1, "scatter_add": 1, "scatter_reduce": 1, "index_add": 1}
# Batch, heads, query length, key length, head sizes of keys and of values.
_ATTENTION = {
    "scaled_dot_product_attention": ("BHLE", "BHSE", "BHSV", "BHLS"),
    "attention_backward": ("BHLV", "BHLE", "BHSE", "BHSV", "BHLS"),
}
_REDUCTIONS = frozenset(
    (
        *("sum", "mean", "amax", "amin", "prod", "any", "all", "argmax", "argmin", "logsumexp", "var", "std"),
        *("var_mean", "linalg_vector_norm", "norm", "_foreach_norm", "max", "min"),
    )
)


def base_name(operator: str) -> str:
    """`mm` of `aten.mm.out`, `add` of `aten.add_.Tensor`."""
    name = operator.split(".")[1]
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def is_contraction(operator: str) -> bool:
    """Whether the operator is a matrix product of the kinds whose dimensions are known here."""
    return operator.startswith("aten.") and base_name(operator) in (*_CONTRACTIONS, "linear")


@dataclass(frozen=True)
class Dimensions:
    """Names of all tensors' dimensions, in the order of `tensor_specs`; None for one that stays as it is."""

    of_tensors: tuple[tuple[str | None, ...], ...]
    sizes: dict[str, int]
    deep: frozenset[str]
    reduces: bool = False  # deep dimensions are not among those of the outputs
    num_lists: int = 0  # of tensors, in an operator that works through them side by side

    @property
    def free(self) -> list[str]:
        """The free dimensions, the longest first."""
        names = [name for name in self.sizes if name not in self.deep]
        return sorted(names, key=lambda name: -self.sizes[name])

    def resized(self, encoded: Encoded, sizes: dict[str, int]) -> Encoded:
        """The call with other sizes; dense tensors stay dense in the same order, others keep their gaps."""
        number = -1

        def resize(spec: dict[str, Any]) -> dict[str, Any]:
            nonlocal number
            number += 1
            names = self.of_tensors[number]
            shape = [sizes.get(name, size) if name else size for name, size in zip(names, spec["shape"], strict=True)]
            values = _values_of(spec, math.prod(shape))
            return {**spec, "shape": shape, "stride": _strides(spec, shape), "values": values}

        changed = {self.sizes[name]: size for name, size in sizes.items() if name.startswith("size ")}
        args, kwargs = with_each_tensor(encoded, resize)
        return _with_lists([args, kwargs], changed)


def _values_of(spec: dict[str, Any], count: int) -> dict[str, Any]:
    """What a tensor of `count` elements holds instead: no literal values, and a permutation stays one."""
    values, before = spec["values"], math.prod(spec["shape"])
    if count == before:
        return values
    is_permutation = values.get("unique") and values["high"] - values["low"] + 1 == before
    kept = {key: value for key, value in values.items() if key != "literal"}
    return {**kept, "high": values["low"] + max(1, count) - 1} if is_permutation else kept


def name_dimensions(call: TracedCall, pointwise: bool) -> Dimensions:
    """The dimensions of a call. Where nothing is known of the operator, all are deep unless it is `pointwise`."""
    specs = list(tensor_specs([call.args, call.kwargs]))
    base = base_name(call.operator)
    if call.operator.startswith(GRADIENT_OF) and base != "scaled_dot_product_attention":
        return _of_gradient(call, pointwise)
    if base in _CONTRACTIONS and call.operator.startswith("aten."):
        letters = _CONTRACTIONS[base]
        names = [_aligned(letters[min(n, len(letters) - 1)], spec["shape"]) for n, spec in enumerate(specs)]
        return _dimensions(specs, names, {"K"})
    if base == "linear" and call.operator.startswith("aten."):
        rows = [*[f"L{n}" for n in range(len(specs[0]["shape"]) - 1)], "K"]
        return _dimensions(specs, [tuple(rows), ("N", "K"), ("N",)][: len(specs)], {"K"})
    if base in _ATTENTION:
        is_gradient = call.operator.startswith(GRADIENT_OF)
        letters = _ATTENTION["attention_backward" if is_gradient else base]
        names = [_aligned(letters[n], spec["shape"]) for n, spec in enumerate(specs)]
        one_head_count = len({spec["shape"][-3] for spec in specs if len(spec["shape"]) > 2} - {1}) <= 1
        return _dimensions(specs, names, set("LESV" if one_head_count else "LESVH"), reduces=False)
    place = {**_DIMENSION_ARGUMENT, **_ALONG_ONE}.get(base)
    chosen = None if place is None or not specs or pointwise else _chosen(call, place, len(specs[0]["shape"]))
    if chosen is not None:
        names = [_by_place(spec["shape"], specs[0]["shape"], n) for n, spec in enumerate(specs)]
        deep = {f"dim {dim}" for dim in chosen} | {name for each in names for name in each if name and " of " in name}
        return _dimensions(specs, names, deep, base in _REDUCTIONS)
    names = [tuple(f"size {size}" if size > 1 else None for size in spec["shape"]) for spec in specs]
    everything = {name for each in names for name in each if name}
    free = pointwise or base in MOVES or base.startswith(_LISTWISE)
    deep = set() if free else _normalised(call, base) or everything
    made = _dimensions(specs, names, deep, reduces=False)
    num_lists = sum(isinstance(each, list) for each in call.args) if base.startswith(_LISTWISE) else 0
    return replace(made, num_lists=num_lists)


def varied_dimensions(calls: Sequence[TracedCall], pointwise: bool) -> frozenset[str]:
    """The dimensions that differ between calls of one operator, as the rows do that experts get."""
    sizes = [name_dimensions(call, pointwise).sizes for call in calls]
    names = {name for each in sizes for name in each}
    return frozenset(name for name in names if len({each.get(name) for each in sizes}) > 1)


def _of_gradient(call: TracedCall, pointwise: bool) -> Dimensions:
    """The operator's own dimensions, and those of the output's gradient, which comes first, by their sizes."""
    own = replace(call, operator=call.operator.removeprefix(GRADIENT_OF), args=call.args[1:])
    dims = name_dimensions(own, pointwise)
    shape = call.args[0]["tensor"]["shape"]
    specs = list(tensor_specs([own.args, own.kwargs]))
    if specs and specs[0]["shape"] == shape:
        names = dims.of_tensors[0]
    else:
        by_size = {size: name for name, size in reversed(dims.sizes.items())}
        names = tuple(by_size.get(size) if size > 1 else None for size in shape)
    return replace(dims, of_tensors=(names, *dims.of_tensors), reduces=False)


def _by_place(shape: Sequence[int], first: Sequence[int], number: int) -> tuple[str | None, ...]:
    if len(shape) != len(first):
        return tuple(f"dim {place} of {number}" if size > 1 else None for place, size in enumerate(shape))
    return tuple(
        None if size <= 1 else f"dim {place}" if size == like else f"dim {place} of {number}"
        for place, (size, like) in enumerate(zip(shape, first, strict=True))
    )


def _chosen(call: TracedCall, place: int, rank: int) -> list[int] | None:
    """The dimensions that a call works along; None when that is not plain."""
    dims = call.args[place] if place < len(call.args) else call.kwargs.get("dim")
    if dims is None or dims == []:
        return list(range(rank))
    chosen = [dims] if isinstance(dims, int) else dims
    if not isinstance(chosen, list) or not all(isinstance(dim, int) and -rank <= dim < rank for dim in chosen):
        return None
    return [dim % rank for dim in chosen]


def _normalised(call: TracedCall, base: str) -> set[str]:
    """The sizes over which a norm's statistics go."""
    if base not in ("native_layer_norm", "native_layer_norm_backward", "_fused_rms_norm", "_fused_rms_norm_backward"):
        return set()
    shape = next((each for each in call.args if isinstance(each, list)), [])
    return {f"size {size}" for size in shape}


def _aligned(letters: str, shape: Sequence[int]) -> tuple[str | None, ...]:
    own = letters[len(letters) - len(shape) :] if len(shape) <= len(letters) else letters
    return tuple(
        letter if size > 1 or letters in ("MK", "KN", "BMK", "BKN") else None
        for letter, size in zip(own, shape, strict=True)
    )


def _dimensions(
    specs: Sequence[dict[str, Any]],
    names: Sequence[tuple[str | None, ...]],
    deep: set[str],
    reduces: bool = True,
) -> Dimensions:
    sizes: dict[str, int] = {}
    for spec, each in zip(specs, names, strict=True):
        sizes.update({name: size for name, size in zip(each, spec["shape"], strict=True) if name})
    return Dimensions(tuple(names), sizes, frozenset(deep & set(sizes)), reduces)


def with_each_tensor(encoded: Encoded, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Encoded:
    """The call with each tensor's spec changed, in the order of `tensor_specs`."""

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            if "tensor" in value:
                return {**value, "tensor": change(value["tensor"])}
            return {name: walk(each) for name, each in value.items()}
        return [walk(each) for each in value] if isinstance(value, list) else value

    args, kwargs = encoded
    return walk(args), walk(kwargs)


def num_elements(encoded: Encoded) -> int:
    """The elements of all tensors together."""
    return sum(math.prod(spec["shape"]) for spec in tensor_specs(list(encoded)))


def _with_lists(value: Any, changed: dict[int, int]) -> Any:
    """Sizes replaced in lists of integers, such as the shape for an expansion."""
    if isinstance(value, dict):
        return value if "tensor" in value else {name: _with_lists(each, changed) for name, each in value.items()}
    if isinstance(value, list):
        if value and all(type(each) is int for each in value):
            return [changed.get(each, each) for each in value]
        return [_with_lists(each, changed) for each in value]
    return value


def _strides(spec: dict[str, Any], shape: Sequence[int]) -> list[int]:
    old_shape, old = spec["shape"], spec["stride"]
    if list(shape) == list(old_shape):
        return list(old)
    made = list(old)
    reached = old_reached = 1
    for place in sorted(range(len(shape)), key=lambda place: (old[place], old_shape[place])):
        if old[place] == 0:
            continue
        made[place] = reached + max(0, old[place] - old_reached)
        reached = made[place] * max(1, shape[place])
        old_reached = old[place] * max(1, old_shape[place])
    return made


def strided_otherwise(encoded: Encoded) -> Iterator[tuple[str, Encoded]]:
    """The call on tensors whose last two dimensions lie transposed, and on ones that take every second place."""

    def transposed(spec: dict[str, Any]) -> dict[str, Any]:
        shape = spec["shape"]
        if len(shape) < 2 or 0 in spec["stride"]:
            return spec
        stride = _dense([*shape[:-2], shape[-1], shape[-2]])
        return {**spec, "stride": [*stride[:-2], stride[-1], stride[-2]]}

    def stepped(spec: dict[str, Any]) -> dict[str, Any]:
        if not spec["shape"] or 0 in spec["stride"]:
            return spec
        return {**spec, "stride": [2 * each for each in _dense(spec["shape"])]}

    def contiguous(spec: dict[str, Any]) -> dict[str, Any]:
        return {**spec, "stride": _dense(spec["shape"])}

    yield "contiguous", with_each_tensor(encoded, contiguous)
    yield "transposed", with_each_tensor(encoded, transposed)
    yield "every second place", with_each_tensor(encoded, stepped)


def _dense(shape: Sequence[int]) -> list[int]:
    stride, reached = [], 1
    for size in reversed(shape):
        stride.append(reached)
        reached *= max(1, size)
    return stride[::-1]
