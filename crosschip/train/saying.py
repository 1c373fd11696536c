"""What is told to whoever looks at stderr, and that nobody has to be there: a training outlives its listener.

Ctrl-C in `crosschip train ... 2>&1 | tee LOG` ends tee first. A line that cannot be told must not cost the last save.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import IO, cast

__all__ = ["STDERR", "say"]

_GONE = (errno.EPIPE, errno.EIO)  # the reader of a pipe, a terminal; a full disk may have room again


class _Stderr:
    """Stderr for `print` and rich. What cannot be written is dropped; a reader that is gone is not written to again.

    Python has no `sys.stderr` in a process that was started with it closed.
    """

    encoding = "utf-8"

    def write(self, text: str) -> int:
        try:
            if sys.stderr is not None:
                sys.stderr.write(text)
        except OSError as error:
            _note(error)
        return len(text)

    def flush(self) -> None:
        try:
            if sys.stderr is not None:
                sys.stderr.flush()
        except OSError as error:
            _note(error)

    def isatty(self) -> bool:
        return sys.stderr is not None and sys.stderr.isatty()

    def fileno(self) -> int:
        return sys.stderr.fileno()


def _note(error: OSError) -> None:
    """Empty Python's buffer, which would fail once more when the process ends, and change its exit code."""
    stderr = sys.stderr.fileno()
    kept, nowhere = os.dup(stderr), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stderr)
    sys.stderr.flush()
    if error.errno not in _GONE:
        os.dup2(kept, stderr)
    os.close(kept)
    os.close(nowhere)


STDERR = cast(IO[str], _Stderr())


def say(text: str) -> None:
    """Print a line to stderr, if somebody is there."""
    print(text, file=STDERR, flush=True)
