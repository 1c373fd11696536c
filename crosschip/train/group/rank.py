"""What a process does besides training where it is one rank of several: it ends with its launcher, and errs once.

No torch: a rank must be able to end with its launcher while it is still importing.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from crosschip.errors import CrosschipError
from crosschip.orphans import end_with_launcher

__all__ = ["as_rank"]

_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # where torch's agent, ours or torchrun, looks for a rank's last words


@contextmanager
def as_rank() -> Iterator[int]:
    """Yield this process's rank, 0 where it is alone. The message of what is raised is left to the agent.

    Rank 0 tells it itself as well. The agent tells another rank's where that one failed first: all may fail for the
    same reason, and one message is enough.
    """
    if "RANK" not in os.environ:
        yield 0
        return
    end_with_launcher()
    rank = int(os.environ["RANK"])
    try:
        yield rank
    except CrosschipError as error:
        if _ERROR_FILE in os.environ:
            leave_message(str(error))
        if rank == 0 or _ERROR_FILE not in os.environ:
            raise
        raise typer.Exit(error.exit_code) from None


def leave_message(text: str) -> None:
    """Write last words in the form that torch's elastic agent reads."""
    extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
    with open(os.environ[_ERROR_FILE], "w", encoding="utf-8") as file:
        json.dump({"message": {"message": text, "extraInfo": extra}}, file)
