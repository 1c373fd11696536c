"""What a fault is, and how several are laid around one call."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

__all__ = ["IMITATION", "CollectiveCall", "Fault", "around", "around_collective", "current_collective"]

Compute = Callable[..., Any]


@dataclass
class Imitation:
    """The time in seconds spent on imitating a chip, beside what it wraps: the chip itself would not need it."""

    seconds: float = 0.0


IMITATION = Imitation()


@dataclass(frozen=True)
class CollectiveCall:
    """What a collective was asked for. Ranks are numbered as in its process group.

    `kind` is the name of the function of `torch.distributed`, or `connect` when the group comes into being.
    """

    kind: str
    rank: int
    num_ranks: int
    timeout_s: float
    operation: str | None = None  # of a reduction: "sum", "avg", "premul_sum", "max", ...
    factor: float | None = None  # of "premul_sum"
    peer: int | None = None  # of a send or a receive; None for a receive from any rank


_collective_now: ContextVar[CollectiveCall | None] = ContextVar("collective_now", default=None)


def current_collective() -> CollectiveCall:
    """The collective around which a fault is being called."""
    call = _collective_now.get()
    assert call is not None, "asked outside of a collective"
    return call


class Fault(Protocol):
    """Any object with a `name` and at least one of these methods is a fault.

    A fault returns the result: right, wrong, late, never, or it raises. It may keep state and must be deterministic
    under its own seed. With `off_the_clock = True`, as honest variants have it, the time that it takes beside `compute`
    does not count as the chip's. `process(rank, event)` is reserved.
    """

    name: str

    def operator(
        self, op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Compute
    ) -> Any:
        """Called around each operator call on the chip; tensors in `args` and `kwargs` lie on the CPU.

        `compute(*args, **kwargs)` gives the honest result.
        """

    def collective(self, kind: str, tensors: list[torch.Tensor], compute: Callable[[list[torch.Tensor]], Any]) -> Any:
        """Called around each collective of the chip's process group, such as `all_reduce`.

        `tensors` are what this rank contributes, on the CPU; `compute(tensors)` gives the list of tensors that this
        rank gets. For a receive they are where the result will lie, and `compute` waits for it. `current_collective()`
        tells the rank, the operation, the peer and the time-out.
        """

    def files(self, directory: Path) -> list[str]:
        """Called once over a model directory that was handed off; changes its files in place.

        Returns the names of the tensors, fields or files that are other now; none where nothing fits.
        """


def around(
    faults: Sequence[Any], op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Compute
) -> Any:
    """The result of one operator call with faults around it, the first outermost."""
    if not faults:
        return compute(*args, **kwargs)
    first, *others = faults
    if not hasattr(first, "operator"):
        return around(others, op, args, kwargs, compute)

    def inner(*inner_args: Any, **inner_kwargs: Any) -> Any:
        return around(others, op, inner_args, inner_kwargs, compute)

    if getattr(first, "off_the_clock", getattr(first, "honest", False)):
        return _off_the_clock(first, op, args, kwargs, inner)
    return first.operator(op, args, kwargs, inner)


def _off_the_clock(
    variant: Any, op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], inner: Compute
) -> Any:
    """What a fault or variant returns; only the time of what it wraps counts as the chip's."""
    spent_inside = 0.0

    def timed(*inner_args: Any, **inner_kwargs: Any) -> Any:
        nonlocal spent_inside
        started = time.perf_counter()
        try:
            return inner(*inner_args, **inner_kwargs)
        finally:
            spent_inside += time.perf_counter() - started

    started = time.perf_counter()
    try:
        return variant.operator(op, args, kwargs, timed)
    finally:
        IMITATION.seconds += time.perf_counter() - started - spent_inside


def around_collective(
    faults: Sequence[Any],
    kind: str,
    tensors: list[torch.Tensor],
    compute: Callable[[list[torch.Tensor]], list[torch.Tensor]],
    call: CollectiveCall | None = None,
) -> list[torch.Tensor]:
    """The tensors that a collective gives to this rank, with faults around it, the first outermost.

    `kind` is the name of the function of `torch.distributed` (`all_reduce`, `reduce_scatter_tensor`, `send`, ...) and
    `tensors` are what this rank contributes. `call` is what faults are told about it.
    """
    if not faults:
        return compute(tensors)
    token = _collective_now.set(call) if call is not None else None
    try:
        return _around_collective(faults, kind, tensors, compute)
    finally:
        if token is not None:
            _collective_now.reset(token)


def _around_collective(
    faults: Sequence[Any],
    kind: str,
    tensors: list[torch.Tensor],
    compute: Callable[[list[torch.Tensor]], list[torch.Tensor]],
) -> list[torch.Tensor]:
    if not faults:
        return compute(tensors)
    first, *others = faults
    if not hasattr(first, "collective"):
        return _around_collective(others, kind, tensors, compute)
    made: list[torch.Tensor] = first.collective(
        kind, tensors, lambda inner: _around_collective(others, kind, inner, compute)
    )
    return made
