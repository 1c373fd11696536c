"""What a trainer's rank and its sidecar share: one piece of memory without a name, so that nothing is left behind.

Both map the same descriptor; the kernel takes the memory back when both are gone, however they ended. It lies in parts:

    counters      int64: outer steps committed, the trainer's sign of life, where a group stands that began anew, the
                  sidecar's sign of life, how often another group's state was taken over
    exchange      fp32 [n]: what is to be averaged, and the mean
    residual      fp32 [n]: what compression has lost so far
    outer         fp32 [2, 2, n]: DiLoCo's parameters and momentum, in two slots (see `outer_state`)
    state         bytes: the training state for a group that joins, filled only when one needs it
"""

from __future__ import annotations

import mmap
import os
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Layout", "SharedMemory", "checksum_of", "open_descriptor"]

_PAGE = 4096
_NUM_COUNTERS = _PAGE // 8
_COMMITS, _BEATS, _BEGUN, _SIDECAR_BEATS, _HEALINGS = 0, 1, 2, 3, 4


@dataclass(frozen=True)
class Layout:
    """Sizes of the parts. Untouched pages cost nothing, so `num_state_bytes` may be generous."""

    num_elements: int
    num_state_bytes: int
    has_outer_state: bool

    @property
    def outer_shape(self) -> tuple[int, int, int]:
        """Slots, parameters and momentum, elements."""
        return (2, 2, self.num_elements if self.has_outer_state else 0)

    def starts(self) -> list[int]:
        """Where exchange, residual, outer and state begin, and where all ends; each on a page."""
        starts = [_PAGE]
        slots, kinds, elements = self.outer_shape
        for size in (4 * self.num_elements, 4 * self.num_elements, 4 * slots * kinds * elements, self.num_state_bytes):
            starts.append(starts[-1] + -(-size // _PAGE) * _PAGE)
        return starts


def open_descriptor(layout: Layout) -> int:
    """A descriptor of new, zeroed memory of the layout's size, which a child process may inherit."""
    if hasattr(os, "memfd_create"):  # Linux: no file system, so no limit like that of a container's /dev/shm
        descriptor = os.memfd_create("crosschip-groups")
    else:
        directory = "/dev/shm" if Path("/dev/shm").is_dir() else None
        with tempfile.TemporaryFile(dir=directory) as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, layout.starts()[-1])
    return descriptor


def checksum_of(flat: torch.Tensor) -> int:
    """32 bits of the bytes of a contiguous tensor on the CPU."""
    return zlib.crc32(flat.numpy().data)


class SharedMemory:
    """The parts as tensors over the memory behind `descriptor`."""

    def __init__(self, descriptor: int, layout: Layout) -> None:
        self.layout = layout
        self._map = mmap.mmap(descriptor, layout.starts()[-1])
        exchange, residual, outer, state, end = layout.starts()
        self._counters = torch.frombuffer(self._map, dtype=torch.int64, count=_NUM_COUNTERS)
        self.exchange = self._floats(exchange, layout.num_elements)
        self.residual = self._floats(residual, layout.num_elements)
        slots, kinds, elements = layout.outer_shape
        self.outer = self._floats(outer, slots * kinds * elements).view(layout.outer_shape)
        self._state_start, self._state_end = state, end

    def _floats(self, start: int, count: int) -> torch.Tensor:
        if count == 0:
            return torch.empty(0)
        return torch.frombuffer(self._map, dtype=torch.float32, count=count, offset=start)

    def state(self, num_bytes: int) -> torch.Tensor:
        """The first `num_bytes` of the part for the training state, uint8."""
        assert num_bytes <= self.layout.num_state_bytes, "Layout.num_state_bytes was too small"
        if num_bytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self._map, dtype=torch.uint8, count=num_bytes, offset=self._state_start)

    def forget_state(self) -> None:
        """Give the pages of the training state back to the system, where it can take them."""
        if hasattr(mmap, "MADV_REMOVE"):
            self._map.madvise(mmap.MADV_REMOVE, self._state_start, self._state_end - self._state_start)

    @property
    def commits(self) -> int:
        """Outer steps committed. It is written last, in one store, so that it never promises what is not there."""
        return int(self._counters[_COMMITS])

    @commits.setter
    def commits(self, value: int) -> None:
        self._counters[_COMMITS] = value

    @property
    def begun(self) -> int:
        """See `agreement.begun_anew`; it counts until an outer step is committed."""
        return int(self._counters[_BEGUN])

    @begun.setter
    def begun(self, value: int) -> None:
        self._counters[_BEGUN] = value

    @property
    def healings(self) -> int:
        """How often another group's state was written over this one's outer state. It is counted before the first
        byte: a copy between two equal numbers is of one state.
        """
        return int(self._counters[_HEALINGS])

    def count_healing(self) -> None:
        """Another group's state is about to be written."""
        self._counters[_HEALINGS] += 1

    @property
    def beats(self) -> int:
        """The trainer's sign of life: a number that grows."""
        return int(self._counters[_BEATS])

    def beat(self) -> None:
        """Say that the trainer lives."""
        self._counters[_BEATS] += 1

    @property
    def sidecar_beats(self) -> int:
        """The sidecar's sign of life: a number that grows."""
        return int(self._counters[_SIDECAR_BEATS])

    def beat_as_sidecar(self) -> None:
        """Say that the sidecar lives."""
        self._counters[_SIDECAR_BEATS] += 1
