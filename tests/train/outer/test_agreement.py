from __future__ import annotations

from dataclasses import replace

import pytest

from crosschip.train.outer.agreement import Header, UnfitGroup, begun_anew, check_headers, standing
from crosschip.train.outer.errors import GroupsError

HEADER = Header(rules=7, num_elements=100, num_numbers=2, step=5, num_tokens=4096, checksum=0xABCD1234, seniority=3)
FIELDS = [("rules", "settings"), ("num_elements", "number of parameters"), ("num_numbers", "figures"), ("step", "step")]


def test_groups_that_begin_anew_stand_in_one_order() -> None:
    """A new group is behind, one with anything in common with others ahead; of the rest no two stand alike."""
    anew = [standing(0, begun_anew(step, group, 3)) for step in (1, 2, 10**9) for group in (2, 1, 0)]
    order = [standing(0), *anew, standing(1), standing(2)]
    assert order == sorted(set(order))


def test_a_header_survives_the_wire() -> None:
    assert Header.read(HEADER.numbers()) == HEADER


def test_groups_may_differ_in_tokens_and_need_not_give_a_checksum() -> None:
    headers = [HEADER, replace(HEADER, num_tokens=0, seniority=0), replace(HEADER, checksum=0)]
    for rank in range(3):
        check_headers(headers, rank)


@pytest.mark.parametrize(("field", "words"), FIELDS)
def test_what_differs_between_equally_old_groups_is_named_to_both(field: str, words: str) -> None:
    other = replace(HEADER, **{field: getattr(HEADER, field) + 1})
    for rank in range(2):
        with pytest.raises(GroupsError, match=words):
            check_headers([HEADER, other], rank)


@pytest.mark.parametrize(("field", "words"), FIELDS)
def test_a_newcomer_leaves_and_the_others_stay(field: str, words: str) -> None:
    newcomer = replace(HEADER, seniority=0, **{field: getattr(HEADER, field) + 1})
    with pytest.raises(UnfitGroup, match=words):
        check_headers([HEADER, newcomer], 0)
    with pytest.raises(GroupsError, match=words):
        check_headers([HEADER, newcomer], 1)


def test_of_two_groups_with_other_parameters_nobody_goes_on() -> None:
    other = replace(HEADER, checksum=0xABCD1235, seniority=0)
    for rank in range(2):
        with pytest.raises(GroupsError, match="abcd1234, abcd1235"):
            check_headers([HEADER, other], rank)


def test_of_three_groups_the_one_with_other_parameters_leaves() -> None:
    headers = [HEADER, replace(HEADER, checksum=1, seniority=9), HEADER]
    for rank in (0, 2):
        with pytest.raises(UnfitGroup):
            check_headers(headers, rank)
    with pytest.raises(GroupsError, match="parameters differ"):
        check_headers(headers, 1)
