"""Where rows come from: files, or problems made on the spot; streamed, and split by a hash of their content."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from crosschip.data.arithmetic import HELD_OUT_SHARE, LEVELS, is_held_out, make_problem
from crosschip.data.files import find_files
from crosschip.data.readers import BadRow, RowForm, read_file
from crosschip.data.rows import Row, Split, digest_of, falls_below
from crosschip.errors import DataError
from crosschip.recipe import DataSettings

__all__ = ["ArithmeticSource", "FileSource", "Source", "open_source"]


class Source(Protocol):
    """Rows of a data set. `notes` holds what the user should be told about what was read."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the content and of the settings that matter for the rows and their order."""

    def find_digests(self, beat: Callable[[], None]) -> list[str]:
        """What of the fingerprint takes long: a hash of each file's content. `beat` is called all the while."""

    def take_digests(self, digests: list[str]) -> None:
        """The fingerprint is of these, which another process has found."""

    @property
    def notes(self) -> list[str]:
        """What was left out, in words; complete when the rows have been read to their end."""

    def rows(self, split: Split) -> Iterator[Row]:
        """The rows of a split, read anew with each call, in an order that depends on the data and the seed alone."""


def open_source(settings: DataSettings, seed: int) -> Source:
    """The source that `[data]` describes; what is missing or cannot be read is a `DataError`."""
    if settings.source == "arithmetic":
        return ArithmeticSource(settings, seed)
    if settings.path is None:
        raise DataError("[data] has no path", 'set data.path, or data.source = "arithmetic", which needs no files')
    return FileSource(settings, seed)


class ArithmeticSource:
    """Problems of `levels` in turn, `num_problems` of them before the held-out ones are taken away."""

    def __init__(self, settings: DataSettings, seed: int) -> None:
        unknown = sorted(set(settings.levels) - set(LEVELS))
        if unknown or not settings.levels:
            raise DataError(f"data.levels={settings.levels} names no known levels", f"use levels from {sorted(LEVELS)}")
        self.notes: list[str] = []
        self._levels = settings.levels
        self._num_problems = settings.num_problems
        self._share = max(settings.validation_fraction, HELD_OUT_SHARE)  # what is asked in evaluation is never trained
        self._seed = seed

    @property
    def fingerprint(self) -> str:
        """Over the settings and the first problems of each level, so that a changed generator is noticed."""
        sample = [make_problem(level, self._seed, index) for level in self._levels for index in range(64)]
        return digest_of(["arithmetic", self._levels, self._num_problems, self._share, self._seed, sample])

    def find_digests(self, beat: Callable[[], None]) -> list[str]:
        """There are no files."""
        return []

    def take_digests(self, digests: list[str]) -> None:
        """There are none."""

    def rows(self, split: Split) -> Iterator[Row]:
        """Problems of a split; the same in each epoch."""
        num_rows = 0
        for index in range(self._num_problems):
            problem = make_problem(self._levels[index % len(self._levels)], self._seed, index)
            if is_held_out(problem.question, self._share) == (split == "validation"):
                num_rows += 1
                yield problem.as_row()
        if num_rows == 0:
            raise _no_rows(split, "arithmetic", self._num_problems, "raise data.num_problems")


class FileSource:
    """Rows of local files or of the hub."""

    def __init__(self, settings: DataSettings, seed: int) -> None:
        assert settings.path is not None
        self._settings = settings
        self._form = RowForm(settings)
        self._files, self._file_notes = find_files(settings.path, settings.format, seed)
        self._digests: list[str] | None = None
        self._skipped: dict[str, BadRow] = {}
        self._num_empty = 0

    @property
    def fingerprint(self) -> str:
        """Over the files' bytes and the settings; reads the files where nobody has yet."""
        if self._digests is None:
            self._digests = self.find_digests(lambda: None)
        settings = self._settings.model_dump(exclude={"path", "levels", "num_problems"})
        if not self._settings.question_suffix:
            del settings["question_suffix"]  # runs from before there was one go on
        return digest_of([*self._digests, sorted(settings.items())])

    def find_digests(self, beat: Callable[[], None]) -> list[str]:
        """Read the files once; `beat` is called for each block."""
        if self._digests is None:
            self._digests = [f"{file.format} {file.digest(beat)}" for file in self._files]
        return self._digests

    def take_digests(self, digests: list[str]) -> None:
        """The files have these hashes."""
        self._digests = digests

    @property
    def notes(self) -> list[str]:
        """Files and rows that were left out."""
        notes = list(self._file_notes)
        if self._num_empty:
            notes.append(f"{self._num_empty} empty documents were left out")
        if self._skipped:
            first = next(iter(self._skipped.values()))
            notes.append(f"{len(self._skipped)} bad rows were skipped, the first at {first.place}: {first.problem}")
        return notes

    def rows(self, split: Split) -> Iterator[Row]:
        """Rows of a split. More bad rows than `skip_bad_rows` allows, or no row at all, is a `DataError`."""
        num_rows = num_all = num_bad = num_empty = 0
        for file in self._files:
            for row in read_file(file, self._form):
                if isinstance(row, BadRow):
                    if row.is_empty:
                        num_empty += 1
                        continue
                    num_bad += 1
                    self._skip(row, num_bad)
                    continue
                num_all += 1
                if falls_below(row.split_key(), self._settings.validation_fraction) == (split == "validation"):
                    num_rows += 1
                    yield row
        self._num_empty = num_empty
        if num_rows == 0:
            remedy = "check the files" if num_all == 0 else "give more rows, or change data.validation_fraction"
            raise _no_rows(split, str(self._settings.path), num_all, remedy)

    def _skip(self, bad: BadRow, num_bad: int) -> None:
        allowed = self._settings.skip_bad_rows
        if num_bad > allowed:
            count = f" (bad row number {num_bad}, and data.skip_bad_rows={allowed})" if allowed else ""
            raise DataError(f"{bad.place}: {bad.problem}{count}", bad.remedy)
        self._skipped.setdefault(bad.place, bad)


def _no_rows(split: Split, name: str, num_all: int, remedy: str) -> DataError:
    if num_all == 0:
        return DataError(f"{name} holds no row: the data set is empty", remedy)
    return DataError(f"{name}: none of its {num_all} rows falls into the {split} split", remedy)
