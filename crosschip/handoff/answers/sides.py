"""The two sides of a comparison: an address, or a model directory that is served here for as long as it is asked."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from crosschip.engines import EngineCommand, engine_command, running_engine
from crosschip.errors import HandoffError, ModelError, RunDirectoryError
from crosschip.golden.scoring_http import check_address
from crosschip.handoff.answers.engine import Engine, Fault
from crosschip.model import read_config
from crosschip.model.weights import has_weights

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
        HandoffError: it is neither an address nor a directory that `crosschip serve` loads.
        GoldenError: the address holds a password.
    """
    side = Side(target, chip, api_key)
    if side.is_url:
        check_address(target)
        return side
    directory = Path(target)
    if not (directory / "config.json").is_file():
        what = "an empty directory or one without config.json" if directory.is_dir() else "no directory"
        raise HandoffError(
            f"{target} is {what}, and no address", "give http://HOST:PORT, or a directory that a handoff wrote"
        )
    _check_serves(directory)
    return side


def _check_serves(directory: Path) -> None:
    """Refuse what cannot be served here before the other side is asked for hours.

    Raises:
        HandoffError: it is a GGUF file, holds no weights, or another architecture than our own model's.
    """
    remedy = "start an engine that reads it (docs/engines.md) and give its address, http://HOST:PORT"
    if not has_weights(directory):
        what = "a GGUF file" if any(directory.glob("*.gguf")) else "no weights"
        raise HandoffError(f"{directory} holds {what}, which crosschip serve does not load", remedy)
    try:
        read_config(directory)
    except (ModelError, RunDirectoryError) as error:
        raise HandoffError(f"crosschip serve does not load {directory}: {error.problem}", remedy) from None


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
