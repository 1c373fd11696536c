"""How far a stage is: a bar on a terminal, a line now and then elsewhere. Everything goes to stderr."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from crosschip.train.saying import STDERR, say

__all__ = ["LineProgress", "Moment", "SilentProgress", "StageProgress", "TerminalProgress", "describe", "open_progress"]

LINE_INTERVAL_S = 10.0


@dataclass(frozen=True)
class Moment:
    """The state after a step. `peak_share` is None where the peak was not measured."""

    step: int
    num_steps: int
    loss: float
    tokens_per_s: float
    peak_share: float | None
    remaining_s: float | None


class StageProgress(Protocol):
    """What the training loop tells while it runs. `measures_peak`: whether to spend seconds on measuring the peak."""

    measures_peak: bool

    def say(self, text: str) -> None:
        """Print a line."""

    def start(self, label: str, first_step: int, num_steps: int) -> None:
        """A stage begins or goes on."""

    def advance(self, moment: Moment) -> None:
        """A step is done."""

    def end(self) -> None:
        """The stage is over, for whatever reason."""


def describe(moment: Moment) -> str:
    """One line: loss, tokens/s, share of the measured peak, time left."""
    parts = [f"loss {moment.loss:.4f}", f"{moment.tokens_per_s:,.0f} tokens/s"]
    if moment.peak_share is not None:
        parts.append(f"{moment.peak_share:.1%} of peak")
    if moment.remaining_s is not None:
        minutes, seconds = divmod(round(moment.remaining_s), 60)
        hours, minutes = divmod(minutes, 60)
        parts.append(f"{hours}:{minutes:02d}:{seconds:02d} left" if hours else f"{minutes}:{seconds:02d} left")
    return "  ".join(parts)


class LineProgress:
    """A line every `interval_s` seconds and at the end; with None only what is said, for callers that show nothing."""

    def __init__(self, interval_s: float | None = LINE_INTERVAL_S) -> None:
        self.measures_peak = interval_s is not None
        self._interval_s = interval_s
        self._label = ""
        self._last_line = 0.0

    def say(self, text: str) -> None:
        """Print a line to stderr."""
        say(text)

    def start(self, label: str, first_step: int, num_steps: int) -> None:
        """Remember what is being done."""
        self._label = label
        self._last_line = time.monotonic()

    def advance(self, moment: Moment) -> None:
        """Print the moment when the last line is old enough, or when it is the last step."""
        if self._interval_s is None:
            return
        now = time.monotonic()
        if now - self._last_line >= self._interval_s or moment.step == moment.num_steps:
            self._last_line = now
            self.say(f"{self._label} step {moment.step}/{moment.num_steps}  {describe(moment)}")

    def end(self) -> None:
        """Nothing is open."""


class SilentProgress:
    """Tells nothing, for a rank beside the one that tells."""

    measures_peak = False

    def say(self, text: str) -> None:
        """Nothing is told."""

    def start(self, label: str, first_step: int, num_steps: int) -> None:
        """Nothing is told."""

    def advance(self, moment: Moment) -> None:
        """Nothing is told."""

    def end(self) -> None:
        """Nothing is told."""


class TerminalProgress:
    """A bar that is redrawn in place."""

    measures_peak = True

    def __init__(self) -> None:
        self._console = Console(file=STDERR, highlight=False)
        self._bar: Progress | None = None

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, markup=False, soft_wrap=True)

    def start(self, label: str, first_step: int, num_steps: int) -> None:
        """Draw the bar."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[now]}"),
        )
        self._bar = Progress(
            *columns,
            console=self._console,
            refresh_per_second=2,
            redirect_stdout=False,
            redirect_stderr=False,  # what STDERR writes would come back here, for ever
        )
        self._bar.start()
        self._task = self._bar.add_task(label, total=num_steps, completed=first_step, now="")

    def advance(self, moment: Moment) -> None:
        """Redraw the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=moment.step, now=describe(moment))

    def end(self) -> None:
        """Leave the bar as it is and release the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def open_progress() -> StageProgress:
    """A bar when stderr is a terminal, else lines."""
    return TerminalProgress() if STDERR.isatty() else LineProgress()
