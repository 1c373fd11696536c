"""Fine-tuning data: one conversation a row, the assistant's words trained, everything else masked.

Order. Each epoch visits every example once in a seeded order. Within windows of 1,024 positions examples are sorted by
length and dealt out in blocks of 64, the blocks in a seeded order, so that a batch holds examples of like length and
little is padding. The example at a position depends on seed, data and position alone, not on the size of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from crosschip.data.batch import NOT_TRAINED, Batch
from crosschip.data.order import hashed_keys, permutation
from crosschip.data.rows import Row, Split, digest_of
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

__all__ = ["ChatStream", "prepare_chat"]

_WINDOW = 1_024  # positions within which examples are sorted by length
_BLOCK = 64  # examples of like length that stay together
_ROUND_UP = 16  # padded lengths are multiples of this: fewer shapes, and what matrix units like

Progress = Callable[[int], None]


class ChatStream:
    """Examples of a token store, epoch after epoch, right-padded."""

    def __init__(self, store: TokenStore, seq_len: int, seed: int, pad_id: int, fingerprint: str) -> None:
        self.num_sequences = store.facts.num_documents
        self.num_tokens = store.facts.num_tokens - store.facts.num_documents  # inputs in an epoch, without padding
        self.num_trained_tokens = store.facts.num_trained_tokens
        self.num_bytes = store.facts.num_bytes
        self.notes = store.facts.notes
        self.fingerprint = fingerprint
        self.seq_len = seq_len
        self._store = store
        self._seed = seed
        self._pad_id = pad_id
        self._ends = np.concatenate([np.zeros(1, dtype=np.int64), store.ends.astype(np.int64)])
        self._epoch_order = lru_cache(maxsize=2)(self._make_epoch_order)

    def check(self, beat: Callable[[], None]) -> None:
        """See `TokenStore.check`."""
        self._store.check(beat)

    def batch(self, first_sequence: int, count: int) -> Batch:
        """[count, T] the examples at positions from first_sequence; T is the longest rounded up to 16, or seq_len."""
        examples = [self._example(first_sequence + row) for row in range(count)]
        longest = max(len(tokens) for tokens, _ in examples) - 1
        width = min(self.seq_len, -(-longest // _ROUND_UP) * _ROUND_UP)
        inputs = np.full((count, width), self._pad_id, dtype=np.int64)
        labels = np.full((count, width), NOT_TRAINED, dtype=np.int64)
        for row, (tokens, trained) in enumerate(examples):
            length = len(tokens) - 1
            inputs[row, :length] = tokens[:-1]
            labels[row, :length] = np.where(trained[1:], tokens[1:], NOT_TRAINED)
        return Batch(torch.from_numpy(inputs), torch.from_numpy(labels))

    def _example(self, position: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        epoch, place = divmod(position, self.num_sequences)
        index = int(self._epoch_order(epoch)[place])
        begin, end = int(self._ends[index]), int(self._ends[index + 1])
        assert self._store.trained is not None
        return self._store.tokens[begin:end].astype(np.int64), self._store.trained[begin:end].astype(np.bool_)

    def _make_epoch_order(self, epoch: int) -> npt.NDArray[np.int64]:
        order = permutation(self.num_sequences, "examples", self._seed, epoch)
        lengths = np.diff(self._ends)
        places = np.arange(self.num_sequences)
        order = order[np.lexsort((lengths[order], places // _WINDOW))]
        blocks = places // _BLOCK
        block_keys = hashed_keys(int(blocks[-1]) + 1, "blocks", self._seed, epoch)
        if self.num_sequences % _BLOCK:
            block_keys[-1] = np.iinfo(np.uint64).max  # a short block last, so that the others stay aligned
        return order[np.lexsort((places, block_keys[blocks], places // _WINDOW))]


def prepare_chat(
    source: Source,
    tokenizer: ChatTokenizer,
    directory: Path,
    seq_len: int,
    seed: int,
    split: Split,
    max_examples: int | None = None,
    progress: Progress | None = None,
) -> ChatStream:
    """Tokenise a split's conversations into `directory`/chat-SPLIT, or open what was made from the same before.

    An example longer than seq_len + 1 tokens is cut there; one with nothing to train in what is left is left out. Both
    are counted in the stream's `notes`. No example at all is a `DataError`. `progress` is told the tokens so far.
    """
    identity = digest_of(
        [STORE_VERSION, "chat", source.fingerprint, tokenizer.fingerprint, seq_len, seed, split, max_examples]
    )

    def write(temporary: Path) -> None:
        writer = StoreWriter(temporary, tokenizer.vocab_size, with_trained_mask=True)
        notes = _tokenise(islice(source.rows(split), max_examples), tokenizer, writer, seq_len, seed, progress)
        writer.close(identity, [*source.notes, *notes])

    store = open_or_write(directory / f"chat-{split}", identity, write)
    if store.facts.num_documents == 0:
        raise DataError(
            f"no conversation of the {split} split has a word of the assistant within seq_len={seq_len} tokens",
            "raise seq_len, or give conversations with assistant turns",
        )
    return ChatStream(store, seq_len, seed, tokenizer.pad_id, identity)


def _tokenise(
    rows: Iterator[Row],
    tokenizer: ChatTokenizer,
    writer: StoreWriter,
    seq_len: int,
    seed: int,
    progress: Progress | None,
) -> list[str]:
    num_cut = num_left_out = 0
    shuffled = shuffled_in_blocks(rows, _num_characters, seed)
    for batch in in_batches(shuffled, _num_characters, limit=1_000_000, count=1_024):
        for row, (ids, trained) in zip(batch, tokenizer.encode_examples([r.as_messages() for r in batch]), strict=True):
            is_long = len(ids) > seq_len + 1
            if not any(trained[1 : seq_len + 1]):
                num_left_out += 1
                continue
            num_cut += is_long
            writer.append(ids[: seq_len + 1], _num_bytes(row), trained[: seq_len + 1])
        if progress is not None:
            progress(writer.num_tokens)
    notes = []
    if num_cut:
        notes.append(
            f"{num_cut} examples are longer than seq_len={seq_len} tokens and were cut there, without their end"
        )
    if num_left_out:
        notes.append(f"{num_left_out} examples have nothing to train within seq_len={seq_len} tokens and were left out")
    return notes


def _num_characters(row: Row) -> int:
    return sum(len(m.content) + len(m.reasoning_content or "") for m in row.as_messages())


def _num_bytes(row: Row) -> int:
    return sum(len((m.content + (m.reasoning_content or "")).encode("utf-8")) for m in row.as_messages())
