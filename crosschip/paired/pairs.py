"""What is tested: the same problem and seed answered by A and by B, right or not. No torch, no I/O.

Several answers to one problem hang together, so a problem is the unit: tests flip the sign of a whole problem, and
intervals are as wide as the problems, not as the answers, make them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

__all__ = ["PairTable", "SignTest", "sign_test", "table_of"]

# With fewer problems on which A and B differ the data cannot tell how much the answers of one problem hang together.
_LEAST_FOR_DESIGN_EFFECT = 10


@dataclass(frozen=True)
class PairTable:
    """Counts over pairs; `only_a` is what A had right and B wrong. `differences` are B minus A, summed by problem."""

    both: int
    only_a: int
    only_b: int
    neither: int
    differences: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def num_pairs(self) -> int:
        """All pairs."""
        return self.both + self.only_a + self.only_b + self.neither

    @property
    def difference(self) -> float:
        """The share of B minus that of A; below zero is a drop."""
        return (self.only_b - self.only_a) / self.num_pairs if self.num_pairs else 0.0

    @property
    def discordance(self) -> float:
        """The share of pairs of which one is right and the other wrong."""
        return (self.only_a + self.only_b) / self.num_pairs if self.num_pairs else 0.0

    @property
    def share_a(self) -> float:
        """What A had right."""
        return (self.both + self.only_a) / self.num_pairs if self.num_pairs else 0.0

    @property
    def share_b(self) -> float:
        """What B had right."""
        return (self.both + self.only_b) / self.num_pairs if self.num_pairs else 0.0

    @property
    def design_effect(self) -> float:
        """How many pairs count as one, because pairs of a problem hang together: 1 if they do not (Rao & Scott 1992).

        With hardly a problem on which the sides differ it cannot be told, and then a problem counts once.
        """
        largest = max(self.sizes, default=1)
        num = len(self.sizes)
        if largest == 1 or num < 2:
            return 1.0
        mean = self.difference
        single = (self.discordance - mean**2) / self.num_pairs
        if sum(each != 0 for each in self.differences) < _LEAST_FOR_DESIGN_EFFECT or single <= 0:
            return float(largest)
        residuals = np.array(self.differences) - mean * np.array(self.sizes)
        clustered = float(np.square(residuals).sum()) / self.num_pairs**2 * num / (num - 1)
        return max(1.0, clustered / single)

    @property
    def num_effective(self) -> float:
        """As many independent pairs would tell as much."""
        return self.num_pairs / self.design_effect


def table_of(pairs: Iterable[tuple[str, bool, bool]]) -> PairTable:
    """Count (problem, right in A, right in B)."""
    counts: Counter[tuple[bool, bool]] = Counter()
    by_problem: defaultdict[str, list[int]] = defaultdict(list)
    for problem, a, b in pairs:
        counts[bool(a), bool(b)] += 1
        by_problem[problem].append(int(b) - int(a))
    return PairTable(
        counts[True, True],
        counts[True, False],
        counts[False, True],
        counts[False, False],
        tuple(sum(each) for each in by_problem.values()),
        tuple(len(each) for each in by_problem.values()),
    )


@dataclass(frozen=True)
class SignTest:
    """Two-sided p-values of "A and B are right equally often on each problem"."""

    exact: float
    mid_p: float


def sign_test(differences: Sequence[int]) -> SignTest:
    """The exact test that flips the sign of each problem's difference; with one pair a problem it is McNemar's test.

    The mid-p value counts half of the outcomes that are as extreme as the one seen (Fagerland et al. 2013): it is less
    timid and, on rare occasions, above its level; verdicts use the exact one.
    """
    sizes = Counter(abs(each) for each in differences if each != 0)
    if not sizes:
        return SignTest(1.0, 1.0)
    chances = np.ones(1)  # of the sum, in steps of 1 from minus the largest to the largest
    for size, count in sizes.items():
        spread = np.zeros(2 * size * count + 1)
        spread[:: 2 * size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.convolve(chances, spread)
    sums = np.abs(np.arange(len(chances)) - len(chances) // 2)
    seen = abs(sum(differences))
    beyond, same = float(chances[sums > seen].sum()), float(chances[sums == seen].sum())
    return SignTest(min(1.0, beyond + same), min(1.0, beyond + same / 2))
