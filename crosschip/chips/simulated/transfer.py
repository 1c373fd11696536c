"""Memory for the simulated chip, and copies between it and the host: the kernels that are not the CPU's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from crosschip.chips.simulated.operators import call_in_parts, call_operator, refuse_other_index
from crosschip.chips.simulated.storage import as_cpu, as_sim, is_sim

__all__ = ["register_transfer"]

aten = torch.ops.aten

_CPU = torch.device("cpu")


def _empty(
    size: Sequence[int],
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    memory_format: torch.memory_format | None = None,
) -> Tensor:
    _check_options(layout, device, pin_memory)
    return as_sim(aten.empty.memory_format(size, dtype=dtype, device=_CPU, memory_format=memory_format))


def _empty_strided(
    size: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
) -> Tensor:
    _check_options(layout, device, pin_memory)
    return as_sim(aten.empty_strided.default(size, stride, dtype=dtype, device=_CPU))


def _check_options(layout: torch.layout | None, device: torch.device | None, pin_memory: bool | None) -> None:
    refuse_other_index(device)
    if layout not in (None, torch.strided):
        raise NotImplementedError(f"the simulated chip has no {layout} tensors")
    if pin_memory:
        raise RuntimeError("only memory of the host can be pinned")


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """Between host and chip, in either direction, and on the chip: a copy within it is an operator that may fail."""
    if is_sim(source) and is_sim(target):
        call_operator(aten.copy_.default, target, source)
    else:
        (as_cpu(target) if is_sim(target) else target).copy_(as_cpu(source) if is_sim(source) else source)
    return target


def _copy_from_and_resize(source: Tensor, target: Tensor) -> Tensor:
    return _copy_from(source, target.resize_(source.shape))


def _to_copy(tensor: Tensor, **options: Any) -> Tensor:
    """As everywhere, but a copy to the host that need not block is not made into pinned memory: there is none."""
    made: Tensor = call_in_parts(aten._to_copy.default, tensor, **{**options, "non_blocking": False})
    return made


def _local_scalar(tensor: Tensor) -> Any:
    return as_cpu(tensor).item()


def _zeros(
    size: Sequence[int],
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
) -> Tensor:
    """Autograd's zeros without memory; here they have memory as all others do."""
    _check_options(layout, device, pin_memory)
    return as_sim(aten.zeros.default(size, dtype=dtype, device=_CPU))


def _pin_memory(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """The chip reads all memory of the host; a copy is what a program gets that asks for pinned memory."""
    return tensor.clone()


def register_transfer(libraries: list[torch.library.Library]) -> None:
    """Register these kernels; the registrations live as long as `libraries`."""
    kernels = torch.library.Library("aten", "IMPL")
    kernels.impl("empty.memory_format", _empty, "PrivateUse1")
    kernels.impl("empty_strided", _empty_strided, "PrivateUse1")
    kernels.impl("_copy_from", _copy_from, "PrivateUse1")
    kernels.impl("_copy_from_and_resize", _copy_from_and_resize, "PrivateUse1")
    kernels.impl("_to_copy", _to_copy, "PrivateUse1")
    kernels.impl("_efficientzerotensor", _zeros, "PrivateUse1")
    kernels.impl("_local_scalar_dense", _local_scalar, "PrivateUse1")
    kernels.impl("_pin_memory", _pin_memory, "CPU")
    libraries.append(kernels)
