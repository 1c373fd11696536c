"""One rank that is slower than its fellows all of the time."""

from __future__ import annotations

import random

from crosschip.qualify.exams.stability.stragglers import find_straggler


def rounds(factor: float = 1.0, num: int = 60, seed: int = 0) -> list[float]:
    source = random.Random(seed)
    return [0.02 * factor * (1 + 0.05 * source.random()) for _ in range(num)]


def test_the_slow_rank_is_named() -> None:
    found = find_straggler([rounds(seed=rank, factor=1.3 if rank == 2 else 1.0) for rank in range(4)])
    assert found is not None
    assert found.rank == 2
    assert found.is_beyond_limit
    assert 1.2 < found.slowness.lower < 1.3 < found.slowness.upper < 1.4


def test_equal_ranks_have_none() -> None:
    found = find_straggler([rounds(seed=rank) for rank in range(4)])
    assert found is not None
    assert not found.is_beyond_limit


def test_a_passing_burden_is_no_straggler() -> None:
    burdened = [each * (3.0 if 10 <= place < 30 else 1.0) for place, each in enumerate(rounds())]
    found = find_straggler([burdened, rounds(seed=1), rounds(seed=2)])
    assert found is not None
    assert not found.is_beyond_limit


def test_ranks_of_other_lengths_are_compared_over_what_both_made() -> None:
    found = find_straggler([rounds(num=100), rounds(factor=1.5, num=66, seed=1)])
    assert found is not None
    assert (found.rank, found.is_beyond_limit) == (1, True)


def test_too_little_says_nothing() -> None:
    assert find_straggler([rounds()]) is None
    assert find_straggler([rounds(num=4), rounds(num=4)]) is None
    assert find_straggler([rounds(), []]) is None
    assert find_straggler([]) is None
