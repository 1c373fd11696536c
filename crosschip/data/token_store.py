"""Documents as token ids in one file on disk: written as they come, read through a memory map.

A store is a directory with `tokens.bin` (uint16 or uint32), `ends.bin` (int64, where each document ends), for
fine-tuning `trained.bin` (one byte for each token), and `facts.json`. Writing and reading hold a batch at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt

from crosschip.data.order import permutation
from crosschip.errors import RunDirectoryError
from crosschip.rundir import atomic_directory, is_complete, read_json, write_json

__all__ = ["StoreFacts", "StoreWriter", "TokenStore", "in_batches", "open_or_write", "shuffled_in_blocks"]

STORE_VERSION = 1
_FACTS, _TOKENS, _ENDS, _TRAINED = "facts.json", "tokens.bin", "ends.bin", "trained.bin"

Item = TypeVar("Item")


@dataclass(frozen=True)
class StoreFacts:
    """What is in a store. `num_bytes` counts the UTF-8 bytes of the documents' text; `notes` are for the user."""

    fingerprint: str
    dtype: str
    num_tokens: int
    num_documents: int
    num_trained_tokens: int
    num_bytes: int
    notes: list[str]
    version: int = STORE_VERSION


class StoreWriter:
    """Appends documents to the files of a store."""

    def __init__(self, directory: Path, vocab_size: int, with_trained_mask: bool) -> None:
        self.dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
        self.num_tokens = self.num_documents = self.num_trained_tokens = self.num_bytes = 0
        self._directory = directory
        self._tokens: BinaryIO = (directory / _TOKENS).open("wb")
        self._ends: BinaryIO = (directory / _ENDS).open("wb")
        self._trained: BinaryIO | None = (directory / _TRAINED).open("wb") if with_trained_mask else None

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
        for file in (self._tokens, self._ends, self._trained):
            if file is not None:
                file.close()
        facts = StoreFacts(
            fingerprint=fingerprint,
            dtype=self.dtype.name,
            num_tokens=self.num_tokens,
            num_documents=self.num_documents,
            num_trained_tokens=self.num_trained_tokens,
            num_bytes=self.num_bytes,
            notes=list(notes),
        )
        write_json(self._directory / _FACTS, asdict(facts))


class TokenStore:
    """A store opened for reading; the arrays are maps of files, not copies."""

    def __init__(self, directory: Path) -> None:
        self.facts = StoreFacts(**read_json(directory / _FACTS))
        dtype = np.dtype(self.facts.dtype)
        self.tokens = _map(directory / _TOKENS, dtype, self.facts.num_tokens)
        self.ends = _map(directory / _ENDS, np.dtype(np.int64), self.facts.num_documents)
        has_mask = (directory / _TRAINED).exists()
        self.trained = _map(directory / _TRAINED, np.dtype(np.uint8), self.facts.num_tokens) if has_mask else None


def _map(path: Path, dtype: np.dtype[np.generic], length: int) -> npt.NDArray[np.generic]:
    size = path.stat().st_size
    if size != length * dtype.itemsize:
        raise RunDirectoryError(
            f"{path} has {size} bytes where its facts say {length * dtype.itemsize}",
            f"delete {path.parent}; it is made again",
        )
    if length == 0:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", shape=(length,))


def open_or_write(directory: Path, fingerprint: str, write: Callable[[Path], None]) -> TokenStore:
    """The store at `directory` when it is complete and of this fingerprint; else `write` makes it anew."""
    if is_complete(directory):
        facts = read_json(directory / _FACTS)
        if facts.get("version") == STORE_VERSION and facts.get("fingerprint") == fingerprint:
            return TokenStore(directory)
    with atomic_directory(directory) as temporary:
        write(temporary)
    return TokenStore(directory)


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
