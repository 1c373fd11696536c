"""The data of a reinforcement-learning stage: batches of rollouts, cut into the batches of its steps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch

from crosschip.data import NOT_TRAINED
from crosschip.data.order import permutation
from crosschip.recipe import RlSettings
from crosschip.train.rl.batch import RlBatch

__all__ = ["RolloutStream"]

_REMEMBERED = 2  # batches of rollouts, for whoever asks for a step's data again


class RolloutStream:
    """Sequences by their place; a new batch of rollouts is `collect`ed where a place is in none that is remembered.

    A batch of rollouts is dealt out to its steps in a seeded order, so that no step gets the answers to a few problems
    alone, and each gets as many of those that train anything. Every rank asks at the same steps, because `collect`
    brings the batch to all of them; rank r for the r-th of equal runs of a step's sequences.
    """

    def __init__(self, settings: RlSettings, seed: int, collect: Callable[[], RlBatch], rank: int = 0) -> None:
        self._settings, self._seed, self._collect, self._rank = settings, seed, collect, rank
        self._batches: OrderedDict[int, RlBatch] = OrderedDict()
        self._rest: RlBatch | None = None

    def batch(self, first_sequence: int, count: int) -> RlBatch:
        """[count, T] the answers at places from `first_sequence` on."""
        begin, batch = self._around(first_sequence, count)
        first = first_sequence - begin
        return batch.rows(torch.arange(first, first + count))

    def rest(self, num_answers: int) -> RlBatch | None:
        """The last `num_answers` answers of the newest batch of rollouts; None for none."""
        if not num_answers:
            return None
        batch = next(reversed(self._batches.values()))
        return batch.rows(torch.arange(len(batch) - num_answers, len(batch)))

    def go_on_with(self, rest: RlBatch) -> None:
        """The next places hold what was left of a batch of rollouts, in the order in which it was dealt out."""
        self._batches.clear()
        self._rest = rest

    def forget(self) -> None:
        """Let go of what is remembered: the next batch is collected anew."""
        self._batches.clear()
        self._rest = None

    def _around(self, place: int, count: int) -> tuple[int, RlBatch]:
        for begin, batch in self._batches.items():
            if begin <= place < begin + len(batch):
                return begin, batch
        # Where the step begins. No multiple of the batch's size: before a resume that may have been another.
        begin = place - self._rank * count
        batch = self._next(begin)
        # What was remembered beyond this place is of a time before the stage was rolled back.
        for other in [other for other in self._batches if other >= begin]:
            del self._batches[other]
        self._batches[begin] = batch
        while len(self._batches) > _REMEMBERED:
            self._batches.popitem(last=False)
        return begin, batch

    def _next(self, begin: int) -> RlBatch:
        rest, self._rest = self._rest, None
        if rest is not None:
            return rest
        batch, num_steps = self._collect(), self._settings.updates_per_batch
        if num_steps == 1:
            return batch
        shuffled_B = torch.from_numpy(permutation(len(batch), "answers", self._seed, begin))
        trains_B = (batch.labels_BT[shuffled_B] != NOT_TRAINED).any(1)
        places_B = trains_B.int().argsort(descending=True, stable=True)
        dealt_B = torch.cat([places_B[step::num_steps].sort().values for step in range(num_steps)])
        return batch.rows(shuffled_B[dealt_B])
