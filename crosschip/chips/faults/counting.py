"""How many calls of a subject a planted fault really changed: a fault without effect is not one that was missed."""

from __future__ import annotations

import resource
import time
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from crosschip.chips.faults.calls import base_name, is_random, named_arguments, tensors_in, with_tensors, written_names
from crosschip.chips.faults.fault import Compute

__all__ = ["CountingFault"]

# A call counts as late when the fault lets this much time pass without computing: more than a clock's error.
_LATE_S = 1e-4


class CountingFault:
    """A fault with a count around it. Plant it in the fault's place; it gives the same results.

    Each counter is by operator (`mm`): `calls` that arrived, `changed` ones whose result is not bit for bit the honest
    one (or does not share memory where the honest one does), `raised` ones that the honest chip would have computed,
    `late` ones during which the fault slept. Random operators and ones that return uninitialised memory are not
    compared.
    """

    def __init__(self, fault: Any) -> None:
        self.fault = fault
        self.name: str = fault.name
        self.calls: Counter[str] = Counter()
        self.changed: Counter[str] = Counter()
        self.raised: Counter[str] = Counter()
        self.late: Counter[str] = Counter()
        if hasattr(fault, "collective"):
            self.collective = fault.collective

    @property
    def num_affected(self) -> int:
        """All calls that were changed, late or refused."""
        return sum((self.changed + self.raised + self.late).values())

    def document(self) -> dict[str, Any]:
        """The counts for JSON; operators that were not affected are left out."""
        counts = {"changed": self.changed, "raised": self.raised, "late": self.late}
        return {
            "fault": self.name,
            "num_calls": sum(self.calls.values()),
            **{word: dict(counter.most_common()) for word, counter in counts.items()},
        }

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Compute) -> Any:
        """Compute the call honestly on the side, then as the fault does."""
        name = base_name(op)
        self.calls[name] += 1
        if not hasattr(self.fault, "operator"):
            return compute(*args, **kwargs)
        if is_random(op) or name.startswith(("empty", "new_empty", "resize")):
            return self.fault.operator(op, args, kwargs, compute)
        honest = _honest(op, args, kwargs)
        watch = _Watch(compute)
        try:
            result = self.fault.operator(op, args, kwargs, watch)
        except Exception:
            if not isinstance(honest, Exception):
                self.raised[name] += 1
            raise
        if watch.slept_s() > _LATE_S:
            self.late[name] += 1
        if not _same(_outcome(op, args, kwargs, result), honest):
            self.changed[name] += 1
        return result


class _Watch:
    """How long a fault slept outside of `compute`: time that passed after it had given up the processor by itself."""

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self._began = _clocks()
        self._inside = (0.0, 0)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = _clocks()
        try:
            return self._compute(*args, **kwargs)
        finally:
            after = _clocks()
            self._inside = self._inside[0] + after[0] - before[0], self._inside[1] + after[1] - before[1]

    def slept_s(self) -> float:
        now = _clocks()
        idle_s, num_waits = (now[each] - self._began[each] - self._inside[each] for each in (0, 1))
        return idle_s if num_waits > 0 else 0.0


def _clocks() -> tuple[float, int]:
    """Seconds in which this thread did not work, and how often it gave up the processor by itself."""
    used = resource.getrusage(_THREAD)
    return time.perf_counter() - used.ru_utime - used.ru_stime, used.ru_nvcsw


_THREAD = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)  # Linux counts threads apart


def _honest(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The outcome of the CPU's own call, on copies of what it writes; an exception if it raises one."""
    written = written_names(op)
    names = [each.name for each in op._schema.arguments]
    spare_args = tuple(_copied(arg) if name in written else arg for name, arg in zip(names, args, strict=False))
    spare_kwargs = {name: _copied(arg) if name in written else arg for name, arg in kwargs.items()}
    try:
        return _outcome(op, spare_args, spare_kwargs, op(*spare_args, **spare_kwargs))
    except Exception as error:  # whatever the operator raises, it raises it on the honest chip as well
        return error


def _outcome(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> list[Tensor]:
    """The tensors that a call returns or, when it returns nothing, those it has written."""
    if result is not None:
        return list(tensors_in(result))
    named = named_arguments(op, args, kwargs)
    return list(tensors_in([value for name, value in named.items() if name in written_names(op)]))


def _copied(value: Any) -> Any:
    return with_tensors(value, torch.clone)


def _same(found: list[Tensor], honest: Any) -> bool:
    if isinstance(honest, Exception) or len(found) != len(honest):
        return False
    return all(_same_bits(one, other) for one, other in zip(found, honest, strict=True))


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if one.data_ptr() == other.data_ptr() and one.stride() == other.stride():
        return True
    if one.layout != torch.strided or one.is_quantized:
        return bool(torch.equal(one, other))
    sized = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(one.dtype.itemsize)
    if sized is None:  # complex numbers of 128 bits
        one, other, sized = torch.view_as_real(one), torch.view_as_real(other), torch.int64
    return bool(torch.equal(one.contiguous().view(sized), other.contiguous().view(sized)))
