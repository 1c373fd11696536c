"""The machine around the chip: its processor and its memory, as far as the operating system tells."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

__all__ = ["cpu_model", "cpu_vendor_id", "memory_bytes", "usable_cores"]


def _cpuinfo(key: str) -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.removeprefix(" ")
    return None


def _mac_brand() -> str | None:
    try:
        brand = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return brand.stdout.strip() or None


def cpu_model() -> str | None:
    """The processor's model name; None when the operating system does not tell."""
    found = _mac_brand() if platform.system() == "Darwin" else _cpuinfo("model name")
    return found or platform.processor() or None


def cpu_vendor_id() -> str | None:
    """The processor's vendor id, such as `GenuineIntel`; None where there is none."""
    if platform.system() == "Darwin":
        return "Apple" if platform.machine() == "arm64" else "GenuineIntel"
    return _cpuinfo("vendor_id")


def usable_cores() -> int:
    """The cores this process may use, which containers and `taskset` make fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int | None:
    """The machine's memory in bytes; None when the operating system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
