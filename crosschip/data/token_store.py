"""Documents as token ids in one file on disk: written as they come, read through a memory map.

A store is a directory with `tokens.bin` (uint16 or uint32), `ends.bin` (int64, where each document ends), for
fine-tuning `trained.bin` (one byte for each token), and `facts.json` with the hashes of the others. Writing and reading
hold a batch at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from crosschip.data.order import permutation
from crosschip.errors import RunDirectoryError
from crosschip.rundir import atomic_directory, is_complete, read_json, sha256_of, write_json

__all__ = ["StoreFacts", "StoreWriter", "TokenStore", "in_batches", "open_or_write", "shuffled_in_blocks"]

STORE_VERSION = 1
_FACTS, _TOKENS, _ENDS, _TRAINED = "facts.json", "tokens.bin", "ends.bin", "trained.bin"

_REMEDY = "delete {}; it is made again"

Item = TypeVar("Item")


@dataclass(frozen=True)
class StoreFacts:
    """What is in a store. `num_bytes` counts the UTF-8 bytes of the documents' text; `notes` are for the user.

    `sha256` has the hash of each file; it is empty in a store of an older crosschip.
    """

    fingerprint: str
    dtype: str
    num_tokens: int
    num_documents: int
    num_trained_tokens: int
    num_bytes: int
    notes: list[str]
    version: int = STORE_VERSION
    sha256: dict[str, str] = field(default_factory=dict)


class _HashedFile:
    """A file that is written from its beginning to its end, and the hash of that."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._file, self._found = path.open("wb"), hashlib.sha256()

    def write(self, raw: bytes) -> None:
        self._file.write(raw)
        self._found.update(raw)

    def close(self) -> str:
        self._file.close()
        return self._found.hexdigest()


class StoreWriter:
    """Appends documents to the files of a store."""

    def __init__(self, directory: Path, vocab_size: int, with_trained_mask: bool) -> None:
        self.dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
        self.num_tokens = self.num_documents = self.num_trained_tokens = self.num_bytes = 0
        self._directory = directory
        self._tokens, self._ends = _HashedFile(directory / _TOKENS), _HashedFile(directory / _ENDS)
        self._trained = _HashedFile(directory / _TRAINED) if with_trained_mask else None

    def append(self, ids: Sequence[int], num_bytes: int, trained: Sequence[bool] | None = None) -> None:
        """Add one document of `num_bytes` bytes of text."""
        self._tokens.write(np.asarray(ids, dtype=self.dtype).tobytes())
        self.num_tokens += len(ids)
        self.num_documents += 1
        self.num_bytes += num_bytes
        self._ends.write(np.int64(self.num_tokens).tobytes())
        if self._trained is not None:
            assert trained is not None
            mask = np.asarray(trained, dtype=np.uint8)
            assert len(mask) == len(ids)
            self._trained.write(mask.tobytes())
            self.num_trained_tokens += int(mask.sum())

    def close(self, fingerprint: str, notes: Iterable[str]) -> None:
        """Finish the files and write the facts."""
        files = [file for file in (self._tokens, self._ends, self._trained) if file is not None]
        facts = StoreFacts(
            fingerprint=fingerprint,
            dtype=self.dtype.name,
            num_tokens=self.num_tokens,
            num_documents=self.num_documents,
            num_trained_tokens=self.num_trained_tokens,
            num_bytes=self.num_bytes,
            notes=list(notes),
            sha256={file.name: file.close() for file in files},
        )
        write_json(self._directory / _FACTS, asdict(facts))


class TokenStore:
    """A store opened for reading; the arrays are maps of files, not copies.

    Raises:
        RunDirectoryError: what is there is no store, or a file of it has another size.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.facts = _read_facts(directory)
        dtype = np.dtype(self.facts.dtype)
        self.tokens = _map(directory / _TOKENS, dtype, self.facts.num_tokens)
        self.ends = _map(directory / _ENDS, np.dtype(np.int64), self.facts.num_documents)
        has_mask = _TRAINED in self.facts.sha256 or (directory / _TRAINED).exists()
        self.trained = _map(directory / _TRAINED, np.dtype(np.uint8), self.facts.num_tokens) if has_mask else None

    def check(self, beat: Callable[[], None]) -> None:
        """Read all of it, and compare it with what was written. `beat` is called all the while.

        Raises:
            RunDirectoryError: a file is another one.
        """
        for name, digest in self.facts.sha256.items():
            found = sha256_of(self._directory / name, beat)
            if found != digest:
                problem = f"{self._directory / name} is not what was written: its SHA-256 is {found}"
                raise RunDirectoryError(f"{problem}, and was {digest}", _REMEDY.format(self._directory))


def _read_facts(directory: Path) -> StoreFacts:
    document = read_json(directory / _FACTS)
    names = {each.name for each in fields(StoreFacts)}
    is_whole = isinstance(document, dict) and names - {"sha256"} <= set(document) <= names
    is_whole = is_whole and isinstance(document.get("sha256", {}), dict) and document["dtype"] in ("uint16", "uint32")
    if not is_whole:
        raise RunDirectoryError(f"{directory / _FACTS} does not say what is in a store", _REMEDY.format(directory))
    return StoreFacts(**document)


def _map(path: Path, dtype: np.dtype[np.generic], length: int) -> npt.NDArray[np.generic]:
    size = path.stat().st_size if path.exists() else 0
    if size != length * dtype.itemsize:
        raise RunDirectoryError(
            f"{path} has {size} bytes where its facts say {length * dtype.itemsize}", _REMEDY.format(path.parent)
        )
    if length == 0:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", shape=(length,))


def open_or_write(directory: Path, fingerprint: str, write: Callable[[Path], None]) -> TokenStore:
    """The store at `directory` when it is complete and of this fingerprint; else `write` makes it anew.

    Raises:
        RunDirectoryError: a file of the store has another size.
    """
    if not (is_complete(directory) and _is_of(directory, fingerprint)):
        with atomic_directory(directory) as temporary:
            write(temporary)
    return TokenStore(directory)


def _is_of(directory: Path, fingerprint: str) -> bool:
    try:
        facts = _read_facts(directory)
    except RunDirectoryError:  # torn, or of another form
        return False
    return facts.version == STORE_VERSION and facts.fingerprint == fingerprint


def in_batches(items: Iterable[Item], size_of: Callable[[Item], int], limit: int, count: int) -> Iterator[list[Item]]:
    """Lists of at most `count` items whose sizes add up to about `limit`."""
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += size_of(item)
        if size >= limit or len(batch) >= count:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def shuffled_in_blocks(items: Iterable[Item], size_of: Callable[[Item], int], seed: int) -> Iterator[Item]:
    """The items in an order made from the seed within blocks of up to 16,384 items or 32 million characters.

    Neighbours in a file are so torn apart in constant memory.
    """
    for number, block in enumerate(in_batches(items, size_of, limit=32_000_000, count=16_384)):
        for index in permutation(len(block), "block", seed, number):
            yield block[index]
