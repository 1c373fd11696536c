"""Notes are read while a rank writes them: a line of which a part is there waits for the rest."""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO, Any

from crosschip.qualify.exams.links.notes import Notes, NotesReader

WHOLE = b'{"first": 1}\n{"second": 2}\n'


class _Growing(io.RawIOBase):
    """A file that ends within a line, and goes on when it is read beyond its end."""

    def __init__(self) -> None:
        self._parts = [WHOLE[:18], b"", WHOLE[18:], b""]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return offset

    def tell(self) -> int:
        return 0

    def readinto(self, buffer: Any) -> int:
        part = self._parts.pop(0)
        buffer[: len(part)] = part
        return len(part)


class _Path:
    """Where the notes lie while their last line is being written; then as they are in the end."""

    def __init__(self) -> None:
        self._files: list[IO[bytes]] = [io.BufferedReader(_Growing()), io.BytesIO(WHOLE)]

    def exists(self) -> bool:
        return True

    def open(self, mode: str) -> IO[bytes]:
        return self._files.pop(0)


def test_a_line_that_is_completed_while_it_is_read_is_read_once_and_whole() -> None:
    reader = NotesReader(_Path())  # type: ignore[arg-type]  # of a path only these two are asked
    assert reader.read() == [{"first": 1}]
    assert reader.read() == [{"first": 1}, {"second": 2}]


def test_what_was_noted_is_read_once(tmp_path: Path) -> None:
    notes, reader = Notes(tmp_path / "notes"), NotesReader(tmp_path / "notes")
    notes.add(part="a")
    reader.read()
    notes.add(step="b\r\u2028")
    assert [{key: note[key] for key in note if key != "at"} for note in reader.read()] == [
        {"part": "a"},
        {"step": "b\r\u2028"},
    ]
    assert len(reader.having("step")) == 1
