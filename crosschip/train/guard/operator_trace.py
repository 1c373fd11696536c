"""Each operator's name in the heartbeat while it runs, so that a rank that hangs says in which one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from crosschip.train.guard.heartbeat import TRACED_STEPS, Heartbeat

__all__ = ["OperatorTrace", "StepTracing"]


class OperatorTrace(TorchDispatchMode):
    """Within the `with` block every operator, collectives and the backward pass included, enters the heartbeat."""

    def __init__(self, heartbeat: Heartbeat) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._heartbeat = heartbeat
        self._names: dict[object, bytes] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Note the operator, compute, note that it has come back."""
        name = self._names.get(func)
        if name is None:
            name = self._names[func] = str(func).encode()
        self._heartbeat.enter_operator(name)
        result = func(*args, **(kwargs or {}))
        self._heartbeat.leave_operator()
        return result


class StepTracing:
    """Traces the first steps of a process where the supervisor has asked for it, and none otherwise."""

    def __init__(self, heartbeat: Heartbeat) -> None:
        self._trace = OperatorTrace(heartbeat)
        self._left = int(os.environ.get(TRACED_STEPS, "0"))

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a step."""
        if self._left <= 0:
            yield
            return
        self._left -= 1
        with self._trace:
            yield
