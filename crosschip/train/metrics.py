"""What a stage writes while it runs: JSON lines, one file per kind, and the same curves for TensorBoard."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

from crosschip.errors import RunDirectoryError
from crosschip.train.step import StepResult

__all__ = ["METRICS_FILE", "StageLog", "cut_after_step", "step_record"]

METRICS_FILE = "metrics.jsonl"
VALIDATION_FILE = "validation.jsonl"
SAMPLES_FILE = "samples.jsonl"
EVENTS_FILE = "events.jsonl"


def step_record(step: int, result: StepResult, seconds: float, learning_rate: float) -> dict[str, Any]:
    """The line of one step in `metrics.jsonl`. `tokens` are those computed, padding included, as is `tokens_per_s`."""
    record = {
        "step": step,
        "loss": result.loss,
        "gradient_norm": result.gradient_norm,
        "tokens": result.num_positions,
        "trained_tokens": result.num_trained_tokens,
        "seconds": round(seconds, 6),
        "learning_rate": learning_rate,
        "tokens_per_s": round(result.num_positions / seconds, 1),
    }
    if result.mtp_loss is not None:
        record["mtp_loss"] = result.mtp_loss
    if result.router_imbalance is not None:
        record["router_imbalance"] = result.router_imbalance
    return record


def cut_after_step(path: Path, last_step: int) -> None:
    """Drop the lines of steps after `last_step`, and a line torn by a crash, so that each step stands there once."""
    if not path.exists():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with path.open(encoding="utf-8") as old, temporary.open("w", encoding="utf-8") as new:
        for number, line in enumerate(old, start=1):
            if line.endswith("\n") and _step_of(line, f"{path}:{number}") <= last_step:
                new.write(line)
        new.flush()
        os.fsync(new.fileno())
    temporary.replace(path)


def _step_of(line: str, place: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        raise RunDirectoryError(f"{place} is not a line of this log: {line[:60]!r}", "delete the line") from None


class StageLog:
    """The open log files of a stage, from the step after `first_step - 1` on; a context manager."""

    def __init__(self, directory: Path, last_step: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for name in (METRICS_FILE, VALIDATION_FILE, SAMPLES_FILE):
            cut_after_step(directory / name, last_step)
        self._files: dict[str, IO[str]] = {
            name: (directory / name).open("a", encoding="utf-8")
            for name in (METRICS_FILE, VALIDATION_FILE, SAMPLES_FILE, EVENTS_FILE)
        }
        from tensorboardX import SummaryWriter  # slow to import, and only a stage that runs needs it

        # purge_step hides what a run that was killed had drawn beyond the step it is resumed from.
        self._curves = SummaryWriter(str(directory / "tensorboard"), purge_step=last_step + 1 if last_step else None)

    def __enter__(self) -> StageLog:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files.values():
            file.close()
        self._curves.close()

    def step(self, record: dict[str, Any]) -> None:
        """Append a line to `metrics.jsonl` (see `step_record`)."""
        self._append(METRICS_FILE, record)
        self._draw("train", record, {"loss", "mtp_loss", "gradient_norm", "learning_rate", "tokens_per_s"})
        self._draw("train", record, {"router_imbalance"})

    def validation(self, step: int, validation_loss: float, bits_per_byte: float) -> None:
        """Append a line to `validation.jsonl`."""
        record = {"step": step, "validation_loss": validation_loss, "bits_per_byte": bits_per_byte}
        self._append(VALIDATION_FILE, record)
        self._draw("validation", record, {"validation_loss", "bits_per_byte"})

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
            raise RunDirectoryError(
                f"{file.name} could not be written: {error}", "free disk space, then go on with --resume"
            ) from error

    def _draw(self, group: str, record: dict[str, Any], keys: set[str]) -> None:
        for key in sorted(keys & record.keys()):
            self._curves.add_scalar(f"{group}/{key}", record[key], record["step"])
