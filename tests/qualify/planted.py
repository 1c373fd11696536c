"""A fault for tests: something happens to one operator, every time or at some of its calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["On"]


@dataclass
class On:
    """`change(result)` after calls of `target`, or `before(args)` instead of them, at the calls that `when` picks."""

    target: str  # "silu", "addcmul_": the name without its overload
    change: Callable[[Any], Any] | None = None
    before: Callable[[Any], Any] | None = None
    when: Callable[[int], bool] = lambda count: True
    count: int = 0
    name: str = "planted by a test"

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Callable[..., Any]) -> Any:
        if op._schema.name.split("::")[1] != self.target:
            return compute(*args, **kwargs)
        self.count += 1
        if not self.when(self.count):
            return compute(*args, **kwargs)
        if self.before is not None:
            return self.before(args)
        assert self.change is not None
        return self.change(compute(*args, **kwargs))
