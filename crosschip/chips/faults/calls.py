"""Reading an operator call as faults need it: its name, its arguments by name, and the same call in another dtype."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "base_name",
    "computes",
    "dtypes_of",
    "in_dtype",
    "is_operator",
    "is_random",
    "named_arguments",
    "overwrite",
    "tensors_in",
    "with_arguments",
    "with_inputs",
    "with_tensors",
    "written_names",
]

# What moves, makes, chooses or compares values without calculating: its results are exact on every chip.
_WITHOUT_ARITHMETIC = (
    "abs alias all amax amin aminmax any arange argmax argmin argsort as_strided as_strided_scatter "
    "bernoulli bitwise_not block_diag bucketize cat ceil channel_shuffle chunk_cat clamp clamp_max "
    "clamp_min clone complex concat constant_pad_nd contiguous copy copysign count_nonzero detach diag "
    "diag_embed diagonal_scatter embedding empty empty_like empty_strided eq exponential eye fill flip "
    "floor fmax fmin frac frexp full full_like gather ge gt hardtanh heaviside hstack im2col index "
    "index_fill index_put index_select is_nonzero isclose isfinite isin isinf isnan isneginf isposinf "
    "kthvalue le linspace logical_and logical_not logical_or logical_xor lt masked_fill masked_scatter "
    "masked_scatter_backward masked_select max maximum median min minimum mode multinomial nan_to_num "
    "nanmedian ne neg new_empty new_empty_strided new_full new_ones new_zeros nextafter nonzero normal "
    "one_hot ones ones_like pad pixel_shuffle pixel_unshuffle put rand rand_like randint randint_like "
    "randn randn_like random randperm reflection_pad1d reflection_pad2d reflection_pad3d relu repeat "
    "repeat_interleave replication_pad1d replication_pad2d replication_pad3d resize resize_as roll rot90 "
    "round scalar_tensor scatter searchsorted select_backward select_scatter sgn sign signbit "
    "slice_backward slice_scatter sort stack take threshold threshold_backward tile to topk tril "
    "tril_indices triu triu_indices trunc uniform unique unique_consecutive vstack where zero zeros "
    "zeros_like _chunk_cat _copy_from _copy_from_and_resize _efficientzerotensor _index_put_impl "
    "_local_scalar_dense _pin_memory _unique2 _unsafe_index _unsafe_index_put _unsafe_masked_index "
)
_MOVES = frozenset(_WITHOUT_ARITHMETIC.split())


@functools.cache
def base_name(op: torch._ops.OpOverload) -> str:
    """The operator whatever its form: `mm` for `aten.mm.default` and `aten.mm.out`, `add` for `aten.add_.Tensor`.

    Torch writes the result of many operators into a tensor that it has allocated itself, so a call of `mm` mostly
    arrives on a chip as `mm.out`.
    """
    name: str = op._schema.name.split("::")[-1]
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


# Operators that a chip computes with the same kernel; they arrive whole where nothing takes them apart.
_SAME_KERNEL = {"linear": "mm", "matmul": "mm", "softmax": "_softmax", "log_softmax": "_log_softmax"}


@functools.cache
def is_operator(op: torch._ops.OpOverload, wanted: str) -> bool:
    """Whether a call's operator is the one that a person calls `mm`, `aten.mm` or `aten::mm.out`."""
    words = wanted.replace("::", ".").split(".")
    name = words[1] if len(words) > 1 and words[0] == op.namespace else words[0]
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    return name in (base_name(op), _SAME_KERNEL.get(base_name(op)))


@functools.cache
def computes(op: torch._ops.OpOverload) -> bool:
    """Whether the operator calculates, rather than moves, makes, chooses or compares values.

    Operators over lists of tensors do not count: inside them the chip calls an operator for each tensor.
    """
    is_view = any(each.alias_info is not None and not each.alias_info.is_write for each in op._schema.arguments)
    reduces = any(each.name == "reduce" for each in op._schema.arguments)
    moves = (base_name(op) in _MOVES or base_name(op).endswith("_copy")) and not reduces
    return not (is_view or moves or is_random(op) or base_name(op).startswith("_foreach_"))


@functools.cache
def is_random(op: torch._ops.OpOverload) -> bool:
    """Whether the operator draws random numbers. Attention does not: with dropout it is taken apart before."""
    return torch.Tag.nondeterministic_seeded in op.tags and base_name(op) != "scaled_dot_product_attention"


