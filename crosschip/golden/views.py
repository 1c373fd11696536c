"""How two runs' arrays are compared: log-probs, activations, router choices, training curves. No torch, no files.

N positions of all rows one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crosschip.golden.comparison import CurveDistance, PointDistance, RowDistance, View
from crosschip.golden.distance import bucketed_kl, mean_with_bound, signed_probability_shift, top1_agreement
from crosschip.golden.flips import NO_FLIP, Flips, RouterChoices, judge_flips, spread_excuses
from crosschip.golden.limits import Limit

__all__ = [
    "LEAST_JUDGED",
    "LogProbs",
    "curve_distance",
    "log_probs_of",
    "near_ties",
    "view_of",
    "view_of_log_probs",
    "view_without_choices",
]

Arrays = dict[str, NDArray[Any]]

LEAST_JUDGED = 100  # positions; from fewer a mean with its bound says little


@dataclass(frozen=True)
class LogProbs:
    """What two engines say about the same positions: KL, log-prob of the token that follows, first tokens, [N] each."""

    kl: NDArray[np.float64]
    reference_target: NDArray[np.float64]  # NaN at the end of each row
    found_target: NDArray[np.float64]
    reference_top1: NDArray[np.int64]
    found_top1: NDArray[np.int64]
    top1_margin: NDArray[np.float64]  # in log-prob


def router_choices(arrays: Arrays) -> RouterChoices:
    """The router choices among a run's arrays."""
    layers = {int(name.split(".")[1]): name.partition("/")[2] for name in arrays if name.startswith("router_ids/")}
    ids = {layer: arrays[f"router_ids/{point}"].astype(np.int64) for layer, point in layers.items()}
    margins = {layer: arrays[f"router_margin/{point}"].astype(np.float64) for layer, point in layers.items()}
    return RouterChoices(ids, margins)


def log_probs_of(reference: Arrays, found: Arrays) -> LogProbs:
    """Compare two runs of which the second kept the log-probs of the first one's top tokens."""
    names = ("topk_logprobs", "rest_logprob", "target_logprob")
    p, p_rest, p_target = (reference[name].astype(np.float64) for name in names)
    q, q_rest, q_target = (found[name].astype(np.float64) for name in names)
    margin = p[:, 0] - p[:, 1] if p.shape[1] > 1 else np.full(len(p), math.inf)
    return LogProbs(
        bucketed_kl(p, q, p_rest, q_rest),
        p_target,
        q_target,
        reference["top1_id"].astype(np.int64),
        found["top1_id"].astype(np.int64),
        margin,
    )


def view_of(
    name: str, reference: Arrays, found: Arrays, rows: NDArray[np.int64], limit: Limit, floor: dict[str, Any]
) -> View:
    """Compare two runs of the model itself: log-probs, every layer's activations, every router's choices."""
    tolerance = limit.router_score(floor.get("router_margin", 0.0))
    flips = judge_flips(router_choices(reference), router_choices(found), rows, tolerance)
    points, ratios, bad = _points(reference, found, rows, limit, floor, flips.excused_from)
    view = view_of_log_probs(name, log_probs_of(reference, found), rows, flips.excused_from == NO_FLIP, ratios, bad)
    return View(**{**vars(view), "points": points, **_flip_fields(flips, rows)})


def view_without_choices(
    name: str, reference: Arrays, found: Arrays, rows: NDArray[np.int64], limit: Limit, floor: dict[str, Any]
) -> View:
    """Compare two runs of which the second shows activations and no router choices.

    A choice that was recorded as a near-tie may have fallen otherwise: the answers at its position, and the activations
    above it from there on in its row, are excused. Points that the second run does not show are left out.
    """
    tolerance = limit.router_score(floor.get("router_margin", 0.0))
    excused = np.full(len(rows), NO_FLIP, dtype=np.int64)
    for layer, margins in router_choices(reference).margins.items():
        excused = np.where(margins <= tolerance, np.minimum(excused, layer), excused)
    shown = {key: array for key, array in reference.items() if not key.startswith(("sketch/", "norm/")) or key in found}
    points, ratios, bad = _points(shown, found, rows, limit, floor, spread_excuses(excused, rows))
    clean = ~near_ties(reference, tolerance)
    view = view_of_log_probs(name, log_probs_of(reference, found), rows, clean, ratios if points else None, bad)
    return View(**{**vars(view), "points": points})


