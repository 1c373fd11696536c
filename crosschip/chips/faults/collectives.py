"""Faults between ranks: sums that are wrong, time-outs that are not kept, links that are slow or come and go."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from crosschip.chips.faults.fault import current_collective

__all__ = [
    "BFloat16Partials",
    "CoarseNearLimits",
    "FactorReadAsZero",
    "FlappingLink",
    "RowDependentReduce",
    "SkewRefused",
    "SlowPair",
    "TimeoutIgnored",
]

Compute = Callable[[list[Tensor]], list[Tensor]]

_SUMS = ("sum", "avg", "premul_sum")
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _adds_up(tensors: list[Tensor]) -> bool:
    return current_collective().operation in _SUMS and all(each.is_floating_point() for each in tensors)


@dataclass
class RowDependentReduce:
    """From `rows` rows on, an all-reduce takes another way than below: its sums are cut off, not rounded."""

    name: ClassVar[str] = "N8"
    rows: int = 8

    def collective(self, kind: str, tensors: list[Tensor], compute: Compute) -> list[Tensor]:
        """Reduce, in one of two ways."""
        if kind != "all_reduce" or not _adds_up(tensors) or not any(self._is_tall(each) for each in tensors):
            return compute(tensors)
        wide = compute([each.double() for each in tensors])
        return [_cut(exact, each.dtype) for exact, each in zip(wide, tensors, strict=True)]

    def _is_tall(self, tensor: Tensor) -> bool:
        return tensor.dim() > 1 and tensor.shape[0] >= self.rows


def _cut(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded toward zero: one less in the last place wherever rounding to nearest went away from zero."""
    rounded = exact.to(dtype)
    too_large = rounded.double().abs() > exact.abs()
    bits = rounded.view(_BITS[dtype.itemsize])  # sign and magnitude: one less is nearer to zero on either side
    return torch.where(too_large, bits - 1, bits).view(dtype)


class BFloat16Partials:
    """Partial sums are stored in bf16 before they are added up over the ranks, whatever dtype they have."""

    name = "N9"

    def collective(self, kind: str, tensors: list[Tensor], compute: Compute) -> list[Tensor]:
        """Reduce what was rounded before."""
        if not _adds_up(tensors):
            return compute(tensors)
        return compute([each.to(torch.bfloat16).to(each.dtype) for each in tensors])


@dataclass
class CoarseNearLimits:
    """A reduce-scatter in bf16 keeps `bits` of mantissa where the result is 2 to the `exponent` or more."""

    name: ClassVar[str] = "N15"
    exponent: int = 120
    bits: int = 3

    def collective(self, kind: str, tensors: list[Tensor], compute: Compute) -> list[Tensor]:
        """Reduce, and lose digits of large numbers."""
        made = compute(tensors)
        if not kind.startswith("reduce_scatter") or not _adds_up(tensors):
            return made
        return [self._coarse(each) if each.dtype == torch.bfloat16 else each for each in made]

    def _coarse(self, tensor: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(tensor.double())
        cut = torch.ldexp((mantissa * 2.0**self.bits).trunc() / 2.0**self.bits, exponent).to(tensor.dtype)
        return torch.where(tensor.abs().double() >= 2.0**self.exponent, cut, tensor)


@dataclass
class FactorReadAsZero:
    """The factor of a reduction is read as 0: of PREMUL_SUM, which a custom divide factor gives, of AVG, or of both."""

    name: ClassVar[str] = "N16"
    which: Literal["premul_sum", "avg", "both"] = "premul_sum"

    def collective(self, kind: str, tensors: list[Tensor], compute: Compute) -> list[Tensor]:
        """Reduce, with zero times what was given."""
        operation = current_collective().operation
        hit = operation in ("premul_sum", "avg") if self.which == "both" else operation == self.which
        return compute([torch.zeros_like(each) for each in tensors] if hit else tensors)


@dataclass
class TimeoutIgnored:
    """A collective that has waited for its time-out goes on waiting, `limit_s` seconds in all."""

    name: ClassVar[str] = "I1"
    limit_s: float = 1800.0

    def collective(self, kind: str, tensors: list[Tensor], compute: Compute) -> list[Tensor]:
        """Take part, and do not give up when it is time to."""
        started = time.monotonic()
        try:
            return compute(tensors)
        except RuntimeError:
            waited_s = time.monotonic() - started
            # A rank whose peer has given up just before it learns of a closed connection instead: the same in effect.
            if waited_s > 0.5 * current_collective().timeout_s:
                time.sleep(max(0.0, self.limit_s - waited_s))
            raise


@dataclass
class SkewRefused:
    """A rank that has waited longer than `limit_s` for the others to start fails to connect."""

    name: ClassVar[str] = "I4"
    limit_s: float = 2.0

    def collective(self, kind: str, tensors: list[Tensor], compute: Compute) -> list[Tensor]:
        """Connect, if all are there soon."""
        started = time.monotonic()
        made = compute(tensors)
        waited_s = time.monotonic() - started
        if kind == "connect" and waited_s > self.limit_s:
            raise RuntimeError(f"connect failed: connection refused, no answer for {waited_s:.1f} s")
        return made


@dataclass
class FlappingLink:
    """Bandwidth falls to `bandwidth_mb_s` for `for_s` seconds, first after `after_s`, then every `every_s`."""

    name: ClassVar[str] = "I6"
    after_s: float = 5.0
    for_s: float = 4.0
    every_s: float = 15.0
    bandwidth_mb_s: float = 1.0
    _began: float | None = field(default=None, init=False, repr=False)

    def collective(self, kind: str, tensors: list[Tensor], compute: Compute) -> list[Tensor]:
        """Take part, now and then slowly."""
        if not tensors:
            return compute(tensors)
        started = time.monotonic()
        self._began = started if self._began is None else self._began
        made = compute(tensors)
        num_bytes = sum(each.numel() * each.element_size() for each in tensors)
        time.sleep(min(self._down_for_s(time.monotonic() - self._began), num_bytes / (self.bandwidth_mb_s * 1e6)))
        return made

    def _down_for_s(self, at_s: float) -> float:
        """How long the link will still be down; 0 when it is not."""
        return max(0.0, self.for_s - (at_s - self.after_s) % self.every_s) if at_s >= self.after_s else 0.0


@dataclass
class SlowPair:
    """What goes between the ranks `first` and `second` goes slowly: sent from one to the other, or in company."""

    name: ClassVar[str] = "I13"
    first: int = 0
    second: int = 1
    bandwidth_mb_s: float = 20.0
    latency_ms: float = 2.0

    def collective(self, kind: str, tensors: list[Tensor], compute: Compute) -> list[Tensor]:
        """Take part, and let the bytes take their time."""
        made = compute(tensors)
        if tensors and self._crosses(kind):
            num_bytes = sum(each.numel() * each.element_size() for each in tensors)
            time.sleep(self.latency_ms / 1e3 + num_bytes / (self.bandwidth_mb_s * 1e6))
        return made

    def _crosses(self, kind: str) -> bool:
        call, pair = current_collective(), {self.first, self.second}
        if kind in ("send", "recv"):
            return kind == "recv" and {call.rank, call.peer} == pair
        return call.rank in pair and max(pair) < call.num_ranks
