"""The environment of every process that examines a chip. It must stand before torch is imported; no torch here."""

from __future__ import annotations

import os
from collections.abc import Mapping

__all__ = ["examination_environment"]

# An operator that the chip lacks is to be an error, not a silent trip to the CPU. Every child gets all switches: one
# of another vendor's does nothing.
_FALLBACK_FORBIDDEN = {
    "TORCH_NPU_FALLBACK_CPU_DISABLE": "1",  # Ascend
    "ENABLE_FALLBACK_TO_CPU": "0",  # Cambricon
    "PYTORCH_ENABLE_MPS_FALLBACK": "0",  # Apple
    "PYTORCH_DEBUG_XPU_FALLBACK": "1",  # Intel: at least a warning
}


def examination_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What the user set, and no silent fallback; half of the cores compute unless the user says otherwise.

    Exams are made of many small calls, and a thread that waits for another that was put aside waits long: on two busy
    cores the trace of the first recipe took 71 s with two threads and 14 s with one.
    """
    threads = {"OMP_NUM_THREADS": str(max(1, _usable_cores() // 2))}
    return {**threads, **environment, **_FALLBACK_FORBIDDEN}


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
