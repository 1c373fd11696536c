"""The judge: errors of a chip's results against those of honest implementations, with stated confidence. Numpy only.

A *draw* is one input of an operator: its golden results in fp64, the chip's, and those of several honest
implementations in the same dtype (the controls). All limits stand here, each with its reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from crosschip.qualify.judging.offsets import (
    BIAS_LIMIT,
    FINE,
    HARMLESS,
    MIN_DISTINCT,
    ROUNDED,
    Offset,
    judge_offset,
    mean_and_error,
    offsets_of,
)
from crosschip.qualify.judging.student import student_tail, student_threshold

__all__ = [
    "BIAS_LIMIT",
    "FALSE_DISCOVERY_RATE",
    "GROSS_LIMIT",
    "ILL_CONDITIONED",
    "MIN_DRAWS",
    "MIN_OUTPUTS",
    "RATIO_LIMIT",
    "SLOPE_LIMIT",
    "SURE",
    "TAIL_LIMIT",
    "TAIL_SHARE",
    "DrawErrors",
    "Judgement",
    "Offset",
    "Slope",
    "benjamini_hochberg",
    "errors_of",
    "fails_alone",
    "judge_draws",
    "judge_slope",
]

Array = NDArray[np.float64]

MIN_DRAWS = 30
MIN_OUTPUTS = 4096

# The worst honest control is the yardstick; a chip that errs 2.5 times as much as that is no longer explained by
# another order of summation, which the controls hold already.
RATIO_LIMIT = 2.5
CONFIDENCE = 0.95
FALSE_DISCOVERY_RATE = 0.05
# A rejection at this level stands whatever the other operators say: it is Bonferroni's over a sweep of 500.
SURE = FALSE_DISCOVERY_RATE / 500

# The tail may be wider by the ratio limit, times the widest honest difference of shape: the 99.9 % point of a normal
# error (3.29 standard deviations) against that of a rounding error, which is uniform (1.73).
TAIL_SHARE = 1e-3
TAIL_LIMIT = RATIO_LIMIT * 3.29 / 1.73
# No single output: 6.4 standard deviations are not reached once in 10^10 normal errors.
GROSS_LIMIT = RATIO_LIMIT * 6.4

# An accumulator as coarse as the output lets the relative error grow with the root of K; half of that growth.
SLOPE_LIMIT = 0.25

# A control that errs by more than this share of the golden scale says nothing about the chip.
ILL_CONDITIONED = 0.1


@dataclass(frozen=True)
class DrawErrors:
    """The errors of one draw, all against golden results; RMS over its outputs.

    `scaled_chip` and `scaled_control` are absolute errors in units of half a last place plus the controls' RMS error;
    `gross` is the chip's largest error where, in addition, the controls' own error at that output counts. `offsets`
    holds, by kind, the chip's mean error and those of honest implementations by name, in multiples of `unit`, the
    controls' error.
    """

    label: str
    num_outputs: int
    scale: float
    chip: float
    control: float  # the worst control's, at least the rounding's
    floor: float  # of rounding the golden result: as it is, and as it is on average wherever there is any
    num_different: int  # outputs that differ from the golden result
    gross: float
    scaled_chip: Array
    scaled_control: Array
    offsets: Mapping[str, tuple[float, Mapping[str, float]]]
    unit: float  # of the offsets
    num_distinct: int
    digest: int  # of the golden results: draws of the same results are one
    size: int = 0  # K, for the slope

    @property
    def exact(self) -> bool:
        """Whether every honest result is the golden one, so that the chip's has to be, too."""
        return self.control == 0.0

    @property
    def is_nearly_exact(self) -> bool:
        """Whether all results are as right as makes no difference to a training."""
        return self.chip < HARMLESS * self.scale

    @property
    def ill_conditioned(self) -> bool:
        """Whether honest implementations are too far off for the draw to say anything."""
        return self.control > ILL_CONDITIONED * self.scale

    @property
    def log_ratio(self) -> float:
        """log of the chip's error over the worst control's, both at least the rounding's."""
        return math.log(max(self.chip, self.floor, 1e-300) / self.control)


@dataclass(frozen=True)
class Slope:
    """How much faster the chip's error grows with K than the worst control's: slope in log-log, lower bound."""

    value: float
    lower: float

    @property
    def fails(self) -> bool:
        """Whether it surely grows as with a coarse accumulator."""
        return self.lower > SLOPE_LIMIT


State = Literal["pass", "fail", "open", "abstain"]
Reason = Literal["", "bitwise", "outlier", "tail", "bias", "slight bias", "ratio", "draws", "ill-conditioned"]


