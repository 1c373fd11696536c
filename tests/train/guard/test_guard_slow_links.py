"""Links between groups: what is told of one that is slow or stood still, and what is not its fault."""

from __future__ import annotations

import random
from collections.abc import Callable

from crosschip.train.guard.observed import Event
from crosschip.train.guard.slow_links import STALL_S, LinkWatch

OWN, OTHER = "group 0", "group 1"
Link = Callable[[int], float]


def never_late(step: int) -> tuple[float, float]:
    return 0.2, 0.2


def watched(link: Link, num_steps: int, busy: Callable[[int], tuple[float, float]] = never_late) -> list[Event]:
    """What group 0 tells of exchanges that begin when both groups are ready and take as long as `link` says."""
    watch, found = LinkWatch(), []
    for step in range(num_steps):
        own, other = busy(step)
        took = max(0.0, other - own) + link(step)
        found.append(watch.observe(step, took, {OWN: own, OTHER: other}, OWN))
    return [event for event in found if event is not None]


def test_a_link_that_becomes_slow_is_told_once() -> None:
    events = watched(lambda step: 0.02 if step < 60 else 0.2, 120)
    assert [event.event for event in events] == ["slow-link"]
    assert 60 < events[0].step <= 60 + 15
    assert "0.20 s instead of 0.02 s" in events[0].detail


def test_after_it_was_as_usual_it_is_told_again() -> None:
    events = watched(lambda step: 0.2 if 60 <= step < 80 or step >= 100 else 0.02, 140)
    assert [event.event for event in events] == ["slow-link", "slow-link"]


def test_one_that_loses_packets_is_slow_on_average() -> None:
    chance = random.Random(1)
    events = watched(lambda step: 0.02 if step < 60 or chance.random() < 0.5 else 0.32, 120)
    assert "slow-link" in [event.event for event in events]


def test_one_long_exchange_is_a_stall_and_does_not_count_as_usual() -> None:
    events = watched(lambda step: 2.5 if step == 60 else 0.02, 120)
    assert [(event.event, event.step) for event in events] == [("link-stall", 60)]


def test_a_group_that_comes_late_is_not_the_links_fault() -> None:
    late = watched(lambda step: 0.02, 120, lambda step: (0.2, 0.2 if step < 60 else 3.0))
    assert late == []
    # The negative control: the same seconds in the exchange, and nobody was late.
    assert watched(lambda step: 0.02 if step < 60 else 2.82, 120) != []


def test_noise_is_not_told() -> None:
    chance = random.Random(2)
    for _ in range(20):
        assert watched(lambda step: 0.01 + chance.expovariate(1 / 0.01), 400) == []


def test_whoever_joins_begins_anew() -> None:
    watch = LinkWatch()
    for step in range(60):
        assert watch.observe(step, 0.02, {OWN: 0.2, OTHER: 0.2}, OWN) is None
    assert watch.observe(60, 20.0, {OWN: 0.2}, OWN) is None, "the other was lost"
    assert watch.observe(61, 20.0, {OWN: 0.2, OTHER: 0.2}, OWN) is None, "it comes back"
    assert watch.observe(62, STALL_S + 1, {OWN: 0.2, OTHER: 0.2}, OWN) is None, "nothing is usual yet"
