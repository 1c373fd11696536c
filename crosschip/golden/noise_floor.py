"""The recording chip's own noise: what other batch sizes and other orders of every sum change there. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crosschip.golden.comparison import CurveDistance, View
from crosschip.golden.limits import Limit
from crosschip.golden.views import log_probs_of, near_ties, view_of, view_of_log_probs

__all__ = ["OtherRun", "noise_floor"]

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class OtherRun:
    """Another honest run of the same rows on the recording chip.

    `apart` is by how much further, in RMS, two chips that round independently are from each other than this run is from
    the reference: sqrt(2) where this run does not round, 1 where it rounds as well. A KL goes with its square.
    """

    name: str
    arrays: Arrays
    curve: CurveDistance | None = None  # of its training, against the reference's
    apart: float = 1.0


def noise_floor(
    reference: Arrays,
    runs: Sequence[OtherRun],
    rows: NDArray[np.int64],
    dtype: str,
) -> dict[str, Any]:
    """The largest of each distance between the reference and the chip's other honest runs of the same rows.

    Args:
        reference: the arrays that the bundle keeps.
        runs: the others.
        rows: the row of each position, [N].
        dtype: of the arithmetic.

    `without_choices` is the noise as it looks through an engine that does not show its router's choices.
    """
    # Nothing is judged here, so every flip counts as a near-tie: the floor is of what lies before flips.
    open_limit = Limit("fp32 to fp32", dtype, 0.0, "none")
    everything = {"router_margin": math.inf}
    views = [view_of(run.name, reference, run.arrays, rows, open_limit, everything) for run in runs]
    margin = max(run.apart * view.margin_noise for run, view in zip(runs, views, strict=True))
    kept = ~near_ties(reference, open_limit.router_score(margin))
    blind = [view_of_log_probs(run.name, log_probs_of(reference, run.arrays), rows, kept) for run in runs]
    points: dict[str, dict[str, float]] = {}
    for run, view in zip(runs, views, strict=True):
        for point in view.points:
            own = points.setdefault(point.point, {"error": 0.0, "gain": 0.0})
            own["error"] = max(own["error"], run.apart * point.error)
            own["gain"] = max(own["gain"], abs(point.gain))
    return {
        **_answers(runs, views),
        "router_margin": margin,
        "loss": max((run.apart * run.curve.loss for run in runs if run.curve), default=0.0),
        "gradient_norm": max((run.apart * run.curve.gradient_norm for run in runs if run.curve), default=0.0),
        "points": points,
        "without_choices": _answers(runs, blind),
        "measured_by": [
            {
                "run": view.name,
                "mean_kl": view.kl.mean,
                "mean_kl_everywhere": view.kl_everywhere.mean,
                "flips": view.num_flips,
            }
            for view in views
        ],
    }


def _answers(runs: Sequence[OtherRun], views: Sequence[View]) -> dict[str, float]:
    pairs = list(zip(runs, views, strict=True))
    return {
        "mean_kl": max(run.apart**2 * view.kl.mean for run, view in pairs),
        "logprob": max(run.apart * view.largest_logprob_difference for run, view in pairs),
    }
