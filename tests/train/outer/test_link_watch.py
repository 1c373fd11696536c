"""A link that is not what the recipe says: what is told, how often, and what is left alone."""

from __future__ import annotations

from crosschip.recipe import GroupSettings
from crosschip.thin_links import Link
from crosschip.train.outer.groups import GroupEvent
from crosschip.train.outer.link_watch import OuterLinkWatch

LINK = Link(bandwidth_bytes_s=100e6 / 8, latency_s=0.025)
NUM_ELEMENTS = 35_000_000
NUM_BYTES = 35_000_000  # int8 between two groups: expected 2.85 s on the wire
EXPECTED_S = 2 * 0.025 + NUM_BYTES / LINK.bandwidth_bytes_s


def told(*wire_s: float, num_groups: int = 2, num_ranks: int = 1, mode: str = "auto") -> list[GroupEvent]:
    planned = GroupSettings(num_groups=2, mode=mode)  # type: ignore[arg-type]
    watch = OuterLinkWatch(planned, LINK, NUM_ELEMENTS, num_ranks)
    found = [watch.observe(seconds, NUM_BYTES, num_groups, 1.0) for seconds in wire_s]
    return [event for event in found if event is not None]


def test_a_link_as_expected_is_not_told_of() -> None:
    assert not told(*[EXPECTED_S, 0.5 * EXPECTED_S, 2.5 * EXPECTED_S] * 10)


def test_a_slower_link_is_told_once_with_the_choice_that_it_asks_for() -> None:
    (event,) = told(*[EXPECTED_S] * 5, *[10 * EXPECTED_S] * 20)
    assert event.event == "slow-link"
    assert "about 10.0 times slower" in event.detail
    assert "DiLoCo with an outer step every 300 steps" in event.detail
    assert "links.bandwidth_mbit_s to 10 and links.latency_ms to 250" in event.action


def test_a_faster_link_is_told_with_the_choice_that_it_allows() -> None:
    (event,) = told(*[EXPECTED_S / 20] * 20)
    assert event.event == "fast-link"
    assert "about 20.0 times faster" in event.detail
    assert "DiLoCo with an outer step every 30 steps, in int8" in event.detail


def test_one_late_exchange_is_not_the_link() -> None:
    assert not told(*[EXPECTED_S, EXPECTED_S, 50 * EXPECTED_S] * 10)


def test_a_link_that_comes_and_goes_is_told_five_times_at_most() -> None:
    assert len(told(*([EXPECTED_S] * 3 + [10 * EXPECTED_S] * 3) * 20)) == 5


def test_ranks_of_a_group_share_the_link() -> None:
    assert not told(*[4 * EXPECTED_S] * 10, num_ranks=4)
    assert told(*[4 * EXPECTED_S] * 10, num_ranks=1)


def test_a_group_that_is_alone_has_no_link() -> None:
    assert not told(*[99.0] * 10, num_groups=1)
