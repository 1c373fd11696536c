"""Chips whose answers depend on what they must not depend on."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Unsteady", "process_dependent"]

_PRODUCTS = ("mm", "addmm", "bmm", "linear")


@dataclass
class Unsteady:
    """`change(result, number of the call)` after the calls of `targets`."""

    change: Callable[[Tensor, int], Tensor]
    targets: tuple[str, ...] = _PRODUCTS
    name: str = "unsteady"
    count: int = 0

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Callable[..., Any]) -> Any:
        result = compute(*args, **kwargs)
        if op._schema.name.split("::")[1] not in self.targets or not isinstance(result, Tensor):
            return result
        self.count += 1
        return self.change(result, self.count)


def process_dependent() -> Unsteady:
    """Products that differ from process to process by less than a thousandth."""
    return Unsteady(lambda result, _: result * (1 + os.getpid() % 997 * 2.0**-20))
