"""The files of a directory with their sizes and hashes, and how they differ from those that a certificate names."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from crosschip.certificate.document import CERTIFICATE_FILE
from crosschip.errors import HandoffError
from crosschip.rundir import COMPLETE

__all__ = ["FileEntry", "FileProblem", "compare_files", "files_of", "hash_files"]

Tell = Callable[[str], None]

_OURS = (CERTIFICATE_FILE, COMPLETE)  # at the top of the directory: the certificate cannot hold its own hash
_CHUNK_BYTES = 8 << 20
_SAY_EVERY_S = 2.0


@dataclass(frozen=True)
class FileEntry:
    """One file: its name relative to the directory with `/` between parts, its size, its SHA-256."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class FileProblem:
    """A file that is not as the certificate says: `missing`, `extra`, `changed` or `unreadable`, in words."""

    name: str
    kind: str
    words: str


def files_of(directory: Path) -> list[str]:
    """The names of all files below `directory`, sorted, but for the certificate, COMPLETE and hidden ones.

    Hidden names (`.git`, `.cache`) are what tools of version control and download leave; no engine reads them.

    Raises:
        HandoffError: a name leads to something that is no file, such as a pipe or a link to a directory, or is no text.
    """
    found = []
    for parent, directories, names in os.walk(directory):
        here = Path(parent)
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        for name in directories:
            if (here / name).is_symlink():
                raise _no_file(here / name, "a link to a directory")
        for name in names:
            relative = _as_text((here / name).relative_to(directory).as_posix(), directory)
            if not name.startswith(".") and relative not in _OURS:
                found.append(relative)
    return sorted(found)


def _as_text(name: str, directory: Path) -> str:
    """A name as it is; the bytes of some are no UTF-8, and no certificate could hold them."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise HandoffError(f"{directory} holds a file whose name is no UTF-8: {name!a}", "rename it") from None
    return name


def hash_files(directory: Path, names: list[str], tell: Tell = lambda line: None) -> list[FileEntry]:
    """Size and SHA-256 of each named file; `tell` hears how far it is, and how long it still takes.

    Raises:
        HandoffError: one is no regular file, or cannot be read.
    """
    sizes = {name: _size(directory / name) for name in names}
    progress = _Progress(sum(sizes.values()), tell)
    return [FileEntry(name, sizes[name], _hash(directory / name, progress)) for name in names]


def compare_files(directory: Path, certified: list[FileEntry], tell: Tell = lambda line: None) -> Iterator[FileProblem]:
    """Every way in which the files are not those that were certified. Sizes come first: they cost nothing."""
    names, known = files_of(directory), {entry.name: entry for entry in certified}
    there = set(names)
    for name in names:
        if name not in known:
            yield FileProblem(name, "extra", f"{name} is not among the certified files")
    same_size = []
    for entry in certified:
        if entry.name not in there:
            yield FileProblem(entry.name, "missing", f"{entry.name} is missing")
        elif (size := _size(directory / entry.name)) != entry.bytes:
            yield FileProblem(entry.name, "changed", f"{entry.name} has {size} B, certified {entry.bytes} B")
        else:
            same_size.append(entry.name)
    for found in hash_files(directory, same_size, tell):
        if found.sha256 != known[found.name].sha256:
            yield FileProblem(found.name, "changed", f"{found.name} holds other bytes than the certified ones")


class _Progress:
    """Says every few seconds how many bytes were read and how long the rest takes."""

    def __init__(self, total_bytes: int, tell: Tell) -> None:
        self._total, self._tell, self._done = total_bytes, tell, 0
        self._began = self._said = time.monotonic()

    def read(self, num_bytes: int) -> None:
        """So many bytes more."""
        self._done += num_bytes
        now = time.monotonic()
        if now - self._said < _SAY_EVERY_S:
            return
        self._said = now
        left_s = (self._total - self._done) * (now - self._began) / max(self._done, 1)
        self._tell(f"hashing: {self._done / 1e9:.1f} of {self._total / 1e9:.1f} GB, {left_s:.0f} s left")


def _hash(path: Path, progress: _Progress) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                progress.read(len(chunk))
    except OSError as error:
        raise HandoffError(
            f"{path} cannot be read: {error.strerror or error}", "make it readable, or copy it again"
        ) from None
    return digest.hexdigest()


def _size(path: Path) -> int:
    try:
        found = path.stat()
    except OSError as error:
        raise HandoffError(f"{path} cannot be read: {error.strerror or error}", "copy the directory again") from None
    if not stat.S_ISREG(found.st_mode):
        raise _no_file(path, "no regular file")
    return found.st_size


def _no_file(path: Path, what: str) -> HandoffError:
    return HandoffError(f"{path} is {what}: it has no bytes of its own to certify", "remove it from the directory")