def near_ties(arrays: Arrays, tolerance: float) -> NDArray[np.bool_]:
    """The positions where some router chose by no more than `tolerance`, [N].

    They stand for the flips of an engine that does not show its choices. Positions after them are kept: all of a long
    row would be excused otherwise, and what a flip at another position does to them is part of the noise floor.
    """
    margins = router_choices(arrays).margins.values()
    return (
        np.any([each <= tolerance for each in margins], axis=0) if margins else np.zeros(len(arrays["top1_id"]), bool)
    )


def _flip_fields(flips: Flips, rows: NDArray[np.int64]) -> dict[str, Any]:
    worst = None
    if flips.worst is not None:
        layer, place, margin = flips.worst
        inside = place - int(np.flatnonzero(rows == rows[place])[0])
        length = int((rows == rows[place]).sum())
        worst = f"layer {layer}, position {inside} of a row of {length} tokens, margin {margin:.2e}"
    return {
        "num_flips": flips.num_flips,
        "judged_choices": flips.judged,
        "unexplained_flips": flips.unexplained,
        "worst_flip": worst,
        "margin_noise": flips.margin_noise,
    }


def _points(
    reference: Arrays,
    found: Arrays,
    rows: NDArray[np.int64],
    limit: Limit,
    floor: dict[str, Any],
    excused_from: NDArray[np.int64],
) -> tuple[list[PointDistance], NDArray[np.float64], NDArray[np.bool_]]:
    """Every point's distance; each row's worst error over its limit [R]; positions with one beyond its limit [N]."""
    floors = floor.get("points", {})
    points, ratios = [], np.zeros(int(rows.max()) + 1)
    bad = np.zeros(len(rows), dtype=bool)
    for name in point_names(reference):
        own = floors.get(name, {"error": 0.0, "gain": 0.0})
        error_limit, gain_limit = limit.activation(own["error"]), limit.gain(own["gain"])
        s, t = (each[f"sketch/{name}"].astype(np.float64) for each in (reference, found))
        norm = reference[f"norm/{name}"].astype(np.float64)
        clean = excused_from > _layer_after(name)
        squared = np.where(clean, np.square(t - s).sum(axis=1), 0.0)
        power = np.where(clean, np.square(norm), 0.0)
        error = _ratio(squared.sum(), power.sum())
        gain, spread = _common_factor(s[clean], t[clean])
        points.append(PointDistance(name, error, gain, spread, error_limit, gain_limit, int(clean.sum())))
        of_rows = [_ratio(squared[rows == row].sum(), power[rows == row].sum()) for row in range(len(ratios))]
        ratios = np.fmax(ratios, np.nan_to_num(np.array(of_rows), nan=math.inf) / error_limit)
        # One position has as few numbers as the sketch is wide: four times the limit of thousands of them.
        with np.errstate(invalid="ignore", divide="ignore"):
            bad |= clean & ~(np.sqrt(squared) <= 4 * error_limit * norm)
    return points, ratios, bad


def _common_factor(s: NDArray[np.float64], t: NDArray[np.float64]) -> tuple[float, float]:
    """By how much more than 1 the sketches s [N, width] must be multiplied to come nearest to t, and its error."""
    along, power = (s * (t - s)).sum(axis=1), np.square(s).sum(axis=1)
    total = max(float(power.sum()), 1e-300)
    gain = float(along.sum()) / total
    return gain, float(np.sqrt(np.square(along - gain * power).sum())) / total


