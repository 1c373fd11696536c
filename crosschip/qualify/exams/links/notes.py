"""What a rank notes, one JSON line each, written at once; so nothing is lost when the rank is killed. No torch."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

__all__ = ["Notes", "NotesReader"]


class Notes:
    """Writes a rank's notes."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def add(self, **note: Any) -> None:
        """Note something; the time is added."""
        self._file.write(json.dumps({**note, "at": time.monotonic()}) + "\n")


class NotesReader:
    """Follows a rank's notes; a last line without its end waits for the rest."""

    def __init__(self, path: Path) -> None:
        self._path, self._position = path, 0
        self.notes: list[dict[str, Any]] = []

    def read(self) -> list[dict[str, Any]]:
        """All notes up to now."""
        if not self._path.exists():
            return self.notes
        with self._path.open("rb") as file:
            file.seek(self._position)
            written = file.read()  # once: the rank may be in the middle of a line, and go on while this reads
        whole = written[: written.rfind(b"\n") + 1]
        self._position += len(whole)
        self.notes += [json.loads(line) for line in whole.splitlines()]
        return self.notes

    def having(self, key: str) -> list[dict[str, Any]]:
        """The notes with this key, among those read."""
        return [note for note in self.notes if key in note]
