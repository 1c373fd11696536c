"""Where two runs chose other experts, and which positions that excuses. Plain arrays: no torch, no files.

A choice that was closer than rounding may fall either way on honest chips, and everything after it (the layers above,
the later positions of its row) then differs by more than rounding. Such positions are set apart, not counted as errors.
N positions, L layers with a router.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

__all__ = ["NO_FLIP", "Flips", "RouterChoices", "judge_flips", "spread_excuses"]

NO_FLIP = 1 << 30  # a layer beyond every layer


@dataclass(frozen=True)
class RouterChoices:
    """Chosen experts (ascending ids, [N, K]) and margins [N], by the number of the layer."""

    ids: dict[int, NDArray[np.int64]]
    margins: dict[int, NDArray[np.float64]]


@dataclass(frozen=True)
class Flips:
    """Choices that fell otherwise.

    `excused_from` holds the lowest layer from which on each position is excused, `judged` counts choices with a margin
    beyond the tolerance at positions that nothing had excused yet, `unexplained` those of them that flipped, and
    `worst` names the one with the largest margin.
    """

    excused_from: NDArray[np.int64]
    num_flips: int
    judged: int
    unexplained: int
    worst: tuple[int, int, float] | None  # layer, position, margin
    margin_noise: float  # 99.9 % quantile of the change of margins where nothing is excused


def judge_flips(reference: RouterChoices, found: RouterChoices, rows: NDArray[np.int64], tolerance: float) -> Flips:
    """Compare two runs' choices; `rows` is the row of each position, `tolerance` a difference of scores."""
    excused = np.full(len(rows), NO_FLIP, dtype=np.int64)
    num_flips = judged = unexplained = 0
    worst: tuple[int, int, float] | None = None
    changes = []
    for layer in sorted(reference.ids):
        margins = reference.margins[layer]
        flipped = (reference.ids[layer] != found.ids[layer]).any(axis=1)
        num_flips += int(flipped.sum())
        counted = (excused > layer) & (margins > tolerance)
        wrong = counted & flipped
        judged, unexplained = judged + int(counted.sum()), unexplained + int(wrong.sum())
        if wrong.any():
            place = int(np.argmax(np.where(wrong, margins, -math.inf)))
            if worst is None or margins[place] > worst[2]:
                worst = (layer, place, float(margins[place]))
        steady = (excused > layer) & ~flipped & np.isfinite(margins)
        changes.append(np.abs(found.margins[layer] - margins)[steady])
        excused = spread_excuses(np.where(flipped & (margins <= tolerance), np.minimum(excused, layer), excused), rows)
    change = np.concatenate(changes) if changes else np.zeros(0)
    noise = float(np.quantile(change, 0.999)) if len(change) else 0.0
    return Flips(excused, num_flips, judged, unexplained, worst, noise)


def spread_excuses(excused: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each position takes over the lowest layer of the positions before it in its row."""
    spread = excused.copy()
    starts: Sequence[int] = [0, *(np.flatnonzero(np.diff(rows)) + 1).tolist(), len(rows)]
    for first, last in pairwise(starts):
        spread[first:last] = np.minimum.accumulate(excused[first:last])
    return spread
