"""The block manager: counts that always add up, contents found by their tokens, the right one given away."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from crosschip.model.latent_cache import BLOCK_TOKENS as DECODER_BLOCK_TOKENS
from crosschip.serve.engine.blocks import BLOCK_TOKENS, BlockManager, digests_of

MOVES = ["allocate", "register", "release", "share", "forget", "find"]


def take(manager: BlockManager, count: int) -> list[int]:
    taken = [manager.allocate(0) for _ in range(count)]
    assert None not in taken
    return [block for block in taken if block is not None]


def test_policy_and_decoder_mean_the_same_blocks() -> None:
    assert BLOCK_TOKENS == DECODER_BLOCK_TOKENS


def test_the_wished_block_is_given_while_nothing_is_lost_by_it() -> None:
    manager = BlockManager(4)
    assert manager.allocate(2) == 2
    assert manager.allocate(2) != 2
    assert len(set(take(manager, 2))) == 2
    assert manager.allocate(0) is None


def test_a_digest_names_the_whole_beginning() -> None:
    ids = list(range(3 * BLOCK_TOKENS))
    digests = digests_of(ids, [], 3)
    assert len(set(digests)) == 3
    changed = [99, *ids[1:]]
    assert all(one != other for one, other in zip(digests, digests_of(changed, [], 3), strict=True))
    later = [*ids[:-1], 0]
    assert digests_of(later, [], 3)[:2] == digests[:2]
    assert digests_of(later, [], 3)[2] != digests[2]
    assert digests_of(ids, digests[:1], 3) == digests, "known ones are gone on from"


def test_what_was_let_go_first_is_given_away_first_and_ends_before_beginnings() -> None:
    manager = BlockManager(4)
    first, second = take(manager, 2), take(manager, 2)
    for block, digest in zip(first + second, (b"1", b"2", b"3", b"4"), strict=True):
        manager.register(block, digest)
    manager.release(first)
    manager.release(second)
    assert manager.num_free == 4
    manager.release(manager.find_prefix([b"1", b"2"]))  # used again: now the younger ones
    assert take(manager, 2) == [second[1], second[0]]
    assert manager.find_prefix([b"3"]) == []
    assert take(manager, 1) == [first[1]]
    assert manager.find_prefix([b"1", b"2"]) == [first[0]]


def test_shared_blocks_are_free_when_the_last_holder_leaves() -> None:
    manager = BlockManager(2)
    (block,) = take(manager, 1)
    manager.hold([block])
    manager.release([block])
    assert manager.num_free == 1
    manager.release([block])
    assert manager.num_free == 2


def test_forgotten_contents_are_not_found_whoever_holds_them() -> None:
    manager = BlockManager(3)
    held, kept = take(manager, 2)
    manager.register(held, b"held")
    manager.register(kept, b"kept")
    manager.release([kept])
    manager.forget_all()
    assert manager.find_prefix([b"held"]) == manager.find_prefix([b"kept"]) == []
    assert manager.num_known == 0
    assert manager.num_free == 2
    manager.release([held])
    assert manager.num_free == 3


def test_without_a_prefix_cache_nothing_is_known() -> None:
    manager = BlockManager(2, prefix_cache=False)
    (block,) = take(manager, 1)
    manager.register(block, b"x")
    assert manager.num_known == 0


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(MOVES), st.integers(0, 9))))
def test_counts_add_up_whatever_happens(moves: list[tuple[str, int]]) -> None:
    manager = BlockManager(5)
    holders: list[list[int]] = []
    for move, number in moves:
        held = holders[number % len(holders)] if holders else []
        if move == "allocate" and (block := manager.allocate(number % 5)) is not None:
            assert all(block not in other for other in holders), "nobody's block"
            holders.append([block])
        elif move == "register" and held:
            manager.register(held[0], bytes([number]))
        elif move == "release" and held:
            manager.release(held)
            holders.remove(held)
        elif move == "share" and held:
            manager.hold(held)
            holders.append(list(held))
        elif move == "find" and (found := manager.find_prefix([bytes([number])])):
            holders.append(found)
        elif move == "forget":
            manager.forget(held)
        counted = [sum(block in other for other in holders) for block in range(5)]
        assert [manager.references(block) for block in range(5)] == counted
        assert manager.num_free == counted.count(0)
    for held in holders:
        manager.release(held)
    assert manager.num_free == 5
