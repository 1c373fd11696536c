"""Tensors of the simulated chip: real PrivateUse1 tensors whose storage is memory of the host.

A storage of the device `sim` is made over the bytes of a CPU tensor, which it keeps alive. So views share memory,
versions count and autograd works as on any device; a CPU tensor over the same bytes (its *twin*) costs a small call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["MEMORY", "as_cpu", "as_sim", "follow", "is_sim", "lies_on_chip", "point_at", "resize_storage"]

# The CPU's kernel for this one only writes the tensor's own metadata, whatever its device.
_BY_CPU_KERNEL = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_set_storage = torch.ops.aten.set_.source_Storage_storage_offset

_CPU = torch.device("cpu")


class MemoryCount:
    """Bytes of simulated memory in use, the most there ever were, and the number of allocations."""

    def __init__(self) -> None:
        self.allocated = 0
        self.peak = 0
        self.num_allocations = 0

    def add(self, num_bytes: int) -> None:
        """Count an allocation."""
        self.num_allocations += 1
        self.allocated += num_bytes
        if self.allocated > self.peak:
            self.peak = self.allocated

    def remove(self, num_bytes: int) -> None:
        """Count a release."""
        self.allocated -= num_bytes

    def reset_peak(self) -> None:
        """Let the peak begin anew at what is in use."""
        self.peak = self.allocated


MEMORY = MemoryCount()


class _HostBytes:
    """The bytes under one storage of the chip: a CPU tensor that holds them and from which twins are made."""

    __slots__ = ("num_bytes", "tensor")

    def __init__(self, tensor: Tensor, num_bytes: int) -> None:
        self.tensor = tensor
        self.num_bytes = num_bytes
        MEMORY.add(num_bytes)

    def __del__(self, memory: MemoryCount = MEMORY) -> None:
        memory.remove(self.num_bytes)


def is_sim(value: Any) -> bool:
    """Whether `value` is a tensor on the simulated chip."""
    return isinstance(value, Tensor) and value.device.type == "sim"


def as_cpu(tensor: Tensor) -> Tensor:
    """The twin of a tensor of the simulated chip: a CPU tensor over the same bytes."""
    storage = tensor.untyped_storage()
    try:
        host: Tensor = storage._host.tensor  # type: ignore[attr-defined]
    except AttributeError:
        host = _borrowed(storage)
    if host.dtype == tensor.dtype:
        twin = host.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
    else:
        twin = torch.empty(0, dtype=tensor.dtype, device=_CPU).set_(
            host.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride()
        )
    # Most operators see neither bit, because torch resolves them before; copies and some products do see them.
    if tensor.is_conj():
        twin = twin.conj()
    return torch._neg_view(twin) if tensor.is_neg() else twin


def _borrowed(storage: torch.UntypedStorage) -> Tensor:
    """A CPU tensor over a storage that C++ laid over the bytes of another one, as pickling does, for a moment."""
    if storage.device.type != "sim":
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, sim:0 and "
            f"{storage.device}!"
        )
    held = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), _CPU, storage.nbytes())
    held._on_chip = True  # type: ignore[attr-defined]
    return torch.empty(0, dtype=torch.uint8, device=_CPU).set_(held)


def as_sim(tensor: Tensor, storage: torch.UntypedStorage | None = None) -> Tensor:
    """A tensor of the simulated chip over the bytes of a CPU tensor, in the chip's `storage` over them or a new one."""
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    made: Tensor = torch._C._acc.create_empty_tensor((0,), tensor.dtype)
    return point_at(made, tensor, _storage_over(tensor) if storage is None else storage)


def point_at(sim: Tensor, tensor: Tensor, storage: torch.UntypedStorage) -> Tensor:
    """Let `sim` lie in `storage` as the CPU tensor lies in its own."""
    _set_storage.redispatch(_BY_CPU_KERNEL, sim, storage, tensor.storage_offset(), tensor.size(), tensor.stride())
    return sim


def lies_on_chip(tensor: Tensor) -> bool:
    """Whether the bytes of a CPU tensor already belong to a tensor of the chip."""
    return getattr(tensor.untyped_storage(), "_on_chip", False)


def follow(sim: Tensor, twin: Tensor) -> None:
    """Give `sim` the place of its twin, which an operator has resized or laid over other bytes."""
    storage = sim.untyped_storage()
    host = twin.untyped_storage()
    if host is not storage._host.tensor.untyped_storage():  # type: ignore[attr-defined]
        storage = _storage_over(twin)
    elif host.nbytes() != storage.nbytes():
        storage = _renewed(storage, twin)
    point_at(sim, twin, storage)


def resize_storage(storage: torch.UntypedStorage, num_bytes: int) -> None:
    """Change the size of a storage of the chip in place, keeping the bytes that fit.

    Before torch 2.13 a storage made from Python keeps its size: to give up its bytes, as FSDP2 does between two uses of
    a parameter, is put off until the storage dies.

    Raises:
        RuntimeError: the storage is to grow, and this torch cannot change it.
    """
    if num_bytes == storage.nbytes() or (num_bytes == 0 and not hasattr(storage, "_swap_data_ptr_")):
        return
    if not hasattr(storage, "_swap_data_ptr_"):
        raise RuntimeError(f"torch {torch.__version__} cannot resize a storage of the simulated chip; 2.13 can")
    held = storage._host.tensor.untyped_storage()  # type: ignore[attr-defined]
    held.resize_(num_bytes)
    _renewed(storage, torch.empty(0, dtype=torch.uint8, device=_CPU).set_(held))


def _renewed(storage: torch.UntypedStorage, tensor: Tensor) -> torch.UntypedStorage:
    """The chip's storage over bytes that have moved or grown: the same object where torch can change it."""
    fresh = _storage_over(tensor)
    if not hasattr(storage, "_swap_data_ptr_"):
        return fresh
    nothing = torch._C._construct_storage_from_data_pointer(0, fresh.device, 0)
    storage._swap_data_ptr_(nothing)
    storage._swap_data_ptr_(fresh)
    storage._host = fresh._host  # type: ignore[attr-defined]
    return storage


def _storage_over(tensor: Tensor) -> torch.UntypedStorage:
    held = tensor.untyped_storage()
    num_bytes = held.nbytes()
    made: Any = torch._C._construct_storage_from_data_pointer(held.data_ptr(), torch.device("sim", 0), num_bytes)
    # Torch keeps these attributes, and so the bytes, as long as the storage lives, also while only C++ holds it.
    made._host = _HostBytes(tensor, num_bytes)
    held._on_chip = True  # type: ignore[attr-defined]
    storage: torch.UntypedStorage = made
    return storage
