"""A checksum of a tensor that its own device computes, exactly, in whole numbers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["Sums", "checksums"]

Sums = tuple[int, int, int]

_INTEGER_OF_WIDTH = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WIDTH = 1024  # the numbers are laid out in rows of this many


def checksums(tensors: Iterable[Tensor]) -> list[Sums]:
    """Three sums over each tensor's bit patterns, modulo 2^64: plain, and weighed by row and by column.

    The plain sum tells a changed number; the weighed ones tell numbers in another order. Whole numbers have no
    rounding, so the order of summation does not matter and every chip gets the same. The sums are brought to the host
    in one transfer for each device that tensors lie on.
    """
    by_device: dict[torch.device, list[tuple[int, Tensor]]] = {}
    count = 0
    for place, tensor in enumerate(tensors):
        by_device.setdefault(tensor.device, []).append((place, _sums(tensor)))
        count += 1
    found: list[Sums] = [(0, 0, 0)] * count
    for entries in by_device.values():
        rows = torch.stack([sums for _, sums in entries]).tolist()
        for (place, _), row in zip(entries, rows, strict=True):
            found[place] = (row[0], row[1], row[2])
    return found


def _sums(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.is_complex() or flat.dtype == torch.bool:
        flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat.to(torch.int8)
    bits = flat.view(_INTEGER_OF_WIDTH[flat.element_size()])
    whole = bits.numel() // _WIDTH * _WIDTH
    main, rest = bits[:whole].view(-1, _WIDTH), bits[whole:].to(torch.int64)
    row_sums, column_sums = main.sum(1, dtype=torch.int64), main.sum(0, dtype=torch.int64)
    total = row_sums.sum() + rest.sum()
    by_row = (row_sums * _places(row_sums)).sum()
    by_column = (column_sums * _places(column_sums)).sum() + (rest * _places(rest)).sum()
    return torch.stack([total, by_row, by_column])


def _places(sums: Tensor) -> Tensor:
    return torch.arange(1, sums.numel() + 1, device=sums.device, dtype=torch.int64)
