"""Chips that are unsteady in ways that the catalogue does not list; `sim:tests.qualify.exams.stability.broken:NAME`."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "CrashLater",
    "FailsInCompany",
    "GetsSlower",
    "Keeps",
    "OtherBits",
    "OtherBitsInCompany",
    "RaisesLater",
    "Slow",
]

Compute = Callable[..., Any]


class _Counted:
    """Something that happens to the calls of one operator; `count` is the call's number."""

    name = "broken"

    def __init__(self, operator: str = "mm") -> None:
        self.counted_operator = operator
        self.count = 0

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Compute) -> Any:
        result = compute(*args, **kwargs)
        if op._schema.name.split("::")[1] != self.counted_operator:
            return result
        self.count += 1
        return self.changed(result)

    def changed(self, result: Any) -> Any:
        return result


class GetsSlower(_Counted):
    """Each call waits a little longer than the one before, on the chip's clock."""

    def changed(self, result: Any) -> Any:
        time.sleep(min(0.05, 2e-5 * self.count))
        return result


class RaisesLater(_Counted):
    """A hundred calls go well."""

    def changed(self, result: Any) -> Any:
        if self.count > 100:
            raise RuntimeError("the device is lost")
        return result


class Keeps(_Counted):
    """Keeps a copy of the last `most` results: a cache that fills."""

    def __init__(self, operator: str = "mm", most: int = 100) -> None:
        super().__init__(operator)
        self.kept: list[Tensor] = []
        self.most = most

    def changed(self, result: Any) -> Any:
        self.kept = [*self.kept, result.clone()][-self.most :]
        return result


class _InCompany:
    """Something that happens to attention while another call of it runs."""

    name = "in company"

    def __init__(self) -> None:
        self.inside = 0
        self.lock = threading.Lock()

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Compute) -> Any:
        if "attention" not in op._schema.name:
            return compute(*args, **kwargs)
        with self.lock:
            self.inside += 1
        try:
            result = compute(*args, **kwargs)
            return self.changed(result) if self.inside > 1 else result
        finally:
            with self.lock:
                self.inside -= 1

    def changed(self, result: Any) -> Any:
        return result


class FailsInCompany(_InCompany):
    """Raises."""

    def changed(self, result: Any) -> Any:
        raise RuntimeError("vector core exception")


class OtherBitsInCompany(_InCompany):
    """Gives other bits."""

    def changed(self, result: Any) -> Any:
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, Tensor) and each.dtype.is_floating_point:
                each.view(-1).view(torch.uint8)[0] ^= 1
                break
        return result


class Slow(_Counted):
    """Each call takes 50 ms longer."""

    def changed(self, result: Any) -> Any:
        time.sleep(0.05)
        return result


class OtherBits(_Counted):
    """Always the same, and other than an honest chip's."""

    def changed(self, result: Any) -> Any:
        return result * (1 + 2.0**-20)


class CrashLater(_Counted):
    """Ten calls go well."""

    def changed(self, result: Any) -> Any:
        if self.count > 10:
            os.kill(os.getpid(), signal.SIGSEGV)
        return result
