"""A rank's place among the ranks: its chip, its process group, and a store over which the ranks agree."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from crosschip.chips import Chip, synchronize

__all__ = ["Group", "backend_for", "join", "leave", "stay_on_this_machine"]


@dataclass
class Group:
    """The group as one rank sees it."""

    rank: int
    num_ranks: int
    chip: Chip
    store: Any
    met_at: float = field(default_factory=time.monotonic)
    _num_agreed: int = field(default=0, repr=False)
    _pair: Any = field(default=None, repr=False)

    @property
    def device(self) -> torch.device:
        """The rank's device."""
        return self.chip.device

    def agree(self, wish: bool) -> bool:
        """What rank 0 wishes, on every rank; asked in the same order on all, and not over the chip's links."""
        key = f"agreed-{self._num_agreed}"
        self._num_agreed += 1
        if self.rank == 0:
            self.store.set(key, b"1" if wish else b"0")
            return wish
        return bool(self.store.get(key) == b"1")

    def agree_number(self, number: int) -> int:
        """Rank 0's number, on every rank."""
        key = f"agreed-{self._num_agreed}"
        self._num_agreed += 1
        if self.rank == 0:
            self.store.set(key, str(number).encode())
            return number
        return int(self.store.get(key))

    def pair(self) -> Any:
        """The group of ranks 0 and 1; all ranks have to ask for it the first time."""
        if self._pair is None:
            self._pair = dist.new_group([0, 1])
        return self._pair

    def synchronize(self) -> None:
        """Wait for the chip."""
        synchronize(self.chip)


def backend_for(device: torch.device) -> str:
    """The collectives that belong to a device: gloo for the CPU, `sim_ccl` for the simulated chip, else its default."""
    if device.type == "cpu":
        return "gloo"
    return str(dist.get_default_backend_for_device(device))


def join(chip: Chip, rank: int, num_ranks: int, store: Any, timeout_s: float) -> Group:
    """Meet the other ranks over the store; the group's collectives have this time-out."""
    if chip.device.index is not None and chip.device.type not in ("cpu", "sim"):
        torch.accelerator.set_device_index(chip.device.index)
    dist.init_process_group(
        backend_for(chip.device),
        store=PrefixStore("group", store),
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=timeout_s),
    )
    return Group(rank, num_ranks, chip, PrefixStore("agreed", store))


def leave() -> None:
    """End the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def stay_on_this_machine() -> None:
    """Let gloo talk over the loopback only, unless the user has chosen an interface."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
