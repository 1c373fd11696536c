"""The ranks that train one model together: joining them, agreeing with them, and leaving.

A rank is one process with one device. What starts the ranks (`torchrun`, or `crosschip train --nproc N`) tells each its
place in the environment variables RANK, WORLD_SIZE and LOCAL_RANK. A process that nobody gave a place is alone: it has
no process group, and every agreement is with itself and costs nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["ALONE", "PATIENCE", "Alone", "Ranks", "World", "join_world", "local_rank", "world_size"]

Made = TypeVar("Made")

# Ranks that wait for rank 0 to tokenise a data set, to write samples or a checkpoint wait longer than for a collective.
# A rank that died ends the wait all the same: its connections close.
PATIENCE = timedelta(days=7)


def world_size() -> int:
    """The number of ranks that this process was started as one of."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This rank's place on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


class World(Protocol):
    """What a training step and its loop need of the other ranks. All ranks must call alike, in the same order."""

    @property
    def rank(self) -> int:
        """This rank's number."""

    @property
    def size(self) -> int:
        """The number of ranks."""

    @property
    def group(self) -> ProcessGroup | None:
        """Gloo's process group for what takes long on one rank; None for a process alone."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor of the device over the ranks, the same on all."""

    def norm(self, part: Tensor) -> Tensor:
        """The norm of a vector of which each rank holds the norm of its own part."""

    def totals(self, counts: Sequence[int]) -> list[int]:
        """Each of these counts of the host, summed over the ranks."""

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers."""

    def from_rank_zero(self, make: Callable[[], Made]) -> Made:
        """What `make` gives on rank 0, on every rank; the others wait for it, however long it takes."""

    def from_all(self, item: Made) -> list[Made]:
        """What each rank hands in, in the order of ranks, on every rank."""

    def rank_zero_first(self) -> AbstractContextManager[None]:
        """Within the block, rank 0 goes first and the others follow, to find what it left in files."""


@dataclass(frozen=True)
class Alone:
    """A world of one process."""

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor."""
        return tensor

    def norm(self, part: Tensor) -> Tensor:
        """The norm."""
        return part

    def totals(self, counts: Sequence[int]) -> list[int]:
        """The counts."""
        return list(counts)

    def largest(self, number: int) -> int:
        """The number."""
        return number

    def from_rank_zero(self, make: Callable[[], Made]) -> Made:
        """What `make` gives."""
        return make()

    def from_all(self, item: Made) -> list[Made]:
        """The one item."""
        return [item]

    def rank_zero_first(self) -> AbstractContextManager[None]:
        """Nothing to wait for."""
        return nullcontext()


ALONE = Alone()


class Ranks:
    """Several ranks, joined by torch's collectives of the device and, for what the host has to say, gloo."""

    def __init__(self, device: torch.device, patient: ProcessGroup) -> None:
        from torch import distributed

        self._distributed = distributed
        self.group: ProcessGroup | None = patient
        self.device = device
        self.rank = distributed.get_rank()
        self.size = distributed.get_world_size()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks."""
        summed = tensor.clone()
        self._distributed.all_reduce(summed)
        return summed

    def norm(self, part: Tensor) -> Tensor:
        """The norm over the ranks; norms are gathered, because their squares may leave fp32's range."""
        gathered = [torch.empty_like(part) for _ in range(self.size)]
        self._distributed.all_gather(gathered, part)
        parts = torch.stack(gathered)
        largest = parts.amax().clamp(min=torch.finfo(parts.dtype).tiny)
        return torch.linalg.vector_norm(parts / largest) * largest

    def totals(self, counts: Sequence[int]) -> list[int]:
        """Sums over the ranks."""
        return self._on_host(list(counts), self._distributed.ReduceOp.SUM)

    def largest(self, number: int) -> int:
        """The largest over the ranks."""
        return self._on_host([number], self._distributed.ReduceOp.MAX)[0]

    def _on_host(self, numbers: list[int], operation: Any) -> list[int]:
        reduced = torch.tensor(numbers, dtype=torch.int64)
        self._distributed.all_reduce(reduced, operation)
        found: list[int] = reduced.tolist()
        return found

    def from_rank_zero(self, make: Callable[[], Made]) -> Made:
        """What rank 0 made, pickled."""
        made: list[Any] = [make() if self.rank == 0 else None]
        self._distributed.broadcast_object_list(made, src=0, group=self.group, device=torch.device("cpu"))
        result: Made = made[0]
        return result

    def from_all(self, item: Made) -> list[Made]:
        """What all handed in, pickled, over gloo: the device is not waited for."""
        items: list[Any] = [None] * self.size
        self._distributed.all_gather_object(items, item, group=self.group)
        return items

    @contextmanager
    def rank_zero_first(self) -> Iterator[None]:
        """Rank 0, a barrier, then the others."""
        if self.rank != 0:
            self._distributed.barrier(group=self.group)
        yield
        if self.rank == 0:
            self._distributed.barrier(group=self.group)

    def part(self) -> None:
        """Wait for the others, so that no rank's end looks to its launcher like a failure while others still work."""
        self._distributed.barrier(group=self.group)


@contextmanager
def join_world(device: torch.device, timeout_s: float) -> Iterator[World]:
    """Join the ranks that this process was started with, and leave them when the block ends, however it ends.

    The device's collectives are those that torch has for it. A collective that takes longer than `timeout_s` fails.

    Raises:
        LostRankError: another rank ended or does not answer.
    """
    if world_size() == 1:
        yield ALONE
        return
    from torch import distributed

    from crosschip.train.group.lost import telling_of_lost_ranks

    with telling_of_lost_ranks(int(os.environ["RANK"])):
        distributed.init_process_group(_backends(device), timeout=timedelta(seconds=timeout_s))
        try:
            world = Ranks(device, distributed.new_group(backend="gloo", timeout=PATIENCE))
            yield world
            world.part()
        finally:
            distributed.destroy_process_group()


def _backends(device: torch.device) -> str:
    """Gloo for the host's tensors, and for the device's what torch has for it."""
    from torch import distributed

    if device.type == "cpu":
        return "gloo"
    return f"cpu:gloo,{device.type}:{distributed.get_default_backend_for_device(device)}"
