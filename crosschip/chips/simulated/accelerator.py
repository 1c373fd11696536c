"""The part of `torch.accelerator` that torch cannot ask of a device registered from Python.

It finds and counts such a device, but waiting for it and its memory go to C++ that has nothing for it. While the
simulated chip is the accelerator of this process, these few functions of torch answer from here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from crosschip.chips.host import memory_bytes
from crosschip.chips.simulated.storage import MEMORY

__all__ = ["answer_for_the_accelerator", "memory_info", "memory_statistics"]


def memory_info(index: int = 0) -> tuple[int, int]:
    """Free and total bytes: the chip's memory is the host's."""
    total = memory_bytes() or 0
    return max(total - MEMORY.allocated, 0), total


def memory_statistics(index: int = 0) -> dict[str, int]:
    """Bytes in use, their peak, and the number of allocations, under torch's names. Nothing is held back."""
    return {
        "allocated_bytes.all.current": MEMORY.allocated,
        "allocated_bytes.all.peak": MEMORY.peak,
        "active_bytes.all.current": MEMORY.allocated,
        "active_bytes.all.peak": MEMORY.peak,
        "reserved_bytes.all.current": MEMORY.allocated,
        "reserved_bytes.all.peak": MEMORY.peak,
        "num_device_alloc": MEMORY.num_allocations,
        "num_alloc_retries": 0,
        "num_ooms": 0,
    }


def _nothing(*_: Any) -> None:
    """Calls end before they return, and no memory is held back."""


_ANSWERS: dict[str, Callable[..., Any]] = {
    "_accelerator_emptyCache": _nothing,
    "_accelerator_getDeviceStats": memory_statistics,
    "_accelerator_getMemoryInfo": memory_info,
    "_accelerator_isAllocatorInitialized": lambda: True,
    "_accelerator_resetAccumulatedStats": _nothing,
    "_accelerator_resetPeakStats": lambda index: MEMORY.reset_peak(),
    "_accelerator_synchronizeDevice": _nothing,
}


def answer_for_the_accelerator() -> None:
    """Let `torch.accelerator` wait for the chip and tell its memory. What this torch has not got stays away."""
    for name, answer in _ANSWERS.items():
        if hasattr(torch._C, name):
            setattr(torch._C, name, answer)
