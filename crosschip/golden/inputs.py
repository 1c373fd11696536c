"""The token ids of a bundle: made on the CPU from a seed, so that they are the same whoever records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from crosschip.errors import GoldenError

__all__ = ["LADDER", "ModelShape", "Row", "ladder_rows", "rows_of_ids", "text_rows"]

# One below, at and above what attention kernels and caches cut their work into, and each power of two between.
LADDER = (
    *(1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513),
    *(1023, 1024, 1025, 2047, 2048, 2049, 4096, 8192, 16384, 32768),
)


@dataclass(frozen=True)
class ModelShape:
    """What the choice of rows depends on: vocabulary, longest row, and what one token costs in a bundle."""

    vocab_size: int
    longest: int
    bytes_per_position: int
    points: list[str]
    num_nextn_predict_layers: int = 0


@dataclass(frozen=True)
class Row:
    """One sequence of token ids, and where it comes from: `made` or `text`."""

    ids: tuple[int, ...]
    origin: str


def ladder_rows(vocab_size: int, longest: int, num_tokens: int, seed: int) -> tuple[list[Row], list[int]]:
    """Made-up rows for each length of the ladder up to `longest`, and the lengths that did not fit into `num_tokens`.

    `longest` itself is always a wish; short lengths come first. Each row has a generator of its own, so a row does not
    depend on which others there are.
    """
    wanted = sorted({length for length in LADDER if length < longest} | {longest})
    rows, left_out, used = [], [], 0
    for length in wanted:
        if used + length > num_tokens:
            left_out.append(length)
            continue
        generator = torch.Generator().manual_seed(seed * 1_000_003 + length)
        ids = torch.randint(0, vocab_size, (length,), generator=generator)
        rows.append(Row(tuple(ids.tolist()), "made"))
        used += length
    return rows, left_out


def text_rows(texts: Sequence[str], tokenizer_file: Path, longest: int, num_tokens: int) -> list[Row]:
    """Rows of real text, each cut at `longest`, as many as fit into `num_tokens`.

    Raises:
        GoldenError: there is no tokenizer to read the texts with.
    """
    from tokenizers import Tokenizer

    if not tokenizer_file.is_file():
        raise GoldenError(
            f"texts were given and {tokenizer_file} is missing",
            "leave the texts out, or give the tokenizer's directory",
        )
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    encoded = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    return rows_of_ids(encoded, longest, num_tokens)


def rows_of_ids(sequences: Sequence[Sequence[int]], longest: int, num_tokens: int) -> list[Row]:
    """Rows of given token ids, each cut at `longest`, as many as fit into `num_tokens`."""
    rows, used = [], 0
    for ids in sequences:
        cut = tuple(int(each) for each in ids[:longest])
        if not cut or used + len(cut) > num_tokens:
            continue
        rows.append(Row(cut, "text"))
        used += len(cut)
    return rows
