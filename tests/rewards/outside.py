"""Checkers of a user's own, good and bad."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from crosschip.rewards import Attempt

numpy_like = "no function"


def length(attempt: Attempt) -> float:
    print("a checker may print")
    return float(len(attempt.answer))


def is_right(attempt: Attempt) -> bool:
    return attempt.answer == attempt.expected


def pid(attempt: Attempt) -> int:
    return os.getpid()


def meet(attempt: Attempt) -> float:
    """Waits in the directory that the answer names until another worker is there, too; 0 if none comes."""
    place = Path(attempt.answer)
    (place / str(os.getpid())).touch()
    for _ in range(3000):
        if len(list(place.iterdir())) > 1:
            return 1.0
        time.sleep(0.01)
    return 0.0


def as_told(attempt: Attempt) -> object:
    """Does what the answer says."""
    match attempt.answer:
        case "raise":
            raise ArithmeticError("the moon is wrong")
        case "hang":
            time.sleep(3600)
        case "hang in C":
            re.match(r"(a+)+$", "a" * 60 + "b")
        case "leave a child":
            if os.fork() == 0:
                time.sleep(3600)
            time.sleep(3600)
        case "nan":
            return float("nan")
        case "inf":
            return -float("inf")
        case "none":
            return None
        case "text":
            return "1.0"
        case "exit":
            sys.exit(3)
        case "die":
            print("last words")
            os.kill(os.getpid(), signal.SIGKILL)
        case "torch":
            return float("torch" in sys.modules)
    return 1.0


def forks(attempt: Attempt) -> float:
    """A child comes back from here as well."""
    os.fork()
    return float(attempt.answer)


def forks_and_exits(attempt: Attempt) -> float:
    """The child ends as a program ends."""
    if os.fork() == 0:
        sys.exit(0)
    return float(attempt.answer)


def talks_into_the_socket(attempt: Attempt) -> float:
    """Writes an answer of its own into every socket that it finds open, before the worker answers."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                os.write(int(name), b'{"id": 2, "reward": 7.0}\n')
    return float(attempt.answer)
