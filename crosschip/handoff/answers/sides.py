"""The two sides of a comparison: an address, or a model directory that is served here for as long as it is asked."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from crosschip.engines import EngineCommand, engine_command, running_engine
from crosschip.errors import HandoffError
from crosschip.handoff.answers.engine import Engine, Fault

__all__ = ["Side", "opened", "side_of"]

_LOG_LINES = 5


@dataclass(frozen=True)
class Side:
    """What was named on the command line: a URL, or a directory and how it is served (None: by crosschip itself)."""

    target: str
    chip: str = "auto"
    api_key: str | None = None
    command: EngineCommand | None = None
    start_s: float = 600.0
    timeout_s: float = 300.0

    @property
    def is_url(self) -> bool:
        """Whether an engine is running there already."""
        return self.target.startswith(("http://", "https://"))


def side_of(target: str, *, chip: str = "auto", api_key: str | None = None) -> Side:
    """The side that `target` names.

    Raises:
        HandoffError: it is neither an address nor a model directory.
    """
    side = Side(target, chip, api_key)
    directory = Path(target)
    if not side.is_url and not (directory / "config.json").is_file():
        what = "an empty directory or one without config.json" if directory.is_dir() else "no directory"
        raise HandoffError(
            f"{target} is {what}, and no address", "give http://HOST:PORT, or a directory that a handoff wrote"
        )
    return side


@contextmanager
def opened(side: Side) -> Iterator[Engine]:
    """The side's engine, ready to be asked; a directory is served until the block ends.

    Raises:
        Fault: it does not start, or lists no model.
    """
    if side.is_url:
        with _asked(side, side.target, side.api_key) as engine:
            yield engine
        return
    command = side.command or engine_command("native", chip=side.chip)
    with tempfile.TemporaryDirectory() as place:
        log = Path(place) / "engine.log"
        with running_engine(command, Path(side.target).resolve(), log, side.start_s) as running:
            if not running.is_up:
                last = " | ".join(running.read_log().strip().splitlines()[-_LOG_LINES:])
                raise Fault("unreachable", f"{running.ended}: {last or 'it printed nothing'}")
            with _asked(side, running.url, None) as engine:
                yield engine


@contextmanager
def _asked(side: Side, url: str, api_key: str | None) -> Iterator[Engine]:
    engine = Engine(url, api_key, side.timeout_s)
    try:
        engine.find_model()
        yield engine
    finally:
        engine.close()
