"""How much memory this process and its chip use now, and how much is left, as far as they tell.

Needs torch only, but for what is left: reproducers hold these functions' source.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from crosschip.chips.find import device_module
from crosschip.chips.host import available_memory_bytes

__all__ = ["MemoryReading", "garbage_set_aside", "memory_left", "read_memory"]

_CGROUP = Path("/sys/fs/cgroup")
_LIMITS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))


@dataclass(frozen=True)
class MemoryReading:
    """Bytes in use; None where nobody tells.

    `resident` is the host's memory that the process holds, `allocated` what the C library has handed out of it (exact,
    while the resident memory also has what allocators keep), `device` what tensors use on the chip.
    """

    resident: int | None
    allocated: int | None
    device: int | None


@contextmanager
def garbage_set_aside() -> Iterator[None]:
    """Let a collection look at new objects only: each reading makes one, and torch brings 300,000 old ones."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def read_memory(device: torch.device) -> MemoryReading:
    """Read it after a collection, so that garbage that waits for one does not count."""
    gc.collect()
    return MemoryReading(_resident(), _allocated(), _on_device(device))


def memory_left(device: torch.device) -> tuple[int | None, int | None]:
    """Free bytes of the host, within what a container may use, and of the device."""
    return _host_left(), _device_left(device)


def _resident() -> int | None:
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


_MALLINFO = (
    *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
    *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
)


class _Mallinfo(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33 and later."""

    _fields_ = [(name, ctypes.c_size_t) for name in _MALLINFO]


@functools.cache
def _mallinfo() -> Callable[[], _Mallinfo] | None:
    ask = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if ask is None:
        return None
    ask.restype = _Mallinfo
    found: Callable[[], _Mallinfo] = ask
    return found


def _allocated() -> int | None:
    """Over all arenas, and what is mapped for large blocks; the interpreter's small objects lie outside."""
    ask = _mallinfo()
    if ask is None:
        return None
    said = ask()
    return int(said.uordblks + said.hblkhd)


def _on_device(device: torch.device) -> int | None:
    ask = getattr(device_module(device.type), "memory_allocated", None) if device.type != "cpu" else None
    if ask is None:
        return None
    try:
        return int(ask(device))
    except (RuntimeError, NotImplementedError, TypeError):  # offered and not made
        return None


def _host_left() -> int | None:
    found = [left for left in (available_memory_bytes(), *map(_left_in_group, _LIMITS)) if left is not None]
    return min(found, default=None)


def _left_in_group(names: tuple[str, str]) -> int | None:
    try:
        limit, used = [(_CGROUP / name).read_text(encoding="ascii").strip() for name in names]
    except OSError:
        return None
    return int(limit) - int(used) if limit.isdecimal() else None


def _device_left(device: torch.device) -> int | None:
    ask = getattr(device_module(device.type), "mem_get_info", None) if device.type != "cpu" else None
    if ask is None:
        return None
    try:
        return int(ask(device)[0])
    except (RuntimeError, NotImplementedError, TypeError):
        return None