def point_names(arrays: Arrays) -> list[str]:
    """The sketched points in the order of computation, which is not the order of a file."""
    names = [name.partition("/")[2] for name in arrays if name.startswith("sketch/")]

    def order(name: str) -> tuple[int, int]:
        if not name.startswith("layers."):
            return {"embed_tokens": -1, "norm": 1 << 20, "lm_head": 1 << 21}[name], 0
        _, layer, *part = name.split(".")
        return int(layer), {"self_attn": 0, "mlp": 1}[part[0]] if part else 2

    return sorted(names, key=order)


def _layer_after(point: str) -> int:
    """The highest layer whose router comes before a point: a flip there or below excuses it."""
    if point == "embed_tokens":
        return -1
    if not point.startswith("layers."):
        return NO_FLIP - 1
    layer = int(point.split(".")[1])
    return layer - 1 if point.endswith(".self_attn") else layer


def _ratio(squared: float, power: float) -> float:
    if power > 0 or math.isnan(power) or math.isnan(squared):
        return float(math.sqrt(squared / power)) if not math.isnan(squared / power) else math.nan
    return 0.0 if squared == 0 else math.inf


def view_of_log_probs(
    name: str,
    log_probs: LogProbs,
    rows: NDArray[np.int64],
    clean: NDArray[np.bool_],
    ratios: NDArray[np.float64] | None = None,
    bad: NDArray[np.bool_] | None = None,
) -> View:
    """The part of a comparison that every engine allows. `clean` are positions that no near-tie of a router excuses.

    Where few are left, all positions are judged: the rest would say too little.
    """
    judged = clean if clean.sum() >= min(LEAST_JUDGED, len(clean) / 2) else np.ones_like(clean)
    target = judged & np.isfinite(log_probs.reference_target)
    p, q = log_probs.reference_target[target], log_probs.found_target[target]
    difference = np.abs(p - q)
    top1, weighted = top1_agreement(
        log_probs.reference_top1[judged], log_probs.found_top1[judged], log_probs.top1_margin[judged]
    )
    distances = []
    for row in range(int(rows.max()) + 1):
        here = rows == row
        wrong = np.flatnonzero(bad[here]) if bad is not None else np.zeros(0, dtype=np.int64)
        first = int(wrong[0]) if len(wrong) else None
        distances.append(
            RowDistance(
                row=row,
                length=int(here.sum()),
                kl=mean_with_bound(log_probs.kl[here & judged]),
                activation_ratio=None if ratios is None else float(ratios[row]),
                first_bad=first,
                share_bad=0.0 if first is None else len(wrong) / (int(here.sum()) - first),
            )
        )
    return View(
        name=name,
        kl=mean_with_bound(log_probs.kl[judged]),
        kl_everywhere=mean_with_bound(log_probs.kl),
        share_judged=float(judged.mean()),
        largest_logprob_difference=float(np.nan_to_num(difference, nan=math.inf).max()) if len(difference) else 0.0,
        probability_shift=signed_probability_shift(p, q),
        top1=top1,
        top1_weighted=weighted,
        rows=distances,
    )


def curve_distance(
    recorded: tuple[Sequence[float], Sequence[float]], found: tuple[Sequence[float], Sequence[float]]
) -> CurveDistance:
    """Compare two training curves, (loss, gradient norm) each."""
    loss, loss_step = _rms_and_worst(recorded[0], found[0])
    norm, norm_step = _rms_and_worst(recorded[1], found[1])
    return CurveDistance(loss, loss_step, norm, norm_step, *map(list, (recorded[0], found[0], recorded[1], found[1])))


def _rms_and_worst(recorded: Sequence[float], found: Sequence[float]) -> tuple[float, int]:
    """The RMS of the relative differences, and the step, counted from 1, where they are largest."""
    differences = [abs(b / a - 1) if math.isfinite(b) and a else math.inf for a, b in zip(recorded, found, strict=True)]
    if not differences:
        return 0.0, 0
    worst = max(range(len(differences)), key=lambda step: differences[step])
    return math.sqrt(math.fsum(each * each for each in differences) / len(differences)), worst + 1