def named_arguments(op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name; those that were not given have the default of the operator's schema."""
    named = {each.name: each.default_value for each in op._schema.arguments}
    named.update(zip(named, args, strict=False))
    named.update(kwargs)
    return named


def with_arguments(
    op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], **new: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call with some arguments replaced, by name; what was not given before is handed over by its name."""
    places = {each.name: place for place, each in enumerate(op._schema.arguments)}
    changed_args, changed_kwargs = list(args), dict(kwargs)
    for name, value in new.items():
        if places[name] < len(changed_args):
            changed_args[places[name]] = value
        else:
            changed_kwargs[name] = value
    return tuple(changed_args), changed_kwargs


@functools.cache
def written_names(op: torch._ops.OpOverload) -> frozenset[str]:
    """The arguments that a call writes into."""
    arguments = op._schema.arguments
    return frozenset(each.name for each in arguments if each.alias_info is not None and each.alias_info.is_write)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and dictionaries, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def with_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same lists, tuples and dictionaries with each tensor replaced by what `change` makes of it."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)([with_tensors(each, change) for each in value])
    if isinstance(value, dict):
        return {name: with_tensors(each, change) for name, each in value.items()}
    return value


def with_inputs(
    op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call with each tensor that it reads replaced by what `change` makes of it.

    A tensor that is read and written stays the same tensor and gets the new values; one that is only written (`out`)
    is left alone.
    """
    written = written_names(op)

    def changed(name: str, value: Any) -> Any:
        if name not in written:
            return with_tensors(value, change)
        if not _is_out(op, name):
            for tensor in tensors_in(value):
                new = change(tensor)
                if new is not tensor:
                    tensor.copy_(new)
        return value

    names = [each.name for each in op._schema.arguments]
    new_args = tuple(changed(name, value) for name, value in zip(names, args, strict=False))
    return new_args, {name: changed(name, value) for name, value in kwargs.items()}


def _is_out(op: torch._ops.OpOverload, name: str) -> bool:
    """Whether an argument that a call writes holds nothing beforehand."""
    return any(each.is_out for each in op._schema.arguments if each.name == name)


def dtypes_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[torch.dtype]:
    """The dtypes of a call's tensors, and those it names."""
    found = {tensor.dtype for tensor in tensors_in([args, kwargs])}
    return found | {value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)}


def in_dtype(
    op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype
) -> list[Tensor] | None:
    """The results of the call computed on the CPU in a wider floating dtype, from arguments that stay as they are.

    They are in the order in which the call returns them or, when it returns nothing, of the tensors it writes. None:
    the operator does not exist in that dtype.
    """
    written = written_names(op)
    named = named_arguments(op, args, kwargs)
    wide = {name: _widened(op, name, value, dtype) for name, value in named.items()}
    given = {name: wide[name] for name in list(named)[: len(args)]}
    try:
        result = op(*given.values(), **{name: wide[name] for name in kwargs})
    except (RuntimeError, NotImplementedError):
        return None
    if result is None:
        result = [wide[name] for name in named if name in written]
    return list(tensors_in(result))


def _widened(op: torch._ops.OpOverload, name: str, value: Any, dtype: torch.dtype) -> Any:
    is_written = name in written_names(op)
    is_out = is_written and _is_out(op, name)

    def widen(tensor: Tensor) -> Tensor:
        floating = _is_narrower(tensor.dtype, dtype)
        if is_out:
            return tensor.new_empty(0, dtype=dtype if floating else tensor.dtype)
        if floating:
            return tensor.to(dtype)
        return tensor.clone() if is_written else tensor

    if isinstance(value, torch.dtype):
        return dtype if _is_narrower(value, dtype) else value
    return False if name == "half_to_float" else with_tensors(value, widen)


def _is_narrower(dtype: torch.dtype, than: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize < than.itemsize


def overwrite(
    op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, change: Callable[..., Any]
) -> Any:
    """Let `change(tensor, place)` give new values for each floating-point result; returns the result.

    The results of a call that returns nothing are the tensors it has written.
    """
    if result is None:
        named = named_arguments(op, args, kwargs)
        found = tensors_in([value for name, value in named.items() if name in written_names(op)])
    else:
        found = tensors_in(result)
    for place, tensor in enumerate(found):
        if tensor.dtype.is_floating_point:
            new = change(tensor, place)
            if new is not None and new is not tensor:
                tensor.copy_(new)
    return result
