"""How far a conversion is, as one line that is written over, on a terminal alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from crosschip.handoff.conversion.shards import Tell

__all__ = ["progress_line"]


@contextmanager
def progress_line(title: str) -> Iterator[Tell]:
    """Yield a `tell` whose last line stands on the terminal's error stream; elsewhere it says nothing."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda line: None
        return
    with console.status(escape(title)) as status:
        yield lambda line: status.update(f"{escape(title)}: {escape(line)}")
