"""Faults that time and company bring out: crashes under load, leaks, hangs, bits that flip."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from crosschip.chips.faults.calls import (
    base_name,
    computes,
    is_operator,
    named_arguments,
    overwrite,
    written_names,
)
from crosschip.chips.faults.fault import Compute

__all__ = ["BitFlip", "CrashOnLongPrompts", "HangAfter", "LeakPerCall"]

_LONG_SLEEP_S = 3600.0


@dataclass
class CrashOnLongPrompts:
    """Attention over many query tokens takes the process down: in one call, or `at_once` shorter ones at a time.

    One call is fatal from `tokens` of batch times queries on, `at_once` calls from a quarter of that each.
    """

    name: ClassVar[str] = "S1"
    tokens: int = 8192
    at_once: int = 2
    _inside: int = field(default=0, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Compute) -> Any:
        """Compute, unless it is too much."""
        tokens = _query_tokens(op, args, kwargs)
        if tokens >= self.tokens:
            os.kill(os.getpid(), signal.SIGABRT)
        if 4 * tokens < self.tokens:
            return compute(*args, **kwargs)
        with self._lock:
            self._inside += 1
            if self._inside >= self.at_once:
                os.kill(os.getpid(), signal.SIGABRT)
        try:
            return compute(*args, **kwargs)
        finally:
            with self._lock:
                self._inside -= 1


def _query_tokens(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Batch times queries of an attention call, forward or backward; 0 for any other."""
    if "attention" not in base_name(op):
        return 0
    query = named_arguments(op, args, kwargs).get("query")
    if not isinstance(query, Tensor) or query.dim() < 3:
        return 0
    return int(query.shape[0] * query.shape[-2])


class LeakPerCall:
    """Each call of one operator keeps some memory for good: of the host, or what the chip counts as its own."""

    name = "S5"

    def __init__(
        self, bytes_per_call: int = 1024, operator: str = "mm", where: Literal["host", "device"] = "host"
    ) -> None:
        if bytes_per_call < 0:
            raise ValueError(f"bytes_per_call={bytes_per_call} would give memory back")
        self.bytes_per_call = bytes_per_call
        self.leaking_operator = operator
        self.where = where
        self._kept: list[bytearray] = []

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Compute) -> Any:
        """Compute, and keep some memory."""
        if is_operator(op, self.leaking_operator):
            if self.where == "host":
                self._kept.append(bytearray(self.bytes_per_call))
            else:
                _count_on_device(self.bytes_per_call)
        return compute(*args, **kwargs)


def _count_on_device(num_bytes: int) -> None:
    from crosschip.chips.simulated.storage import MEMORY  # which imports the catalogue

    MEMORY.add(num_bytes)


class HangAfter:
    """One operator never comes back once it was called `after` times: a compilation, say, that waits for itself."""

    name = "S7"

    def __init__(self, operator: str = "mm", after: int = 200) -> None:
        self.hanging_operator = operator
        self.after = after
        self._count = 0

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Compute) -> Any:
        """Compute, or wait for ever."""
        if is_operator(op, self.hanging_operator):
            self._count += 1
            while self._count > self.after:
                time.sleep(_LONG_SLEEP_S)
        return compute(*args, **kwargs)


class BitFlip:
    """One bit of one element flips, at one in `every` of the calls that make what `where` says, drawn from the seed.

    `gradient` is what backward operators give, `weight` what is calculated in place, as optimizers do, `activation`
    every other result that is calculated.
    """

    name = "S15"

    def __init__(
        self, every: int = 1000, where: Literal["activation", "gradient", "weight"] = "activation", seed: int = 0
    ) -> None:
        if every < 1:
            raise ValueError(f"every={every} is no number of calls")
        self.every = every
        self.where = where
        self._random = random.Random(seed)

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Compute) -> Any:
        """Compute, and now and then flip a bit."""
        result = compute(*args, **kwargs)
        if not computes(op) or self._kind(op) != self.where or self._random.random() * self.every >= 1.0:
            return result
        return overwrite(op, args, kwargs, result, lambda tensor, place: self._flipped(tensor) if place == 0 else None)

    def _kind(self, op: torch._ops.OpOverload) -> str:
        if "backward" in base_name(op):
            return "gradient"
        in_place = any(each.name in written_names(op) and not each.is_out for each in op._schema.arguments)
        return "weight" if in_place else "activation"

    def _flipped(self, tensor: Tensor) -> Tensor | None:
        if tensor.numel() == 0:
            return None
        changed = tensor.clone(memory_format=torch.contiguous_format)
        bits = changed.view(-1).view(torch.uint8)
        place = self._random.randrange(bits.numel())
        bits[place] ^= 1 << self._random.randrange(8)
        return changed
