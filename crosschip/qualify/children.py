"""The processes of one qualification: one for each task, and one that gets ready beside it. No torch here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from crosschip.qualify.environment import examination_environment
from crosschip.qualify.proctor import Child, Ended, run_child, start_child
from crosschip.qualify.programme import Exam
from crosschip.qualify.stem import Stem, can_divide

__all__ = ["Children"]

_ALONE = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}  # for what works on the CPU: no plug-in is loaded
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}  # numpy's threads begin with its import, and would be lost in dividing


class Children:
    """The processes that look at one subject on one chip; close it in the end.

    What needs no vendor's plug-in comes from a stem. A plug-in may not live on in a process that divides, so what looks
    at a chip is started anew each time.
    """

    def __init__(self, directory: Path, origin: str, chip: str) -> None:
        self._directory, self._origin = directory, origin
        self._needs_plugin = chip != "cpu" and chip.partition(":")[0] != "sim"
        self._ready: dict[bool, Child] = {}  # whether without plug-ins; they wait for their jobs
        self._stem: Stem | None = None

    def prepare(self, exam: Exam | None, alone: bool = False) -> None:
        """Start one for a later task, whose imports go on beside what runs now."""
        if alone not in self._ready:
            self._ready[alone] = self._start([self._origin, *([exam.job_module()] if exam else [])], alone)

    def run(self, job: dict[str, Any], deadline_s: float, alone: bool = False, then: Exam | None = None) -> Ended:
        """Run a job; without plug-ins if it is to be `alone`. Another process gets ready for the exam `then`."""
        child = self._ready.pop(alone, None) or self._start([], alone)
        if then is not None:
            self.prepare(then)
        return run_child(job, self._directory, deadline_s, self._environment(alone), child)

    def _environment(self, alone: bool) -> dict[str, str] | None:
        return _ALONE if alone or not self._needs_plugin else None

    def _start(self, prepare: list[str], alone: bool) -> Child:
        environment = self._environment(alone)
        if environment is None or not can_divide():
            return start_child(self._directory, environment, prepare)
        if self._stem is None:
            self._stem = Stem(examination_environment({**_ONE_THREAD, **os.environ, **environment}))
        return start_child(self._directory, environment, prepare, self._stem)

    def close(self) -> None:
        """End those that still wait, and the stem."""
        for child in self._ready.values():
            child.end()
        if self._stem is not None:
            self._stem.close()
