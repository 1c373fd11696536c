"""Faults that tests plant: they see calls, change results or raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Broken", "Changed", "Watching"]


class Watching:
    """Changes nothing and notes the names of all calls, and whether every tensor lay on the CPU."""

    name = "watching"

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.devices: set[str] = set()

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Callable[..., Any]) -> Any:
        self.calls.append(str(op))
        for value in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor):
                self.devices.add(value.device.type)
        return compute(*args, **kwargs)


class Changed:
    """Gives `change(result)` for every call whose operator's name begins with `prefix`."""

    name = "changed"

    def __init__(self, prefix: str, change: Callable[[Any], Any]) -> None:
        self.prefix = prefix
        self.change = change
        self.num_changed = 0

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Callable[..., Any]) -> Any:
        result = compute(*args, **kwargs)
        if not str(op).startswith(self.prefix):
            return result
        self.num_changed += 1
        return self.change(result)


class Broken:
    """Raises for one operator."""

    name = "broken"

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Callable[..., Any]) -> Any:
        if str(op).startswith(self.prefix):
            raise NotImplementedError(f"{op} is not there")
        return compute(*args, **kwargs)
