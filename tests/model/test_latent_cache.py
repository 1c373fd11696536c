"""Blocks anywhere in the pool give what neighbours give, and padding is written over nobody's blocks."""

from __future__ import annotations

import pytest
import torch

from crosschip.model import Decoder, ModelConfig
from crosschip.model.latent_cache import BLOCK_TOKENS, LatentCache
from tests.model.configs import random_model

CONFIG = ModelConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, max_position_embeddings=256)


def decoded(decoder: Decoder, cache: LatentCache, ids: torch.Tensor) -> torch.Tensor:
    """States of a prompt of 70 tokens and 30 decoded ones, two rows."""
    slots, parts = torch.tensor([0, 1]), []
    for first, last in ((0, 40), (40, 70), *((at, at + 1) for at in range(70, 100))):
        parts.append(decoder.extend(ids[:, first:last], torch.full((2,), first), slots, cache))
    return torch.cat(parts, dim=1)


def test_scattered_blocks_give_the_same_bits_as_neighbours() -> None:
    decoder = Decoder(random_model(CONFIG))
    ids = torch.randint(0, 97, (2, 100), generator=torch.Generator().manual_seed(3))
    whole = decoded(decoder, decoder.new_cache(2, 128), ids)
    cache = decoder.new_cache(2, 128, num_blocks=11)
    for rows_PX in cache.rows:
        rows_PX.fill_(1e3)  # what others left behind; masked, whatever it is
    cache.set_blocks(0, [7, 2, 9, 1])
    cache.set_blocks(1, [0, 10, 3, 5])
    assert torch.equal(decoded(decoder, cache, ids), whole)
    places = cache.places([0], torch.tensor([[40]]), 41)
    assert places.written_M.tolist() == [2 * BLOCK_TOKENS + 8]


def test_a_wrong_table_is_noticed() -> None:
    """The negative control: a block that is somebody else's gives other states."""
    decoder = Decoder(random_model(CONFIG))
    ids = torch.randint(0, 97, (1, 70), generator=torch.Generator().manual_seed(4))
    states = []
    for other in ([3, 1, 2], [3, 4, 2]):
        cache = decoder.new_cache(1, 96, num_blocks=5)
        cache.set_blocks(0, [3, 1, 2])
        decoder.extend(ids[:, :69], torch.tensor([0]), torch.tensor([0]), cache)
        cache.set_blocks(0, other)
        states.append(decoder.extend(ids[:, 69:], torch.tensor([69]), torch.tensor([0]), cache))
    assert not torch.allclose(*states, atol=1e-3)


def test_padding_past_a_rows_blocks_is_lost() -> None:
    decoder = Decoder(random_model(CONFIG))
    cache = decoder.new_cache(2, 128, num_blocks=6)
    cache.set_blocks(0, [0, 1])
    cache.set_blocks(1, [2])
    for rows_PX in cache.rows:
        rows_PX[3 * BLOCK_TOKENS :].fill_(7.0)
    decoder.extend(torch.ones(2, 50, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), torch.arange(2), cache)
    for rows_PX in cache.rows:
        assert (rows_PX[3 * BLOCK_TOKENS : 6 * BLOCK_TOKENS] == 7.0).all(), "blocks that no table names are untouched"


def test_copied_and_cleared_blocks() -> None:
    decoder = Decoder(random_model(CONFIG))
    cache = decoder.new_cache(1, 64, num_blocks=4)
    for rows_PX in cache.rows:
        rows_PX.normal_()
    cache.copy_block(1, 3)
    blocks = cache.rows[1].unflatten(0, (-1, BLOCK_TOKENS))
    assert torch.equal(blocks[1], blocks[3])
    cache.clear_blocks([1])
    assert not blocks[1].any()
    assert not blocks[4].any(), "the block for padding is cleared, too"
    assert blocks[3].all()


def test_evenly_spaced_rows_are_read_where_they_lie() -> None:
    decoder = Decoder(random_model(CONFIG))
    cache = decoder.new_cache(3, 96, num_blocks=9)
    for slot, first in enumerate((0, 3, 6)):
        cache.set_blocks(slot, [first, first + 1])
    position = torch.full((3, 1), 40)
    assert cache.places([0, 1, 2], position, 41).run is not None
    assert cache.places([1, 2], position[:2], 41).run is not None
    assert cache.places([0, 2], position[:2], 41).run is None, "six blocks apart, the pool ends before two times six"
    assert cache.places([1, 0], position[:2], 41).run is None, "not in order"
    cache.set_blocks(2, [6, 8])
    assert cache.places([0, 1, 2], position, 41).run is None
    assert cache.places([0, 1, 2], torch.full((3, 1), 20), 21).run is not None, "the first blocks are apart evenly"


def test_rows_attended_one_by_one_give_what_they_give_together(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(random_model(CONFIG))
    ids = torch.randint(0, 97, (3, 101), generator=torch.Generator().manual_seed(6))
    states = []
    for limit in (1, 1000):
        monkeypatch.setattr("crosschip.model.decoder._BY_ROW_FROM", limit)
        cache = decoder.new_cache(3, 128, num_blocks=12)
        for slot, blocks in enumerate(([0, 1, 2, 3], [11, 6, 4, 9], [5, 7])):
            cache.set_blocks(slot, blocks)
        for row, length in enumerate((100, 97, 40)):
            decoder.extend(ids[row : row + 1, :length], torch.tensor([0]), torch.tensor([row]), cache)
        states.append(decoder.extend(ids[:, 100:], torch.tensor([100, 97, 40]), torch.arange(3), cache))
    assert torch.allclose(*states, rtol=1e-4, atol=1e-5)
