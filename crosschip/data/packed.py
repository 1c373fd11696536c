"""Pre-training data: documents end to end, cut into windows of `seq_len + 1` tokens that overlap by one.

Order. Documents are tokenised once, in a seeded order within large blocks of the source's order (constant memory), and
each epoch visits every window once in its own seeded order. So the sequence at a position is a pure function of seed,
data and position: resuming is giving the position, and processes share a batch by taking parts of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from crosschip.data.batch import Batch
from crosschip.data.order import permutation
from crosschip.data.rows import Split, digest_of
from crosschip.data.source import Source
from crosschip.data.token_store import (
    STORE_VERSION,
    StoreWriter,
    TokenStore,
    in_batches,
    open_or_write,
    shuffled_in_blocks,
)
from crosschip.data.tokenizer import ChatTokenizer
from crosschip.errors import DataError

__all__ = ["PackedStream", "prepare_packed"]

Progress = Callable[[int], None]


class PackedStream:
    """Windows of a token store, epoch after epoch."""

    def __init__(self, store: TokenStore, seq_len: int, seed: int, fingerprint: str) -> None:
        self.num_sequences = (store.facts.num_tokens - 1) // seq_len
        self.num_tokens = self.num_sequences * seq_len  # that are predicted in an epoch
        self.num_bytes = store.facts.num_bytes
        self.notes = store.facts.notes
        self.fingerprint = fingerprint
        self.seq_len = seq_len
        self._store = store
        self._seed = seed
        self._epoch_order = lru_cache(maxsize=2)(self._make_epoch_order)  # a batch touches two epochs at most, mostly

    def check(self, beat: Callable[[], None]) -> None:
        """See `TokenStore.check`."""
        self._store.check(beat)

    def batch(self, first_sequence: int, count: int) -> Batch:
        """[count, seq_len] the sequences at positions first_sequence to first_sequence + count - 1."""
        windows = np.empty((count, self.seq_len + 1), dtype=np.int64)
        for row in range(count):
            epoch, place = divmod(first_sequence + row, self.num_sequences)
            start = int(self._epoch_order(epoch)[place]) * self.seq_len
            windows[row] = self._store.tokens[start : start + self.seq_len + 1]
        tokens = torch.from_numpy(windows)
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def _make_epoch_order(self, epoch: int) -> npt.NDArray[np.int64]:
        return permutation(self.num_sequences, "windows", self._seed, epoch)


def prepare_packed(
    source: Source,
    tokenizer: ChatTokenizer,
    directory: Path,
    seq_len: int,
    seed: int,
    split: Split,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> PackedStream:
    """Tokenise a split into `directory`/packed-SPLIT, or open what is there when it was made from the same.

    `max_tokens` ends tokenising early; `progress` is told the number of tokens so far. Each document is bos, text, eos.
    Fewer tokens than one window needs is a `DataError`.
    """
    identity = digest_of([STORE_VERSION, "packed", source.fingerprint, tokenizer.fingerprint, seed, split, max_tokens])

    def write(temporary: Path) -> None:
        writer = StoreWriter(temporary, tokenizer.vocab_size, with_trained_mask=False)
        _tokenise(source, tokenizer, writer, seed, split, max_tokens, progress)
        writer.close(identity, source.notes)

    store = open_or_write(directory / f"packed-{split}", identity, write)
    if store.facts.num_tokens <= seq_len:
        raise DataError(
            f"the {split} split has {store.facts.num_tokens} tokens, and one sequence takes {seq_len + 1}",
            "lower seq_len, give more data, or change data.validation_fraction",
        )
    return PackedStream(store, seq_len, seed, digest_of([identity, seq_len]))


def _tokenise(
    source: Source,
    tokenizer: ChatTokenizer,
    writer: StoreWriter,
    seed: int,
    split: Split,
    max_tokens: int | None,
    progress: Progress | None,
) -> None:
    texts = shuffled_in_blocks((row.as_text() for row in source.rows(split)), len, seed)
    for batch in in_batches(texts, len, limit=1_000_000, count=2_048):
        for text, ids in zip(batch, tokenizer.encode_texts(batch), strict=True):
            document = [tokenizer.bos_id, *ids, tokenizer.eos_id]
            room = None if max_tokens is None else max_tokens - writer.num_tokens
            writer.append(document[:room], len(text.encode("utf-8")))
            if max_tokens is not None and writer.num_tokens >= max_tokens:
                return
        if progress is not None:
            progress(writer.num_tokens)