@dataclass(frozen=True)
class Judgement:
    """What the draws of one call say. `p_value` is that of "the error ratio is at most the limit".

    A `pass` for the reason `slight bias` is one with limits. `fail` with reason `ratio` holds at the level SURE; a
    smaller certainty stays `open` and is for Benjamini-Hochberg.
    """

    state: State
    reason: Reason
    num_draws: int
    num_outputs: int
    ratio: float | None = None
    lower: float | None = None
    upper: float | None = None
    p_value: float = 1.0
    tail: float | None = None
    gross: float = 0.0
    offsets: tuple[Offset, ...] = ()
    num_different: int = 0
    worst_draw: str = ""
    num_abstained: int = 0
    num_exact: int = 0
    details: dict[str, float] = field(default_factory=dict)


def errors_of(
    label: str,
    chip: Array,
    golden: Array,
    rounded: Array,
    controls: Mapping[str, Array],
    epsilon: float,
    tiny: float,
    size: int = 0,
) -> DrawErrors | None:
    """The errors of one draw; arrays of one shape in fp64, `rounded` is the golden result in the result's dtype.

    `epsilon` and `tiny` are that dtype's. Outputs that are not finite in any honest result are left out (gates look at
    them); None when nothing is left. A flushed subnormal is no error.
    """
    honest = {name: each.ravel() for name, each in {ROUNDED: rounded, **controls}.items()}
    golden = golden.ravel()
    kept = np.isfinite(golden)
    for each in honest.values():
        kept &= np.isfinite(each)
    golden = golden[kept]
    if golden.size == 0:
        return None
    error = _error(chip.ravel()[kept], golden, tiny)
    honest_errors = {name: _error(each[kept], golden, tiny) for name, each in honest.items()}
    magnitudes = np.max(np.abs(list(honest_errors.values())), axis=0)
    _, exponents = np.frexp(np.maximum(np.abs(golden), tiny))
    half_place = np.ldexp(0.25 * epsilon, exponents)
    floor = max(_rms(honest_errors[ROUNDED]), _rms(np.where(magnitudes > 0, half_place / math.sqrt(3), 0.0)))
    usual = max(floor, *(_rms(each) for each in honest_errors.values()))
    unit = max(usual, 2 * _rms(half_place) if epsilon <= FINE else 0.0)
    size_of_error = np.abs(error)
    return DrawErrors(
        label=label,
        num_outputs=golden.size,
        scale=_rms(golden),
        chip=_rms(error),
        control=usual,
        floor=floor,
        num_different=int(np.count_nonzero(error)),
        gross=float(np.max(size_of_error / (half_place + usual + magnitudes))),
        scaled_chip=size_of_error / (half_place + usual),
        # Whatever rounding an inexact result has here, elsewhere it reaches half a place.
        scaled_control=np.where(magnitudes > 0, np.maximum(magnitudes, half_place), 0.0) / (half_place + usual),
        offsets=offsets_of(error, honest_errors, golden, unit),
        unit=unit,
        num_distinct=min(MIN_DISTINCT, len(np.unique(golden[: 4 * MIN_DISTINCT]))),
        digest=hash(golden.tobytes()),
        size=size,
    )


def fails_alone(draw: DrawErrors) -> bool:
    """Whether one draw suffices for a failure: an exact result that is another, or a single result that is far off."""
    if draw.exact:
        return draw.num_different > 0
    return not draw.ill_conditioned and draw.gross > GROSS_LIMIT


def judge_draws(draws: Sequence[DrawErrors]) -> Judgement:
    """The judgement over pooled draws. Judge again with more draws when it is `open`."""
    num_outputs = sum(draw.num_outputs for draw in draws)
    exact = [draw for draw in draws if draw.exact]
    sound = [draw for draw in draws if not draw.exact and not draw.ill_conditioned]
    counts = {
        "num_draws": len(draws),
        "num_outputs": num_outputs,
        "num_exact": len(exact),
        "num_abstained": len(draws) - len(exact) - len(sound),
        "gross": max((draw.gross for draw in sound), default=0.0),
    }
    # What rounds elsewhere may do so here, if only by as little as products in fp32 made of three in TF32.
    broken = [draw for draw in exact if draw.num_different and not (sound and draw.is_nearly_exact)]
    if broken:
        worst = max(broken, key=lambda draw: draw.num_different / draw.num_outputs)
        share = {"num_different": worst.num_different, "worst_draw": worst.label}
        return Judgement("fail", "bitwise", **counts, **share)  # type: ignore[arg-type]
    if not sound:
        state: State = "pass" if exact else "abstain"
        return Judgement(state, "" if exact else "ill-conditioned", **counts)  # type: ignore[arg-type]
    different_results = {draw.digest: draw for draw in sorted(sound, key=lambda draw: draw.gross)}
    return _judge_inexact(list(different_results.values()), counts)


