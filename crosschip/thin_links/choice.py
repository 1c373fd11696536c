"""Every step, or every H steps and how: chosen from the link, the size of the model and the time of a step. Pure.

What each choice would give is predicted from latency and bandwidth; the first in the order of what is known to cost
least in the loss is taken whose predicted utilisation reaches the target with a margin.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from crosschip.recipe import GroupSettings

__all__ = ["BYTES_PER_ELEMENT", "COMPUTING_S_PER_ELEMENT", "TARGET_UTILISATION", "Choice", "Link", "choose", "exchange"]

TARGET_UTILISATION = 0.94
"""Share of the time in which chips compute that is to be reached."""

_MARGIN = 0.01
"""How much more a prediction has to promise where some way does: over a link of 100 Mbit/s exchanges took up to two
fifths longer than predicted."""

Compression = Literal["none", "int8", "int4"]

BYTES_PER_ELEMENT: dict[Compression, float] = {"none": 4.0, "int8": 1.0 + 4 / 128, "int4": 0.5 + 4 / 128}
"""On the wire: codes, and one fp32 scale for a block of 128."""

COMPUTING_S_PER_ELEMENT = 4e-8
"""What a sidecar computes for an outer step beside sending (differences, encoding, decoding, the outer optimizer): 0.16
s for 4.2 million parameters, on one core of an AMD EPYC without AVX-512."""

# The scaling laws of DiLoCo were measured with H = 30 (Charles et al. 2025, arXiv 2503.09799); longer costs more.
_INTERVALS = (30, 100, 300)
# With error feedback int8 costs nothing in the loss that was measured (docs/groups.md): fp32 is sent on request alone.
_COMPRESSIONS: tuple[Compression, ...] = ("int8", "int4")
_MOST_OVERLAP = 5  # Streaming DiLoCo (Douillard et al. 2025, arXiv 2501.18512) loses nothing up to there


@dataclass(frozen=True)
class Link:
    """The slowest link between two groups: bytes a second, and seconds one way."""

    bandwidth_bytes_s: float
    latency_s: float


@dataclass(frozen=True)
class Choice:
    """How the groups will train together, what that is predicted to give, and the reason as one sentence.

    `bytes_per_step` is what a group sends, averaged over its steps; `utilisation` the share of time spent computing.
    Both are None where nothing is known of the link.
    """

    mode: Literal["every-step", "diloco"]
    compression: Compression
    reason: str
    sync_every: int = 1
    fragments: int = 1
    overlap_steps: int = 0
    bytes_per_step: float | None = None
    utilisation: float | None = None


def exchange(link: Link, num_groups: int, num_elements: float, bytes_per_element: float) -> tuple[float, float]:
    """Bytes that a group sends when `num_elements` are averaged over the groups, and the seconds that takes."""
    others = num_groups - 1
    num_bytes = 2 * others / num_groups * num_elements * bytes_per_element
    # The quorum's question and answer, headers and numbers in rings, the chunks at once, the mean in a ring.
    num_latencies = 2 + 2 * others + 1 + others
    return num_bytes, num_latencies * link.latency_s + num_bytes / link.bandwidth_bytes_s


@dataclass(frozen=True)
class _Job:
    link: Link
    num_elements: int
    step_s: float
    num_groups: int
    num_ranks: int  # of a group, each of which exchanges its part of the model

    def exchange(self, num_elements: float, compression: Compression) -> tuple[float, float]:
        """Bytes that a group sends in one exchange, and its seconds."""
        return exchange(self.link, self.num_groups, num_elements, BYTES_PER_ELEMENT[compression])

    def every_step(self, compression: Compression) -> Choice:
        num_bytes, seconds = self.exchange(self.num_elements, compression)
        utilisation = self.step_s / (self.step_s + seconds)
        return Choice("every-step", compression, "", bytes_per_step=num_bytes, utilisation=utilisation)

    def diloco(self, sync_every: int, fragments: int, overlap_steps: int | None, compression: Compression) -> Choice:
        """With `overlap_steps` None, as many as the sending takes, and at most what is known to do no harm."""
        interval = sync_every // fragments
        num_bytes, wire_s = self.exchange(self.num_elements / fragments, compression)
        seconds = wire_s + self.num_elements / fragments / self.num_ranks * COMPUTING_S_PER_ELEMENT
        if overlap_steps is None:
            overlap_steps = min(math.ceil(seconds / self.step_s), interval - 1, _MOST_OVERLAP)
        stall_s = max(0.0, seconds - overlap_steps * self.step_s)
        computing_s = interval * self.step_s
        return Choice(
            "diloco",
            compression,
            "",
            sync_every,
            fragments,
            overlap_steps,
            bytes_per_step=num_bytes / interval,
            utilisation=computing_s / (computing_s + stall_s),
        )


def choose(wanted: GroupSettings, link: Link | None, num_elements: int, step_s: float, num_ranks: int = 1) -> Choice:
    """What `wanted` leaves open, chosen; `num_elements` are a group's parameters, `num_ranks` the processes that share
    them, `step_s` its seconds for a step.

    Without a link each step is averaged unless the recipe says otherwise, and the reason says that nothing was known.
    """
    if link is None or wanted.num_groups < 2:
        return _without_link(wanted)
    job = _Job(link, num_elements, step_s, wanted.num_groups, num_ranks)
    options = list(_options(wanted, job))
    good = [option for option in options if (option.utilisation or 0.0) >= TARGET_UTILISATION + _MARGIN]
    best = good[0] if good else max(options, key=lambda option: option.utilisation or 0.0)
    return _explained(best, wanted, job)


def _without_link(wanted: GroupSettings) -> Choice:
    compression: Compression = "none" if wanted.compression == "auto" else wanted.compression
    if wanted.num_groups < 2:
        return Choice("every-step", compression, "one group trains alone: there is nothing to average")
    if wanted.mode == "diloco":
        fragments = wanted.fragments or 1
        sync_every = wanted.sync_every or -(-_INTERVALS[0] // fragments) * fragments
        reason = f"DiLoCo with an outer step every {sync_every} steps, as the recipe says; nothing is known of the link"
        return Choice("diloco", compression, reason, sync_every, fragments, wanted.overlap_steps or 0)
    why = "as the recipe says" if wanted.mode == "every-step" else "since nothing is known of the link ([links])"
    return Choice("every-step", compression, f"the gradients are averaged each step, {why}")


def _options(wanted: GroupSettings, job: _Job) -> Iterator[Choice]:
    """What the recipe allows, in the order of what costs least in the loss."""
    compressions = _COMPRESSIONS if wanted.compression == "auto" else (wanted.compression,)
    if wanted.mode != "diloco":
        # A compressed gradient enters the optimizer's second moments each step: only when the recipe asks for it.
        yield job.every_step("none" if wanted.compression == "auto" else wanted.compression)
    if wanted.mode == "every-step":
        return
    fragments = wanted.fragments or 1
    intervals = tuple(-(-steps // fragments) * fragments for steps in _INTERVALS)
    for sync_every in intervals if wanted.sync_every is None else (wanted.sync_every,):
        for overlap_steps in (0, None) if wanted.overlap_steps is None else (wanted.overlap_steps,):
            for compression in compressions:
                yield job.diloco(sync_every, fragments, overlap_steps, compression)


def _explained(choice: Choice, wanted: GroupSettings, job: _Job) -> Choice:
    assert choice.utilisation is not None
    assert choice.bytes_per_step is not None
    each_step = job.every_step("none")
    assert each_step.utilisation is not None
    assert each_step.bytes_per_step is not None
    mbit, ms = job.link.bandwidth_bytes_s * 8e-6, job.link.latency_s * 1e3
    link = f"the link ({mbit:,.0f} Mbit/s, {ms:.3g} ms)" if mbit >= 10 else f"the link ({mbit:.3g} Mbit/s, {ms:.3g} ms)"
    reached = "" if choice.utilisation >= TARGET_UTILISATION else f", which misses the goal of {TARGET_UTILISATION:.0%}"
    result = f"predicted utilisation {choice.utilisation:.1%}{reached}, {_size(choice.bytes_per_step)} sent a step"
    if choice.mode == "every-step":
        why = "as the recipe says" if wanted.mode == "every-step" else f"as {link} carries it"
        how = "" if choice.compression == "none" else f" in {choice.compression}"
        reason = f"the gradients are averaged each step{how}, {why}: {result}"
    else:
        fewer = each_step.bytes_per_step / choice.bytes_per_step
        pieces = "" if choice.fragments == 1 else f" in {choice.fragments} fragments"
        hidden = f", sent during {choice.overlap_steps} steps" if choice.overlap_steps else ""
        how = "uncompressed" if choice.compression == "none" else f"in {choice.compression}"
        reason = (
            f"DiLoCo with an outer step every {choice.sync_every} steps{pieces}, {how}{hidden}: {result}, {fewer:.0f} "
            f"times fewer than averaging each step, which {link} would leave at {each_step.utilisation:.1%}"
        )
    return Choice(**{**choice.__dict__, "reason": reason})


def _size(num_bytes: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes:.0f} bytes"
