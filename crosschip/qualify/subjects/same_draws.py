"""Subjects that draw random numbers in their steps: the same numbers each time, and on every device.

Two devices never draw the same numbers from one seed, and a step that is taken twice draws others. So where steps are
compared, numbers are drawn on the CPU from the step's own seed, and dropout is left out. Whether the device draws
well by itself is for the exam of the operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from crosschip.qualify.subjects.subject import StepMeasure, Workload
from crosschip.qualify.tracing.inputs import operator_named
from crosschip.qualify.tracing.trace import Trace

__all__ = ["SameDraws", "draws_numbers"]

_Result = TypeVar("_Result")
_SHARES = ("p", "dropout_p", "dropout")  # arguments that say how much is dropped
_DROPPING = ("dropout", "attention", "lstm", "gru", "rnn")  # operators that draw only what they drop


def draws_numbers(trace: Trace) -> bool:
    """Whether the subject's step draws random numbers; the choice of tokens, which it does not compute on, aside."""
    return any(
        _draws(operator_named(call.operator), call.args, call.kwargs)
        for call in trace.calls
        if set(call.phases) != {"sampling"}
    )


class SameDraws:
    """A workload whose step `index` draws the same numbers on every device; the interface is `Workload`'s."""

    def __init__(self, workload: Workload, seed: int) -> None:
        self._workload, self._seed = workload, seed
        self.module, self.notes = workload.module, workload.notes

    @property
    def phase(self) -> str:
        """What a serving step is doing now."""
        return self._workload.phase

    @phase.setter
    def phase(self, name: str) -> None:
        self._workload.phase = name

    def train_step(self, index: int) -> StepMeasure:
        """As the workload's."""
        return self._drawing(index, lambda: self._workload.train_step(index))

    def serve_step(self) -> torch.Tensor:
        """As the workload's."""
        return self._drawing(0, self._workload.serve_step)

    def serve_rows(self, rows: list[int]) -> torch.Tensor:
        """As the workload's."""
        return self._drawing(0, lambda: self._workload.serve_rows(rows))

    def _drawing(self, index: int, run: Callable[[], _Result]) -> _Result:
        with _drawn_on_the_cpu(self._seed * 1009 + index):
            return run()


@contextmanager
def _drawn_on_the_cpu(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]), _WithoutDropout(), _DrawnOnTheCpu():  # type: ignore[no-untyped-call]
        torch.default_generator.manual_seed(seed)
        yield


class _WithoutDropout(TorchFunctionMode):
    """Functions that drop give back what they were given; attention drops nothing."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name.strip("_").endswith("dropout") or name.endswith(("dropout1d", "dropout2d", "dropout3d")):
            return args[0] if args else kwargs["input"]
        if name == "scaled_dot_product_attention":
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs |= {"dropout_p": 0.0} if "dropout_p" in kwargs else {}
        return func(*args, **kwargs)


class _DrawnOnTheCpu(TorchDispatchMode):
    """Calls that draw numbers are made on the CPU in fp32, so that every dtype gets the same, and copied back."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("generator") is not None or not _draws(func, args, kwargs):
            return func(*args, **kwargs)
        device, dtype = _home(args, kwargs)
        result = func(*tree_map(_on_cpu, tuple(args)), **tree_map(_on_cpu, kwargs))
        if func._schema.is_mutable:
            return args[0].copy_(result)
        return tree_map(lambda each: _back(each, device, dtype), result)


def _draws(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call draws numbers; operators with a share that is dropped may be called without."""
    if torch.Tag.nondeterministic_seeded not in op.tags:
        return False
    given = dict(zip((each.name for each in op._schema.arguments), args, strict=False)) | kwargs
    shares = [given.get(name) for name in _SHARES if any(each.name == name for each in op._schema.arguments)]
    drops = any(each in op._schema.name for each in _DROPPING)
    return not (drops and all(not share for share in shares))


def _home(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[torch.device, torch.dtype | None]:
    """Where the call's result belongs, and its floating-point dtype."""
    first = next((each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)), None)
    device = kwargs.get("device") or (first.device if first is not None else torch.device("cpu"))
    dtype = kwargs.get("dtype") or (first.dtype if first is not None else None)
    return torch.device(device), dtype if dtype is not None and dtype.is_floating_point else None


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to("cpu", torch.float32 if value.is_floating_point() else value.dtype, copy=True)
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float32
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _back(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, dtype if dtype is not None and value.is_floating_point() else value.dtype)
