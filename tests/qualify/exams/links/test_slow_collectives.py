from __future__ import annotations

from crosschip.qualify.exams.links.collective_cases import kind_is_needed
from crosschip.qualify.exams.links.slow_collectives import (
    SLOW_RATIO,
    SlowCollective,
    find_slow_collectives,
    slow_collective_finding,
)

MILLISECOND = 1e-3
HONEST = {
    "all_reduce": {1024: [14 * MILLISECOND, 0.3], 65536: [15 * MILLISECOND]},  # the most steps of all
    "all_gather": {1024: [7 * MILLISECOND], 65536: [8 * MILLISECOND]},
    "reduce_scatter": {1024: [7 * MILLISECOND], 65536: [8 * MILLISECOND]},
    "all_to_all": {1024: [1 * MILLISECOND], 65536: [2 * MILLISECOND]},
    "broadcast": {1024: [3 * MILLISECOND], 65536: [4 * MILLISECOND]},
}


def test_collectives_of_good_algorithms_are_not_slow() -> None:
    assert find_slow_collectives(HONEST) == []


def test_one_far_slower_than_the_others_is_named_where_it_is_slowest() -> None:
    times = {**HONEST, "all_gather": {1024: [0.201, 0.2, 0.3], 65536: [0.2]}}
    (found,) = find_slow_collectives(times)
    assert found == SlowCollective("all_gather", 1024, 0.2, 5 * MILLISECOND)
    finding = slow_collective_finding("links", found, 3, is_needed=True)
    assert (finding.verdict, finding.kind, finding.subject) == ("FAIL", "links", "all_gather of 1024 bytes")
    assert finding.measured == found.ratio > SLOW_RATIO


def test_one_repeat_in_time_or_a_busy_host_acquits() -> None:
    passing = {**HONEST, "all_gather": {1024: [0.2, 0.2, 7 * MILLISECOND]}}
    assert find_slow_collectives(passing) == []
    times = {**HONEST, "all_gather": {1024: [0.12]}}
    assert [each.collective for each in find_slow_collectives(times)] == ["all_gather"]
    assert find_slow_collectives(times, host_wait_s=0.05) == []


def test_among_few_nobody_can_say() -> None:
    assert find_slow_collectives({"all_reduce": {1024: [9.0]}, "broadcast": {1024: [0.001]}}) == []


def test_a_kind_that_the_role_does_without_is_a_limit() -> None:
    assert kind_is_needed("serve", "all_reduce", routes_tokens=False)
    assert not kind_is_needed("serve", "all_to_all", routes_tokens=False)
    assert kind_is_needed("serve", "all_to_all", routes_tokens=True)
    assert not kind_is_needed("serve", "reduce_scatter", routes_tokens=True)
    slow = SlowCollective("all_to_all", 1024, 1.0, 0.001)
    finding = slow_collective_finding("links", slow, 3, is_needed=False)
    assert (finding.verdict, finding.critical) == ("PASS WITH LIMITS", False)
