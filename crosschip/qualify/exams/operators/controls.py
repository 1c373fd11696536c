"""Golden results in fp64, and several honest implementations of an operator in its own dtype, all on the CPU.

The honest ones are the CPU's own kernel and two kinds of others: sums and products accumulated one after the other in
fp32, with functions such as exp and division composed of simpler ones; and sums and products split into partial ones in
another order. Intermediate results are fp32, rounded once at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from crosschip.qualify.exams.operators.honest_parts import ELEMENTWISE, SEQUENTIAL, SPLIT, WHOLE

__all__ = [
    "MODES",
    "WITHOUT_GOLDEN",
    "copied",
    "golden_call",
    "honest_calls",
    "outputs_of",
    "upcast",
    "written_arguments",
]

aten = torch.ops.aten
WITHOUT_GOLDEN = (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError)


def golden_call(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[tuple[int, Tensor]]:
    """The operator's outputs in fp64 from exactly upcast arguments, in the order of `outputs_of`.

    Raises:
        RuntimeError: (or another of `WITHOUT_GOLDEN`) the CPU has no such kernel in fp64.
    """
    wide_args, wide_kwargs = upcast(list(args)), upcast(kwargs)
    if op._schema.name in ("aten::_softmax", "aten::_log_softmax"):
        wide_args[2] = False  # the kernel's own widening of bf16 to fp32; fp64 stays as it is
    return outputs_of(op, wide_args, wide_kwargs, op(*wide_args, **wide_kwargs))


def written_arguments(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that a call writes, in the order of the schema; lists of tensors stay lists."""
    found = []
    for place, argument in enumerate(op._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[place] if place < len(args) else kwargs.get(argument.name))
    return found


def outputs_of(op: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> list[tuple[int, Tensor]]:
    """All tensors that a call has made: what it returned anew, then the arguments that it has written.

    Each with its position; the tensors of a list share one.
    """
    returns = op._schema.returns
    if len(returns) == 1 and not isinstance(result, tuple):
        result = (result,)
    fresh = [
        each
        for each, declared in zip(result or (), returns, strict=False)
        if declared.alias_info is None or not declared.alias_info.is_write
    ]
    return _numbered([*fresh, *written_arguments(op, args, kwargs)])


def _numbered(positions: Sequence[Any]) -> list[tuple[int, Tensor]]:
    return [
        (number, each)
        for number, position in enumerate(positions)
        for each in tree_leaves(position)
        if isinstance(each, Tensor)
    ]


def upcast(value: Any) -> Any:
    """A copy of arguments with floating-point tensors and dtypes in fp64 (complex128); strides are kept."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            return _copied(value, torch.float64)
        return _copied(value, torch.complex128 if value.is_complex() else value.dtype)
    if isinstance(value, torch.dtype):
        if value.is_complex:
            return torch.complex128
        return torch.float64 if value.is_floating_point else value
    if isinstance(value, list | tuple):
        return type(value)([upcast(each) for each in value])
    if isinstance(value, dict):
        return {name: upcast(each) for name, each in value.items()}
    return value


def copied(value: Any) -> Any:
    """A copy of arguments: what the call writes stays in the copy."""
    return tree_map(lambda each: _copied(each, each.dtype) if isinstance(each, Tensor) else each, value)


def _copied(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        once = tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())]
        return _copied(once, dtype).expand(tensor.shape)
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype).copy_(tensor)


def honest_calls(op: Any, args: Sequence[Any], kwargs: dict[str, Any], modes: Sequence[str]) -> dict[str, list[Tensor]]:
    """Outputs of honest implementations by name, in the order of `outputs_of`, for those of `modes` that there are.

    The arguments are not changed. An implementation whose parts are all the CPU's own is left out.
    """
    found = {}
    for name in modes:
        mode = _Exchanging(*_MODES[name])
        try:
            outputs = _exchanged(op, copied(list(args)), copied(kwargs), mode)
        except WITHOUT_GOLDEN:
            continue
        if outputs is not None and mode.num_exchanged:
            found[name] = outputs
    return found


def _exchanged(op: Any, args: list[Any], kwargs: dict[str, Any], mode: _Exchanging) -> list[Tensor] | None:
    whole = WHOLE.get(str(op))
    if whole is not None:
        mode.num_exchanged += 1
        with mode:
            result = whole(op, *args, **kwargs)
        return None if result is NotImplemented else [each for each in tree_leaves(result) if isinstance(each, Tensor)]
    plain, kept = _functional(op, kwargs)
    if plain is None:
        return None
    with mode:
        result = plain(*args, **kept)
    made = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
    written = [each for each in tree_leaves(written_arguments(op, args, kwargs)) if isinstance(each, Tensor)]
    if not written:
        return made
    return (
        [each.to(into.dtype) for each, into in zip(made, written, strict=True)] if len(made) == len(written) else None
    )


def _functional(op: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The operator that returns what `op` writes, or `op` when it writes nothing, and its keyword arguments.

    None when there is no such operator.
    """
    written = [each.name for each in op._schema.arguments if each.alias_info and each.alias_info.is_write]
    if not written:
        return op, kwargs
    packet, overload = op._schema.name.split("::")[1], op._overloadname
    if packet.endswith("_") and not packet.endswith("__"):
        return getattr(getattr(aten, packet[:-1], None), overload, None), kwargs
    base = "default" if overload == "out" else overload.removesuffix("_out")
    kept = {name: value for name, value in kwargs.items() if name not in written}
    return getattr(getattr(aten, packet, None), base, None), kept


class _Exchanging(TorchDispatchMode):
    """Operators that `parts` knows are exchanged for other honest ones."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch's guard against being compiled imports its compiler, which takes seconds

    def __init__(self, *parts: dict[str, Callable[..., Any]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.parts = {name: part for each in parts for name, part in each.items()}
        self.num_exchanged = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = str(func)
        part = self.parts.get(name) or self.parts.get(name.rpartition(".")[0])
        if part is not None:
            result = part(func, *args, **kwargs)
            if result is not NotImplemented:
                self.num_exchanged += 1
                return result
        return func(*args, **kwargs)


_MODES: dict[str, tuple[dict[str, Callable[..., Any]], ...]] = {
    "sequential": (SEQUENTIAL, ELEMENTWISE),
    "split": (SPLIT,),
}

MODES = tuple(_MODES)
