"""The judge of the serving exam: compares scores, greedy tokens and texts with stated limits. Pure: no HTTP, no torch.

The unit is the nat: a difference of log-probs. Two honest runs of one engine differ by rounding, because another length
or batch sums in another order; how much is measured on the engine itself, at short prompts, and the limits follow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from crosschip.qualify.finding import Verdict
from crosschip.qualify.serving.answers import Token

__all__ = [
    "Limits",
    "Noise",
    "Parting",
    "ScoreComparison",
    "compare_scores",
    "find_loop",
    "limits_from",
    "measure_noise",
    "parting",
]

# Below this nobody can tell: it changes a probability by a thousandth.
LEAST_MEAN = 1e-3
# Above this it is no rounding: a wrongly restacked conversion was 0.075 to 0.178 off (vime#274); this lies under it.
MOST_MEAN = 0.05
# Rounding over many positions has outliers, at tokens that are very unlikely; the means are far steadier.
MEAN_FACTOR, POINT_FACTOR = 6.0, 8.0
LEAST_POINT, MOST_POINT = 0.05, 1.0


@dataclass(frozen=True)
class Noise:
    """How far an engine's scores of the same tokens differ between honest requests: mean and largest, in nats."""

    mean: float
    largest: float
    num: int


@dataclass(frozen=True)
class Limits:
    """The most that two scores of the same tokens may differ: on the average, and at one position."""

    mean: float
    point: float
    source: str

    @property
    def near_tie(self) -> float:
        """The margin below which either of two tokens may be the greedy one: both scores may move by `point`."""
        return 2 * self.point


@dataclass(frozen=True)
class ScoreComparison:
    """Two score lists of the same tokens: how many, how far apart, and the first position that is over the limit."""

    num: int
    mean: float
    largest: float
    first: int | None
    verdict: Verdict


@dataclass(frozen=True)
class Parting:
    """Where two greedy answers part: the position, and how far apart in nats the two tokens are."""

    position: int
    margin: float
    is_near_tie: bool


def measure_noise(pairs: Sequence[tuple[Sequence[float | None], Sequence[float | None]]]) -> Noise:
    """The noise over pairs of score lists of the same tokens."""
    gaps = [gap for one, other in pairs for _, gap in _gaps(one, other)]
    return Noise(sum(gaps) / len(gaps), max(gaps), len(gaps)) if gaps else Noise(0.0, 0.0, 0)


def limits_from(noise: Noise) -> Limits:
    """The limits that an engine's noise gives, between a floor nobody notices and a ceiling no rounding reaches."""
    mean = min(MOST_MEAN, max(LEAST_MEAN, MEAN_FACTOR * noise.mean))
    point = min(MOST_POINT, max(LEAST_POINT, POINT_FACTOR * noise.largest))
    source = (
        f"{MEAN_FACTOR:.0f} times the engine's own noise at short prompts (mean {noise.mean:.2g}, largest "
        f"{noise.largest:.2g} nats), at least {LEAST_MEAN} and at most {MOST_MEAN}"
    )
    return Limits(mean, point, source)


def compare_scores(
    one: Sequence[float | None], other: Sequence[float | None], limits: Limits, start: int = 0
) -> ScoreComparison:
    """Compare the scores of the positions that both have, from `start` on.

    FAIL: the mean is over its limit, or one position is over the largest possible for rounding, or several over theirs.
    """
    gaps = [(place, gap) for place, gap in _gaps(one, other) if place >= start]
    if not gaps:
        return ScoreComparison(0, 0.0, 0.0, None, "PASS")
    mean, largest = sum(gap for _, gap in gaps) / len(gaps), max(gap for _, gap in gaps)
    over = [place for place, gap in gaps if gap > limits.point]
    many = len(over) > max(1, len(gaps) // 100)
    wrong = not mean <= limits.mean or largest > MOST_POINT or many
    first = over[0] if over else _first_rise(gaps, limits.mean) if wrong else None
    verdict: Verdict = "FAIL" if wrong else "PASS WITH LIMITS" if over else "PASS"
    return ScoreComparison(len(gaps), mean, largest, first, verdict)


def _gaps(one: Sequence[float | None], other: Sequence[float | None]) -> list[tuple[int, float]]:
    """Positions and absolute differences; NaN and one-sided infinities count as infinitely far apart."""
    gaps = []
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left is None or right is None or left == right:
            if left is not None and right is not None:
                gaps.append((place, 0.0))
            continue
        gap = abs(left - right)
        gaps.append((place, math.inf if math.isnan(gap) else gap))
    return gaps


def _first_rise(gaps: list[tuple[int, float]], limit: float) -> int:
    return next((place for place, gap in gaps if gap > limit), gaps[0][0])


def parting(one: Sequence[Token], other: Sequence[Token], limits: Limits) -> Parting | None:
    """Where two greedy answers part; None when one is the other, or the other's beginning is all there is."""
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left.name != right.name:
            margin = _margin(left, right)
            return Parting(place, margin, margin <= limits.near_tie)
    return None


def _margin(token: Token, rival: Token) -> float:
    """How far apart the two choices are. Both were made after the same tokens, so that their scores may be compared."""
    if token.logprob is None or rival.logprob is None:
        return math.inf
    return abs(token.logprob - token.top.get(rival.name, rival.logprob))


def find_loop(text: str, least_repeats: int = 6, least_characters: int = 60) -> str | None:
    """The piece that the end of a text repeats over and over, or None. `1, 2, 3` does not repeat; `no, no, no` does."""
    for period in range(1, len(text) // least_repeats + 1):
        repeats = max(least_repeats, -(-least_characters // period))
        if period * repeats > len(text):
            continue
        piece = text[-period:]
        if text.endswith(piece * repeats):
            return piece
    return None
