"""Large temporary directories beside a model's files, which a killed process does not leave there for ever.

Each is held by a lock that ends with its process, whatever ended that; the next one sweeps what nobody holds.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["scratch_directory"]

_HELD = ".held"  # the end of each name


@contextmanager
def scratch_directory(parent: Path, name: str) -> Iterator[Path]:
    """A directory `.NAME-....held` in `parent`, which must be there; it is removed when the block ends.

    Raises:
        OSError: nothing can be written there.
    """
    _sweep(parent, name)
    path, held = _made(parent, name)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(held)


def _made(parent: Path, name: str) -> tuple[Path, int]:
    """A new directory and the descriptor that holds its lock."""
    while True:
        path = Path(tempfile.mkdtemp(dir=parent, prefix=f".{name}-", suffix=_HELD))
        held = _locked(path)
        if held is not None and path.is_dir():
            return path, held
        if held is not None:  # swept by another process before the lock was there
            os.close(held)


def _sweep(parent: Path, name: str) -> None:
    """Remove what processes that ended have left."""
    for path in parent.glob(f".{name}-*{_HELD}"):
        held = _locked(path)
        if held is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(held)


def _locked(path: Path) -> int | None:
    """The descriptor of a directory whose lock is ours now; None where another process has it, or it is gone."""
    try:
        held = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        return None
    return held
