"""Calls that manage a tensor's memory or metadata and run no kernel on any chip: no fault is laid around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from crosschip.chips.simulated.storage import as_cpu, follow

__all__ = ["BOOKKEEPING"]

_BY_CPU_KERNEL = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_set_storage = torch.ops.aten.set_.source_Storage_storage_offset


def _set(op: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    tensor, source = (args[0], args[1]) if len(args) > 1 else (args[0], None)
    if isinstance(source, torch.UntypedStorage):
        offset, size = (args[2], args[3]) if len(args) > 2 else (0, [source.nbytes() // tensor.dtype.itemsize])
        stride = args[4] if len(args) > 4 else ()
        # An absent stride means contiguous; the CPU's kernel knows that from a null pointer, which Python has not got.
        if len(stride) != len(size):
            stride = torch.empty(size, device="meta").stride()
        return _set_storage.redispatch(_BY_CPU_KERNEL, tensor, source, offset, size, stride)
    if source is None:
        source = tensor.new_empty(0)
    where = (source.storage_offset(), source.size(), source.stride())
    return _set_storage.redispatch(_BY_CPU_KERNEL, tensor, source.untyped_storage(), *where)


def _resize(op: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    tensor: Tensor = args[0]
    twin = as_cpu(tensor)
    op(twin, *args[1:], **kwargs)
    follow(tensor, twin)
    return tensor


def _record_stream(op: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Calls end before they return, so memory is never taken back too early."""


def _by_cpu_kernel(op: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return op.redispatch(_BY_CPU_KERNEL, *args, **kwargs)


BOOKKEEPING: dict[str, Callable[[torch._ops.OpOverload, Sequence[Any], dict[str, Any]], Any]] = {
    "aten::is_set_to": _by_cpu_kernel,
    "aten::record_stream": _record_stream,
    "aten::resize_": _resize,
    "aten::set_": _set,
}
