"""Faults from outside the package, for tests of the command: each does one thing to one operator."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

__all__ = ["Crash", "Hang", "Raise", "RaiseOddly", "WrongGelu"]


class _OnOne:
    """A fault around the operators whose name begins with `operators`."""

    name = "on one operator"

    def __init__(self, operators: str = "aten::gelu") -> None:
        self.operators = operators

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Any) -> Any:
        if not op._schema.name.startswith(self.operators):
            return compute(*args, **kwargs)
        return self.change(compute(*args, **kwargs))

    def change(self, result: Any) -> Any:
        return result


class WrongGelu(_OnOne):
    """One per cent too large."""

    def change(self, result: Any) -> Any:
        return result * 1.01


class Crash(_OnOne):
    """Takes the process down."""

    def change(self, result: Any) -> Any:
        os.kill(os.getpid(), signal.SIGSEGV)
        return result


class Hang(_OnOne):
    """Never comes back."""

    def change(self, result: Any) -> Any:
        time.sleep(3600)
        return result


class Raise(_OnOne):
    """What a vendor's plug-in raises for an operator that it lacks."""

    def change(self, result: Any) -> Any:
        raise NotImplementedError(f"{self.operators} is not implemented for this device")


class RaiseOddly(_OnOne):
    """What nobody expects of an operator, half of a surrogate pair and a terminal's command in its words."""

    def change(self, result: Any) -> Any:
        raise ValueError("kernel \udcff \x1b[31m")
