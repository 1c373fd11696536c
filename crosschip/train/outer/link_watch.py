"""Whether the link between groups is what the recipe's `[links]` says, from how long outer steps are on the wire. Pure.

What is sent after the groups have met at an outer step is the link's alone: nobody waits for another's training. It is
compared with what the recipe's link would need for the same bytes; where that is far off, it is told how the groups
would train together over the link as it is.
"""

from __future__ import annotations

import statistics
from collections import deque

from crosschip.recipe import GroupSettings
from crosschip.thin_links import Link, choose
from crosschip.train.outer.groups import GroupEvent

__all__ = ["OuterLinkWatch"]

_TIMES = 3.0  # slower or faster than the recipe says: less than that changes no choice by much
_LEAST_S = 0.5  # off: a busy host delays an exchange by less, and training hardly notices it
_EXCHANGES = 3  # whose median counts
_MOST_TOLD = 5


class OuterLinkWatch:
    """Takes the time of each outer step on the wire; tells when the link is no longer, or never was, as expected.

    `num_elements` are the model's parameters, `num_ranks` those of a group, which share the link.
    """

    def __init__(self, planned: GroupSettings, link: Link, num_elements: int, num_ranks: int) -> None:
        self._planned, self._link = planned, link
        self._num_elements, self._num_ranks = num_elements, num_ranks
        self._ratios: deque[float] = deque(maxlen=_EXCHANGES)
        self._state = "as expected"
        self._num_told = 0

    def observe(self, wire_s: float, num_bytes: int, num_groups: int, step_s: float) -> GroupEvent | None:
        """One outer step: seconds on the wire, bytes that this rank sent, groups that took part, seconds of a step."""
        if num_groups < 2 or num_bytes == 0:
            return None
        # The chunks go to their owners at once, the means go round in a ring.
        expected_s = num_groups * self._link.latency_s + self._num_ranks * num_bytes / self._link.bandwidth_bytes_s
        is_far_off = abs(wire_s - expected_s) > _LEAST_S
        self._ratios.append(wire_s / expected_s if is_far_off else 1.0)
        if len(self._ratios) < _EXCHANGES:
            return None
        ratio = statistics.median(self._ratios)
        state = "slower" if ratio > _TIMES else "faster" if ratio < 1 / _TIMES else "as expected"
        if state == self._state:
            return None
        self._state = state
        if state == "as expected" or self._num_told == _MOST_TOLD:
            return None
        self._num_told += 1
        return self._event(ratio, ratio * expected_s, expected_s, step_s)

    def _event(self, ratio: float, wire_s: float, expected_s: float, step_s: float) -> GroupEvent:
        link = Link(self._link.bandwidth_bytes_s / ratio, self._link.latency_s * ratio)
        choice = choose(self._planned, link, self._num_elements, step_s, self._num_ranks)
        told = f"about {ratio:.1f} times slower" if ratio > 1 else f"about {1 / ratio:.1f} times faster"
        return GroupEvent(
            "slow-link" if ratio > 1 else "fast-link",
            f"an outer step is {wire_s:.2f} s on the wire, where the recipe's [links] makes it {expected_s:.2f} s: the "
            f"link is {told}; over it the choice would be: {choice.reason}",
            f"told, and going on as before; for the other choice set links.bandwidth_mbit_s to "
            f"{link.bandwidth_bytes_s * 8e-6:.3g} and links.latency_ms to {link.latency_s * 1e3:.3g} in all groups and "
            "go on with --resume",
        )
