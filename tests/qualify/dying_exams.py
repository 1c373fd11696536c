"""An exam that ends as its seed says, for the tests of the proctor. It stands for what a chip does to a process."""

from __future__ import annotations

import os
import signal
import time

from crosschip.errors import ChipError
from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.finding import Finding

__all__ = ["WAYS", "examine"]

WAYS = ("complete", "segfault", "exit", "hang", "raise", "refuse", "hog")


def examine(context: ExamContext) -> None:
    """A good part, then one that dies, then another good one."""
    context.part("first", lambda: _good(context))
    context.part("second", lambda: _die(WAYS[context.seed]))
    context.part("third", lambda: _good(context))


def _good(context: ExamContext) -> None:
    context.journal.checked("good")
    context.journal.finding(Finding(context.exam, "numerics", "PASS WITH LIMITS", "something", "good", "as it should"))


def _die(way: str) -> None:
    if way == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if way == "exit":
        os._exit(3)
    if way == "hang":
        time.sleep(3600)
    if way == "raise":
        raise ValueError("what a chip's plug-in may raise")
    if way == "refuse":
        raise ChipError("the chip is gone", "look for it")
    if way == "hog":
        os.kill(os.getpid(), signal.SIGKILL)
