"""Which problem is asked next, which answers are too old, and what makes a batch. Plain bookkeeping, no I/O.

A batch is taken once for each version of the weights, `due` is the version of the next one. A group that begins now
stands behind all those that are under way or finished, so it will be used `position // prompts` batches later; it may
begin only if the weights that answer now are then at most `max_staleness` versions old. That bounds what is under way,
or finished and of use, by `(max_staleness + 1) * prompts`, and with `max_staleness = 0` nothing begins before the
weights of its own batch are there.

With one engine and `max_staleness = 0` the groups of a batch do not depend on the order in which answers come: problems
are asked in order until exactly `prompts` of them gave a signal, and those are taken.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Literal

from crosschip.train.rl.sample import Group

__all__ = ["Fate", "Ledger"]

Fate = Literal["kept", "stale", "without signal"]


class Ledger:
    """The groups of a run of rollouts, from the first question to the batch.

    Args:
        prompts: groups in a batch.
        max_staleness: how many versions behind the batch's a group's oldest token may be.
        max_groups_tried: times `prompts`; after so many groups a batch is what there is.
        drop_without_signal: do not use groups that teach nothing, as long as there are others.
        has_signal: whether a group teaches anything.
    """

    def __init__(
        self,
        prompts: int,
        max_staleness: int,
        max_groups_tried: int,
        drop_without_signal: bool,
        has_signal: Callable[[Group], bool],
    ) -> None:
        self._prompts, self._max_staleness, self._has_signal = prompts, max_staleness, has_signal
        self._most_tried = max_groups_tried * prompts
        self._drops_without_signal = drop_without_signal
        self.due: int | None = None
        self._least_due = 0
        self.next_number = 0
        self._to_ask_again: list[int] = []
        self._under_way: dict[int, int] = {}  # number to the version that it was begun with
        self._finished: dict[int, Group] = {}
        self._reserve: dict[int, Group] = {}  # without signal: the first ones, in case the batch cannot be filled
        self._num_without_signal = 0  # since the last batch
        self._taken: list[int] = []  # the last batch

    @property
    def under_way(self) -> list[int]:
        """The numbers of the problems that are being answered."""
        return sorted(self._under_way)

    @property
    def to_ask_again(self) -> list[int]:
        """The numbers of problems that were begun and not answered."""
        return list(self._to_ask_again)

    @property
    def taken(self) -> list[int]:
        """The numbers of the problems of the last batch."""
        return list(self._taken)

    @property
    def finished(self) -> list[Group]:
        """Finished groups of use that were not taken, by number."""
        return [self._finished[number] for number in sorted(self._finished)]

    def set_due(self, version: int) -> int:
        """Weights of this version are published, so it is their batch that comes next. Returns how many groups are too
        old for it."""
        self.due = max(version, self._least_due, self.due or 0)
        return self._drop_stale()

    def may_begin(self, version: int) -> bool:
        """Whether a group may begin that weights of `version` would answer."""
        if self.due is None:
            return False
        of_use = len(self._under_way) + len(self._finished)
        tried = of_use + self._num_without_signal
        most_tried = self._most_tried + self._max_staleness * self._prompts
        return of_use < (version + self._max_staleness + 1 - self.due) * self._prompts and tried < most_tried

    def begin(self, version: int) -> int:
        """The number of the next problem, which is under way from now on."""
        if self._to_ask_again:
            number = self._to_ask_again.pop(0)
        else:
            number = self.next_number
            self.next_number += 1
        self._under_way[number] = version
        return number

    def begin_again(self, number: int, version: int) -> None:
        """The problem is asked once more, of weights of this version."""
        assert number in self._under_way
        self._under_way[number] = version

    def finish(self, group: Group) -> Fate:
        """All answers to a problem are there and judged."""
        number = group.problem.number
        del self._under_way[number]
        if self._is_stale(group):
            self._ask_again(number)
            return "stale"
        if self._drops_without_signal and not self._has_signal(group):
            self._num_without_signal += 1
            self._reserve[number] = group
            if len(self._reserve) > self._prompts:
                del self._reserve[max(self._reserve)]
            return "without signal"
        self._finished[number] = group
        return "kept"

    def is_fresh(self, version: int) -> bool:
        """Whether tokens of weights of this version may be in the batch that is due."""
        return self.due is not None and version >= self.due - self._max_staleness

    def drop_hopeless(self) -> list[int]:
        """Wait no longer for answers that will be too old when they come; returns the numbers of their problems, which
        are asked again."""
        hopeless = sorted(number for number, version in self._under_way.items() if not self.is_fresh(version))
        for number in hopeless:
            del self._under_way[number]
            self._ask_again(number)
        return hopeless

    def ask_again_of(self, engine: str) -> None:
        """Use no finished group with answers of this engine; the problems are asked again."""
        for groups in (self._finished, self._reserve):
            for number in [n for n, group in groups.items() if any(s.engine == engine for s in group.samples)]:
                del groups[number]
                self._ask_again(number)
        self._num_without_signal = min(self._num_without_signal, len(self._reserve))

    def is_ready(self) -> bool:
        """Whether there is a batch: full, or as full as it gets."""
        tried = len(self._finished) + self._num_without_signal
        return len(self._finished) >= self._prompts or tried >= self._most_tried

    def take(self) -> list[Group]:
        """The batch that is due, by problem number; not full only if too many groups were without signal, and then
        filled up with those."""
        assert self.due is not None
        assert self.is_ready()
        numbers = sorted(self._finished)[: self._prompts]
        groups = [self._finished.pop(number) for number in numbers]
        missing = self._prompts - len(groups)
        groups += [self._reserve[number] for number in sorted(self._reserve)[:missing]]
        self._reserve.clear()
        self._num_without_signal = 0
        self.due += 1
        self._taken = sorted(group.problem.number for group in groups)
        return sorted(groups, key=lambda group: group.problem.number)

    def give_back(self) -> list[int]:
        """The batch taken last is not trained after all: its problems are asked again. Returns their numbers."""
        numbers, self._taken = self._taken, []
        for number in numbers:
            self._ask_again(number)
        return numbers

    def restore(
        self,
        next_number: int,
        to_ask_again: list[int],
        finished: list[Group],
        least_due: int | None = None,
        taken: Sequence[int] = (),
    ) -> None:
        """Go on where another ledger was: `to_ask_again` holds what was under way there, batches before that of
        version `least_due` were taken, and `taken` was the last of them."""
        self._least_due = least_due or 0
        assert not self._under_way
        assert not self._finished
        self.next_number = next_number
        self._to_ask_again = sorted(to_ask_again)
        self._taken = list(taken)
        self._finished = {group.problem.number: group for group in finished}

    def _drop_stale(self) -> int:
        stale = [number for number, group in self._finished.items() if self._is_stale(group)]
        for number in stale:
            del self._finished[number]
            self._ask_again(number)
        old = [number for number, group in self._reserve.items() if self._is_stale(group)]
        for number in old:
            del self._reserve[number]
        if old:  # others are tried in their place, so that a batch can be filled with what is kept
            self._num_without_signal = len(self._reserve)
        return len(stale) + len(old)

    def _ask_again(self, number: int) -> None:
        bisect.insort(self._to_ask_again, number)

    def _is_stale(self, group: Group) -> bool:
        return not self.is_fresh(group.oldest_version)
