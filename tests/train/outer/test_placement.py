from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosschip.train.outer.placement import Place, learning_rate_factor, split_into_fragments


@pytest.mark.parametrize("num_participants", [1, 2, 3, 4])
def test_no_sequence_is_left_out_or_taken_twice(num_participants: int) -> None:
    places = [Place(rank, num_participants, num_groups=4) for rank in range(num_participants)]
    parts = [place.slice(100, batch_size=32) for place in places]
    taken = [sequence for part in parts for sequence in range(part.start, part.start + part.count)]
    assert taken == list(range(100, 100 + parts[0].taken_by_all))


def test_the_batch_gives_or_the_learning_rate() -> None:
    assert learning_rate_factor("smaller-batch", 1, 4) == 1.0
    assert learning_rate_factor("lower-learning-rate", 1, 4) == 0.5
    assert learning_rate_factor("lower-learning-rate", 4, 4) == 1.0
    assert math.isclose(learning_rate_factor("lower-learning-rate", 3, 4), math.sqrt(0.75))


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.integers(1, 8))
def test_fragments_hold_every_parameter_once(sizes: list[int], num_fragments: int) -> None:
    if num_fragments > len(sizes):
        with pytest.raises(ValueError, match="lower it"):
            split_into_fragments(sizes, num_fragments)
        return
    fragments = split_into_fragments(sizes, num_fragments)
    assert [number for each in fragments for number in range(each.first, each.last)] == list(range(len(sizes)))
    assert [each.stop - each.start for each in fragments] == [sum(sizes[each.first : each.last]) for each in fragments]
    assert len(fragments) == num_fragments
    assert all(each.stop > each.start for each in fragments)


def test_fragments_of_equal_parameters_are_equal() -> None:
    assert [each.stop - each.start for each in split_into_fragments([10] * 12, 4)] == [30] * 4
