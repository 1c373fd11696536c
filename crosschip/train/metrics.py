"""What a stage writes while it runs: JSON lines, one file per kind, and the same curves for TensorBoard."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import IO, Any, Protocol

from crosschip.errors import RunDirectoryError
from crosschip.rundir import sync
from crosschip.train.curves import Curves
from crosschip.train.guard.observed import Event
from crosschip.train.guard.run_files import cut_torn_line, record_of, unreadable_lines
from crosschip.train.step import StepResult

__all__ = ["METRICS_FILE", "Log", "NoLog", "StageLog", "cut_after_step", "step_record"]

METRICS_FILE = "metrics.jsonl"
VALIDATION_FILE = "validation.jsonl"
SAMPLES_FILE = "samples.jsonl"
EVENTS_FILE = "events.jsonl"


def step_record(
    step: int, result: StepResult, seconds: float, learning_rate: float, num_groups: int = 1
) -> dict[str, Any]:
    """The line of one step in `metrics.jsonl`. `tokens` are those computed, padding included, as is `tokens_per_s`.

    A loss or a gradient norm that is no finite number, in a step that was skipped for it, is null.
    """
    record = {
        "step": step,
        "loss": _finite(result.loss),
        "gradient_norm": _finite(result.gradient_norm),
        "tokens": result.num_positions,
        "trained_tokens": result.num_trained_tokens,
        "seconds": round(seconds, 6),
        "learning_rate": learning_rate,
        "tokens_per_s": round(result.num_positions / seconds, 1),
    }
    if result.mtp_loss is not None:
        record["mtp_loss"] = _finite(result.mtp_loss)
    if num_groups > 1:
        record["groups"] = num_groups
    if result.router_imbalance is not None:
        record["router_imbalance"] = result.router_imbalance
    record |= {name: _finite(number) for name, number in result.extra.items()}
    if not result.updated:
        record["skipped"] = True
    return record


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def cut_after_step(path: Path, last_step: int) -> list[int]:
    """Drop the lines of steps after `last_step`, and a line torn by a crash, so that each step stands there once.

    Returns the numbers of other lines that are no records, as after a byte of them has changed: they are dropped, too.
    """
    unreadable: list[int] = []
    if not path.exists():
        return unreadable
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    reading = path.open(encoding="utf-8", errors="replace", newline="\n")  # no other byte may end a line
    with reading as old, temporary.open("w", encoding="utf-8") as new:
        for number, line in enumerate(old, start=1):
            record = record_of(line)
            if record is None:
                unreadable += [number] if line.endswith("\n") else []
            elif record["step"] <= last_step and line.endswith("\n"):
                new.write(line)
        new.flush()
        os.fsync(new.fileno())
    temporary.replace(path)
    return unreadable


class Log(Protocol):
    """Where a stage writes what happens."""

    def step(self, record: dict[str, Any]) -> None:
        """A step is done (see `step_record`)."""

    def validation(self, step: int, **measured: float) -> None:
        """The model was validated: its loss and bits per byte, or its score."""

    def sample(self, step: int, prompt: str, text: str) -> None:
        """The model continued a prompt."""

    def event(self, step: int, event: str, detail: str, action: str) -> None:
        """Something happened, and something was done about it."""

    def roll_back(self, last_step: int) -> None:
        """What was written of steps after `last_step` does not count any more."""

    def sync(self) -> None:
        """What was written shall outlive a power cut."""

    def unreadable(self) -> list[Event]:
        """What could not be read of the logs that were there before, once."""


class NoLog:
    """The log of a rank that writes none, because another one does."""

    def __enter__(self) -> NoLog:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is open."""

    def step(self, record: dict[str, Any]) -> None:
        """Nothing is written."""

    def validation(self, step: int, **measured: float) -> None:
        """Nothing is written."""

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Nothing is written."""

    def event(self, step: int, event: str, detail: str, action: str) -> None:
        """Nothing is written."""

    def roll_back(self, last_step: int) -> None:
        """Nothing was written."""

    def sync(self) -> None:
        """Nothing was written."""

    def unreadable(self) -> list[Event]:
        """Nothing was read."""
        return []


class StageLog:
    """The open log files of a stage, from the step after `first_step - 1` on; a context manager."""

    def __init__(self, directory: Path, last_step: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._unreadable: list[Event] = []
        self._open(last_step)

    def _open(self, last_step: int) -> None:
        for name in (METRICS_FILE, VALIDATION_FILE, SAMPLES_FILE):
            if numbers := cut_after_step(self._directory / name, last_step):
                self._unreadable.append(unreadable_lines(self._directory / name, numbers, last_step))
        cut_torn_line(self._directory / EVENTS_FILE)
        self._files: dict[str, IO[str]] = {
            name: (self._directory / name).open("a", encoding="utf-8")
            for name in (METRICS_FILE, VALIDATION_FILE, SAMPLES_FILE, EVENTS_FILE)
        }
        sync(self._directory)  # the names of files that were made just now
        self._curves = Curves(self._directory / "tensorboard", last_step)

    def _close(self) -> None:
        for close in (*(file.close for file in self._files.values()), self._curves.close):
            with contextlib.suppress(OSError):  # of a line that could not be written, which was told when it came
                close()

    def roll_back(self, last_step: int) -> None:
        """Drop what was written of steps after `last_step`; events stay."""
        self._close()
        self._open(last_step)

    def sync(self) -> None:
        """Wait until every line is on the disk: the checkpoint that comes next must not outlive them in a power cut."""
        for name, file in self._files.items():
            try:
                os.fsync(file.fileno())
            except OSError as error:
                raise _not_written(str(self._directory / name), error) from error
        try:
            self._curves.flush()
        except OSError as error:
            raise _not_written(str(self._directory / "tensorboard"), error) from error

    def unreadable(self) -> list[Event]:
        """Lines that were no records and were left out when the logs were opened; each is told once."""
        found, self._unreadable = self._unreadable, []
        return found

    def __enter__(self) -> StageLog:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def step(self, record: dict[str, Any]) -> None:
        """Append a line to `metrics.jsonl` (see `step_record`)."""
        self._append(METRICS_FILE, record)
        self._draw("train", record, {"loss", "mtp_loss", "gradient_norm", "learning_rate", "tokens_per_s"})
        self._draw("train", record, {"router_imbalance", "reward", "answer_tokens", "entropy", "mismatch_k3"})

    def validation(self, step: int, **measured: float) -> None:
        """Append a line to `validation.jsonl`."""
        self._append(VALIDATION_FILE, {"step": step} | {name: _finite(number) for name, number in measured.items()})
        self._draw("validation", {"step": step, **measured}, set(measured))

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Append a line to `samples.jsonl`."""
        self._append(SAMPLES_FILE, {"step": step, "prompt": prompt, "text": text})

    def event(self, step: int, event: str, detail: str, action: str) -> None:
        """Append a line to `events.jsonl`; events are history and are never cut."""
        self._append(EVENTS_FILE, {"step": step, "event": event, "detail": detail, "action": action})

    def _append(self, name: str, record: dict[str, Any]) -> None:
        file = self._files[name]
        try:
            file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
        except OSError as error:
            raise _not_written(file.name, error) from error

    def _draw(self, group: str, record: dict[str, Any], keys: set[str]) -> None:
        for key in sorted(keys & record.keys()):
            if record[key] is None:
                continue
            try:
                self._curves.draw(f"{group}/{key}", record[key], record["step"])
            except OSError as error:
                raise _not_written(str(self._directory / "tensorboard"), error) from error


def _not_written(name: str, error: OSError) -> RunDirectoryError:
    return RunDirectoryError(f"{name} could not be written: {error}", "free disk space, then go on with --resume")
