"""Calls whose result no contract defines: different values written to one place, of which any may stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["is_left_to_chance"]


def is_left_to_chance(base: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call writes several values to one place without adding them up.

    torch calls `index_put`, `scatter` and `index_copy` with repeated indices undefined; chips with many cores differ
    from the CPU there, and from themselves. `base` is the operator's name as in `index_put`.
    """
    if base == "index_put":
        return not _argument(args, kwargs, 3, "accumulate") and _puts_twice(args[0], args[1], args[2])
    if base == "scatter":
        source = _argument(args, kwargs, 3, "src")
        return _argument(args, kwargs, 4, "reduce") is None and _is_many(source) and _repeats(args[2], args[1], args[0])
    if base == "index_copy":
        return _is_many(args[3]) and _repeats(args[2].reshape(-1), 0, None)
    return False


def _argument(args: Sequence[Any], kwargs: dict[str, Any], place: int, name: str) -> Any:
    return args[place] if place < len(args) else kwargs.get(name)


def _is_many(values: Any) -> bool:
    return isinstance(values, Tensor) and values.numel() > 1


def _repeats(index: Tensor, dim: int, into: Tensor | None) -> bool:
    """Whether an index occurs twice along a dimension."""
    if index.numel() < 2 or index.dim() == 0:
        return False
    ordered = (index if into is None else index % max(1, into.shape[dim])).sort(dim).values
    return bool((ordered.diff(dim=dim) == 0).any())


def _puts_twice(into: Tensor, indices: Sequence[Tensor | None], values: Tensor) -> bool:
    given = [(each, size) for each, size in zip(indices, into.shape, strict=False) if each is not None]
    if not _is_many(values) or not given or any(each.dtype in (torch.bool, torch.uint8) for each, _ in given):
        return False  # a mask takes each place once; `indices` and sizes are not aligned beside one
    places = torch.stack(torch.broadcast_tensors(*[each % max(1, size) for each, size in given])).flatten(1)
    return places.unique(dim=1).shape[1] < places.shape[1]
