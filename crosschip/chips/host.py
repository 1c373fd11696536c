"""The machine around the chip: its processor and its memory, as far as the operating system tells."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from pathlib import Path

__all__ = ["available_memory_bytes", "cpu_model", "cpu_vendor_id", "memory_bytes", "usable_cores"]


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


def available_memory_bytes() -> int | None:
    """Bytes that the system can still give out; None when it does not tell."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:  # elsewhere than on Linux
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None
