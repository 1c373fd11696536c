"""Blocks of the cache: who holds which, which contents are known, which may be given away. Plain Python, no torch.

A block that is full is registered under a digest of all token ids up to its end, so that a later prompt which begins
with the same tokens finds it. Blocks are shared by counting references. A registered block that nobody holds stays
until its room is needed; the one that was let go first is given away first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["BLOCK_TOKENS", "BlockManager", "PrefixCounts", "digests_of"]

BLOCK_TOKENS = 32  # as in `crosschip.model.latent_cache`, which this file must not import: it knows torch


@dataclass
class PrefixCounts:
    """Prompt tokens that were looked for among the known prefixes, and those that were found."""

    asked: int = 0
    found: int = 0


class BlockManager:
    """Hands out the blocks 0 to `num_blocks` - 1."""

    def __init__(self, num_blocks: int, prefix_cache: bool = True) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        self.prefix_cache = prefix_cache
        self.counts = PrefixCounts()
        self._references = [0] * num_blocks
        self._unused = dict.fromkeys(range(num_blocks))  # an ordered set: nothing is known about their content
        self._kept: dict[int, None] = {}  # registered and held by nobody, the one to give away first in front
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._unused) + len(self._kept)

    @property
    def num_known(self) -> int:
        """Blocks whose content can be found by its tokens."""
        return len(self._block_of)

    def references(self, block: int) -> int:
        """How many hold a block."""
        return self._references[block]

    def allocate(self, wished: int) -> int | None:
        """A block for oneself, the wished one if nothing is lost by it; None when all are held.

        Neighbours in order are read without a copy, so callers wish for the block after their last.
        """
        if wished in self._unused:
            block = wished
            del self._unused[wished]
        elif self._unused:
            block, _ = self._unused.popitem()  # the last one: the wished ones lie in front
        elif self._kept:
            block = next(iter(self._kept))
            del self._kept[block]
            self._forget(block)
        else:
            return None
        self._references[block] = 1
        return block

    def hold(self, blocks: Sequence[int]) -> None:
        """One more holder of each of these blocks."""
        for block in blocks:
            self._kept.pop(block, None)
            assert block not in self._unused, block
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less; the ends of prefixes are given away before their beginnings."""
        for block in reversed(blocks):
            self._references[block] -= 1
            assert self._references[block] >= 0, block
            if self._references[block] == 0:
                (self._kept if block in self._digest_of else self._unused)[block] = None

    def find_prefix(self, digests: Sequence[bytes]) -> list[int]:
        """The blocks that hold the longest known beginning, one more holder each."""
        found: list[int] = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            found.append(block)
        self.hold(found)
        return found

    def register(self, block: int, digest: bytes) -> None:
        """Make a full block known. Where another block has this content, that one stays the known one."""
        if self.prefix_cache and digest not in self._block_of and block not in self._digest_of:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def forget(self, blocks: Sequence[int]) -> None:
        """Nobody may find these blocks' content any more: it is wrong."""
        for block in blocks:
            if block in self._digest_of:
                self._forget(block)
                if block in self._kept:
                    del self._kept[block]
                    self._unused[block] = None

    def forget_all(self) -> None:
        """Nothing that was computed so far may be found again: the weights have changed."""
        self.forget(list(self._digest_of))

    def _forget(self, block: int) -> None:
        del self._block_of[self._digest_of.pop(block)]


def digests_of(token_ids: Sequence[int], known: list[bytes], num_blocks: int) -> list[bytes]:
    """Extend `known`, the digests of the first blocks, to those of the first `num_blocks` blocks, in place.

    Each digest is over the one before and the block's ids, 128 bits: that two beginnings fall together by chance, or
    are made to by somebody who wants to read another's answers, is out of reach.
    """
    for number in range(len(known), num_blocks):
        ids = token_ids[number * BLOCK_TOKENS : (number + 1) * BLOCK_TOKENS]
        assert len(ids) == BLOCK_TOKENS
        before = known[number - 1] if number else b""
        known.append(hashlib.blake2b(before + array("q", ids).tobytes(), digest_size=16).digest())
    return known[:num_blocks]
