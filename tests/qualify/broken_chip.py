"""Faults for the tests of exams, which no catalogue knows; each is one object for `plant`, or a name for `sim:`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["Broken", "wide_products_lose_their_last_column"]


@dataclass
class Broken:
    """Calls `change(op, args, kwargs, compute)` around the operators whose name has one of `names` in it; "" is all."""

    change: Callable[..., Any]
    names: tuple[str, ...] = ("",)
    name: str = "broken"
    num_changed: int = field(default=0)

    def operator(self, op: Any, args: Any, kwargs: Any, compute: Callable[..., Any]) -> Any:
        if not any(name in str(op) for name in self.names):
            return compute(*args, **kwargs)
        self.num_changed += 1
        return self.change(op, args, kwargs, compute)


def _lose_last_column(op: Any, args: Any, kwargs: Any, compute: Callable[..., Any]) -> Any:
    made = compute(*args, **kwargs)
    if isinstance(made, torch.Tensor) and made.dim() == 2 and made.shape[1] > 4:
        made[:, -1] = 0.0
    return made


def wide_products_lose_their_last_column() -> Broken:
    """Products of more than four columns have a last column of zeros."""
    return Broken(_lose_last_column, ("aten.mm.", "aten.addmm."))


def _refuse_lists(op: Any, args: Any, kwargs: Any, compute: Callable[..., Any]) -> Any:
    if len(args[0]) > 2:
        raise RuntimeError(f"{op}: at most two tensors")
    return compute(*args, **kwargs)


def lists_are_refused() -> Broken:
    """Operators on lists take two tensors and no more."""
    return Broken(_refuse_lists, ("aten._foreach_norm",))


def _spread_nan(op: Any, args: Any, kwargs: Any, compute: Callable[..., Any]) -> Any:
    made = compute(*args, **kwargs)
    return made.fill_(float("nan")) if bool(made.isnan().any()) else made


def products_spread_nan() -> Broken:
    """A product with one NaN is all NaN."""
    return Broken(_spread_nan, ("aten.mm.", "aten.addmm."))
