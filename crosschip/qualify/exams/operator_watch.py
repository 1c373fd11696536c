"""In which operator a part of many calls stands still.

A part of many calls, such as a step, is announced as a whole, since a line for each call would be a journal of
gigabytes. `OperatorWatch` notes the operator in memory instead and says it when it does not come back.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from crosschip.qualify.journal import IN_OPERATOR, Journal

__all__ = ["STANDS_STILL_S", "OperatorWatch"]

STANDS_STILL_S = 3.0  # an operator that takes this long is named; the proctor ends one only much later
_LOOK_S = 0.5


class OperatorWatch:
    """Inside, the journal says which operator of the part stands still, as soon as one does.

    Each thread that works for the part enters a `mode` of its own; not around a backward, where what an operator raises
    under a mode ends the process (torch 2.13: `terminate called`). An operator that holds the interpreter's lock while
    it stands still cannot be named: then the part is.
    """

    def __init__(self, journal: Journal, part: str) -> None:
        self._journal, self._part = journal, part
        self._modes: list[_Noting] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="operator watch", daemon=True)

    def mode(self) -> TorchDispatchMode:
        """A context for one thread, in which its calls are noted."""
        mode = _Noting()
        self._modes.append(mode)
        return mode

    def _look(self) -> None:
        said: set[float] = set()
        while not self._is_over.wait(_LOOK_S):
            for mode in list(self._modes):
                operator, since = mode.running
                if operator is not None and since not in said and time.monotonic() - since > STANDS_STILL_S:
                    said.add(since)
                    self._journal.now(f"{self._part}{IN_OPERATOR}{operator}")

    def __enter__(self) -> OperatorWatch:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._is_over.set()
        self._thread.join()


class _Noting(TorchDispatchMode):
    """Notes which operator runs, and since when."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.running: tuple[Any, float] = (None, 0.0)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make the call."""
        self.running = op, time.monotonic()
        try:
            return op(*args, **(kwargs or {}))
        finally:
            self.running = None, 0.0
