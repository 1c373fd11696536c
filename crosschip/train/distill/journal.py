"""What is answered already, problem by problem, so that an interrupted distillation goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from crosschip.train.distill.selecting import Sampled

__all__ = ["Journal"]


class Journal:
    """A JSONL file beside the output: who asked what in its first line, then a problem's answers in each.

    What another model, other problems or other settings have left there is not taken over but begun anew.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self._identity = dict(identity)
        self.answered: dict[int, list[Sampled]] = self._read()
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(self._identity)] + [_line(number, each) for number, each in self.answered.items()]
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        temporary.replace(path)  # without the line that a killed writer has left half written
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, number: int, samples: list[Sampled]) -> None:
        """Remember a problem's answers. One that failed is not written, so that a later call asks the problem again."""
        self.answered[number] = samples
        if any(sample.failure is not None for sample in samples):
            return
        self._file.write(f"{_line(number, samples)}\n")
        self._file.flush()

    def remove(self) -> None:
        """The output is written: nothing is to be gone on with."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> dict[int, list[Sampled]]:
        try:
            first, *rest = self.path.read_bytes().split(b"\n")
            if json.loads(first) != self._identity:
                return {}
        except (OSError, ValueError):
            return {}
        found: dict[int, list[Sampled]] = {}
        for line in rest:
            try:
                row = json.loads(line)
                found[row["number"]] = [Sampled(**sample) for sample in row["samples"]]
            except (ValueError, KeyError, TypeError):
                continue  # torn by a kill: this problem is asked again
        return found


def _line(number: int, samples: list[Sampled]) -> str:
    return json.dumps({"number": number, "samples": [asdict(sample) for sample in samples]})
