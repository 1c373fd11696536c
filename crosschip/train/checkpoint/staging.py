"""The one part of a save that the training waits for: this process's shards are copied to host memory.

The device sums up each shard's bits at the same moment, from the shard itself and not from the copy. So a copy that was
taken too early, or that was changed before it was written, is found when the files are read back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from crosschip.model.weights import ADAPTERS, MODEL_PREFIX, own_tensors
from crosschip.train.checkpoint.checksum import Sums, checksums
from crosschip.train.checkpoint.state import ADAPTER_PREFIX, OPTIMIZER_PREFIX
from crosschip.train.optimizer import optimizer_tensors

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem

    from crosschip.model import Transformer

__all__ = ["ShardSums", "Staged", "StagingBuffers", "adapter_tensors", "tensors_to_save"]


def tensors_to_save(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, buffers and optimizer state, by the names they have in a checkpoint."""
    # Weights first: asking for them makes FSDP let go of gathered parameters, which the optimizer does not know.
    found = {f"{MODEL_PREFIX}{name}": tensor for name, tensor in own_tensors(model).items()}
    state = optimizer_tensors(model, optimizer)
    found |= {f"{ADAPTER_PREFIX}{name}": tensor for name, tensor in adapter_tensors(model).items()}
    return found | {f"{OPTIMIZER_PREFIX}{name}": tensor for name, tensor in state.items()}


def adapter_tensors(model: Transformer) -> dict[str, Tensor]:
    """A model's adapters by name; nothing where it has none."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if name.startswith(ADAPTERS)}


@dataclass(frozen=True)
class ShardSums:
    """The checksum of one shard: the part of tensor `name` of shape `sizes` that begins at `offsets`."""

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    sums: Sums

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return {"name": self.name, "offsets": self.offsets, "sizes": self.sizes, "sums": self.sums}


@dataclass(frozen=True)
class Staged:
    """What this process writes: DCP's items, the host copy of each, and what the device says is in it."""

    items: list[WriteItem]
    copies: dict[MetadataIndex, Tensor]
    sums: list[ShardSums]


@dataclass
class StagingBuffers:
    """Host memory for the copies, made at the first save and used again at each later one.

    Only one `Staged` can be alive: the next `take` overwrites the copies of the one before.
    """

    with_sums: bool = True
    _buffers: dict[MetadataIndex, Tensor] = field(default_factory=dict)

    def take(self, tensors: dict[str, Tensor]) -> Staged:
        """Copy this process's shards of `tensors`; when it returns, the tensors may change again."""
        from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(dict(tensors), is_coordinator=False)
        items = planner.create_local_plan().items
        shards = {item.index: planner.lookup_object(item.index).detach() for item in items}
        sums = checksums(shards.values()) if self.with_sums else []
        copies = {index: self._buffer(index, shard) for index, shard in shards.items()}
        for index, shard in shards.items():
            copy_to_host(copies[index], shard)
        _wait_for_copies(shards)
        self._buffers = copies
        return Staged(items, copies, _named(items, sums) if self.with_sums else [])

    def _buffer(self, index: MetadataIndex, shard: Tensor) -> Tensor:
        old = self._buffers.get(index)
        if old is not None and old.shape == shard.shape and old.dtype == shard.dtype:
            return old
        return _host_memory(shard)


def copy_to_host(copy: Tensor, shard: Tensor) -> None:
    """Copy one shard; from a device into pinned memory this only begins, and `_wait_for_copies` waits for its end."""
    copy.copy_(shard, non_blocking=copy.is_pinned())


def _host_memory(shard: Tensor) -> Tensor:
    """Pinned, that is, within direct reach of the device, where the device can do that."""
    if shard.device.type != "cpu":
        try:
            return torch.empty(shard.shape, dtype=shard.dtype, pin_memory=True)
        except RuntimeError:  # a device whose plug-in has no pinned memory
            pass
    return torch.empty(shard.shape, dtype=shard.dtype)


def _wait_for_copies(shards: dict[MetadataIndex, Tensor]) -> None:
    for device in {shard.device for shard in shards.values() if shard.device.type != "cpu"}:
        torch.accelerator.synchronize(device)


def _named(items: list[WriteItem], sums: list[Sums]) -> list[ShardSums]:
    named = []
    for item, found in zip(items, sums, strict=True):
        assert item.tensor_data is not None, item.index
        chunk = item.tensor_data.chunk
        named.append(ShardSums(item.index.fqn, tuple(chunk.offsets), tuple(chunk.sizes), found))
    return named
