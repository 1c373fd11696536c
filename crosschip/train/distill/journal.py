"""What is answered already, problem by problem, so that an interrupted distillation goes on where it was."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from crosschip.errors import RunDirectoryError
from crosschip.train.distill.selecting import Sampled

__all__ = ["Journal"]


class Journal:
    """A JSONL file beside the output: who asked what in its first line, then a problem's answers in each.

    What another model, other problems or other settings have left there is not taken over but begun anew. One call
    holds it at a time.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Open it and hold it.

        Raises:
            RunDirectoryError: another call is writing it.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _held(path)
        self.answered: dict[int, list[Sampled]] = self._taken_over(dict(identity))

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
        self._write(_line(number, samples))

    def remove(self) -> None:
        """The output is written: nothing is to be gone on with."""
        self.path.unlink(missing_ok=True)

    def _taken_over(self, identity: dict[str, Any]) -> dict[int, list[Sampled]]:
        """What the file holds of a call like this one; it ends with a whole line afterwards."""
        self._file.seek(0)
        first, *rest = self._file.read().split(b"\n")
        found: dict[int, list[Sampled]] = {}
        if not rest or not _is_json(first, identity):
            self._file.truncate(0)
            self._write(json.dumps(identity))
            return found
        self._file.truncate(self._file.tell() - len(rest[-1]))  # the line that a killed writer has left half written
        for line in rest[:-1]:
            with suppress(ValueError, KeyError, TypeError):  # a damaged line: this problem is asked again
                row = json.loads(line)
                found[row["number"]] = [Sampled(**sample) for sample in row["samples"]]
        return found

    def _write(self, line: str) -> None:
        self._file.write(f"{line}\n".encode())
        self._file.flush()


def _held(path: Path) -> BinaryIO:
    """The file, made where there is none, and locked for this call until it is closed."""
    while True:
        file = path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return file
        except BlockingIOError:
            file.close()
            raise RunDirectoryError(
                f"{path} is in use: another call makes the same file of answers",
                "wait for it or end it, or give another --out",
            ) from None
        file.close()  # its holder has removed it since it was opened


def _is_json(line: bytes, wanted: object) -> bool:
    try:
        return bool(json.loads(line) == wanted)
    except ValueError:
        return False


def _line(number: int, samples: list[Sampled]) -> str:
    return json.dumps({"number": number, "samples": [asdict(sample) for sample in samples]})
