"""Who takes which sequences, what gives when a group drops, and which parameters form a fragment. Pure: no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Fragment", "OnDrop", "Place", "Slice", "learning_rate_factor", "split_into_fragments"]

OnDrop = Literal["smaller-batch", "lower-learning-rate"]


@dataclass(frozen=True)
class Slice:
    """The sequences of one step: this group takes `count` from `start`; all groups together take `taken_by_all`."""

    start: int
    count: int
    taken_by_all: int


@dataclass(frozen=True)
class Place:
    """This group's place among those that take part now: `rank` of `num_participants`; `num_groups` are planned."""

    rank: int
    num_participants: int
    num_groups: int

    def slice(self, sequences: int, batch_size: int) -> Slice:
        """This group's part of a step that begins at sequence number `sequences` of the stream.

        A group's share is always `batch_size / num_groups`. When one drops, the others move together: nothing is left
        out and nothing is taken twice, the batch is smaller.
        """
        share = batch_size // self.num_groups
        return Slice(sequences + self.rank * share, share, self.num_participants * share)


def learning_rate_factor(on_drop: OnDrop, num_participants: int, num_groups: int) -> float:
    """What the learning rate is multiplied by while groups are missing.

    `smaller-batch` leaves it: the batch gives. `lower-learning-rate` multiplies by the square root of the share of the
    batch that is left, the rule for adaptive optimizers (Malladi et al. 2022, arXiv 2205.10287).
    """
    if on_drop == "smaller-batch":
        return 1.0
    return math.sqrt(min(1.0, num_participants / num_groups))


@dataclass(frozen=True)
class Fragment:
    """Parameters `first` to `last` (without `last`), which lie at `start` to `stop` of the flat vector of all."""

    first: int
    last: int
    start: int
    stop: int


def split_into_fragments(sizes: Sequence[int], num_fragments: int) -> list[Fragment]:
    """Cut the parameters, in their order, into fragments of nearly equal numbers of elements, each of whole parameters.

    Raises:
        ValueError: there are fewer parameters than fragments.
    """
    if num_fragments > len(sizes):
        raise ValueError(f"fragments={num_fragments} is more than the model's {len(sizes)} parameters; lower it")
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + size)
    fragments, first = [], 0
    for number in range(num_fragments):
        wanted = ends[-1] * (number + 1) / num_fragments
        latest = len(sizes) - (num_fragments - number - 1)  # one parameter must be left for each fragment to come
        last = first + 1
        while last < latest and abs(ends[last + 1] - wanted) <= abs(ends[last] - wanted):
            last += 1
        last = len(sizes) if number == num_fragments - 1 else last
        fragments.append(Fragment(first, last, ends[first], ends[last]))
        first = last
    return fragments
