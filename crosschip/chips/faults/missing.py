"""Faults of a chip's software: operators that are missing or run on the host, dtypes that are not there."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from crosschip.chips.faults.calls import dtypes_of, is_operator
from crosschip.chips.faults.fault import Compute

__all__ = ["Float64Missing", "OperatorMissing", "SilentFallback"]


class SilentFallback:
    """One operator runs somewhere else without a word: right, and `slowdown` times as slow.

    `transfer_s` is what the way there and back costs at least, however small the tensors are.
    """

    name = "W1"

    def __init__(self, slowdown: float = 100.0, operator: str = "silu", transfer_s: float = 1e-3) -> None:
        if slowdown < 1.0 or transfer_s < 0.0:
            raise ValueError(f"slowdown={slowdown} and transfer_s={transfer_s} would make it faster")
        self.slowdown = slowdown
        self.slow_operator = operator
        self.transfer_s = transfer_s

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Compute) -> Any:
        """Compute, and let time pass."""
        if not is_operator(op, self.slow_operator):
            return compute(*args, **kwargs)
        started = time.perf_counter()
        result = compute(*args, **kwargs)
        time.sleep(self.transfer_s + (time.perf_counter() - started) * (self.slowdown - 1.0))
        return result


class OperatorMissing:
    """One operator has no kernel on the chip."""

    name = "W3"

    def __init__(self, operator: str = "topk") -> None:
        self.missing_operator = operator

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Compute) -> Any:
        """Raise what torch's dispatcher raises for a kernel that is not there."""
        if not is_operator(op, self.missing_operator):
            return compute(*args, **kwargs)
        raise NotImplementedError(
            f"Could not run '{op.name()}' with arguments from the 'PrivateUse1' backend. This could be because the "
            "operator doesn't exist for this backend, or was omitted during the selective/custom build process (if "
            "using custom build)."
        )


@dataclass
class Float64Missing:
    """The chip has no float64: whatever reads, makes or names it raises."""

    name: ClassVar[str] = "W5"

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Compute) -> Any:
        """Raise for float64."""
        if torch.float64 in dtypes_of(args, kwargs):
            raise RuntimeError(f"{op.name()}: float64 is not supported on this device, use float32 instead")
        return compute(*args, **kwargs)