def _judge_inexact(sound: Sequence[DrawErrors], counts: Mapping[str, float]) -> Judgement:
    logs = np.array([draw.log_ratio for draw in sound])
    mean, error = mean_and_error(logs)
    freedom = len(logs) - 1
    margin = student_threshold(1 - CONFIDENCE, freedom) * error if freedom > 0 else math.inf
    p_value = _p_value(mean - math.log(RATIO_LIMIT), error, freedom)
    tail = _tail_ratio(sound)
    offsets = _judge_offsets(sound)
    outlier = max(sound, key=lambda draw: draw.gross)
    state, reason = _decide(mean + margin, p_value, tail, offsets, outlier.gross, len(sound))
    return Judgement(
        state,
        reason,
        ratio=math.exp(mean),
        lower=math.exp(mean - margin) if margin < 500 else 0.0,
        upper=math.exp(min(500.0, mean + margin)),
        p_value=p_value,
        tail=tail,
        offsets=offsets,
        worst_draw=outlier.label if reason == "outlier" else max(sound, key=lambda draw: draw.log_ratio).label,
        **counts,  # type: ignore[arg-type]
    )


def _decide(
    upper: float, p_value: float, tail: float, offsets: Sequence[Offset], gross: float, num_draws: int
) -> tuple[State, Reason]:
    if gross > GROSS_LIMIT:
        return "fail", "outlier"
    if p_value < SURE:
        return "fail", "ratio"
    if tail > TAIL_LIMIT:
        return "fail", "tail"
    leaning = [offset for offset in offsets if offset.fails]
    if any(not offset.is_harmless for offset in leaning):
        return "fail", "bias"
    if num_draws < MIN_DRAWS:
        return "open", "draws"
    if upper >= math.log(RATIO_LIMIT):
        return "open", "ratio"
    return "pass", "slight bias" if leaning else ""


def _tail_ratio(sound: Sequence[DrawErrors]) -> float:
    """The chip's tail over the controls': a lower bound of the chip's 99.9 % point over the controls' 99.9 % point."""
    chip = np.sort(np.concatenate([draw.scaled_chip for draw in sound]))[::-1]
    control = np.concatenate([draw.scaled_control for draw in sound])
    # With the true 99.9 % point, more outputs than this lie beyond it with a chance below SURE (Poisson, normal tail).
    expected = TAIL_SHARE * len(chip)
    beyond = math.ceil(expected + NormalDist().inv_cdf(1 - SURE) * math.sqrt(expected) + 5)
    if beyond >= len(chip):
        return 0.0
    return float(chip[beyond] / max(np.quantile(control, 1 - TAIL_SHARE), 1e-300))


def _judge_offsets(sound: Sequence[DrawErrors]) -> tuple[Offset, ...]:
    enough = [draw for draw in sound if draw.num_distinct >= min(MIN_DISTINCT, draw.num_outputs)]
    if len(enough) < MIN_DRAWS or sum(draw.num_distinct for draw in enough) < MIN_DISTINCT:
        return ()
    unit = float(np.mean([draw.unit / draw.scale for draw in enough if draw.scale > 0]))
    return tuple(
        judge_offset(kind, [draw.offsets[kind] for draw in enough], unit, SURE) for kind in ("bias", "shift", "gain")
    )


def judge_slope(draws: Sequence[DrawErrors]) -> Slope | None:
    """The slope of the log ratio against log K over draws of different K; None when K does not vary enough."""
    sound = [draw for draw in draws if draw.size > 0 and not draw.exact and not draw.ill_conditioned]
    sizes = np.log([draw.size for draw in sound])
    if len(sound) < 12 or np.ptp(sizes) < math.log(8):
        return None
    ratios = np.array([draw.log_ratio for draw in sound])
    centred = sizes - sizes.mean()
    spread = float(centred @ centred)
    value = float(centred @ ratios) / spread
    rest = ratios - ratios.mean() - value * centred
    freedom = len(sound) - 2
    error = math.sqrt(float(rest @ rest) / freedom / spread)
    return Slope(value, value - student_threshold(SURE, freedom) * error)


def benjamini_hochberg(p_values: Sequence[float], rate: float = FALSE_DISCOVERY_RATE) -> list[bool]:
    """Which hypotheses are rejected at this rate of false discoveries (Benjamini and Hochberg 1995)."""
    order = np.argsort(p_values)
    most = 0
    for rank, place in enumerate(order, start=1):
        if p_values[place] <= rate * rank / len(p_values):
            most = rank
    rejected = set(order[:most].tolist())
    return [place in rejected for place in range(len(p_values))]


def _error(result: Array, golden: Array, tiny: float) -> Array:
    error = result - golden
    small = np.abs(golden) < 2 * tiny
    if small.any():
        error[small & (np.abs(error) <= tiny)] = 0.0
    return error


def _rms(values: Array) -> float:
    return math.sqrt(float(np.mean(np.square(values))))


def _p_value(above: float, error: float, freedom: int) -> float:
    """The one-sided p-value of a mean that lies `above` its hypothesis."""
    if freedom < 1:
        return 1.0
    if error == 0.0:
        return 0.0 if above > 0 else 1.0
    return student_tail(above / error, freedom)
