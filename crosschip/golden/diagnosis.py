"""Which kind of cause a difference has: conversion, config field, length, operator or engine. No torch, no files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from crosschip.golden.comparison import Comparison, PointDistance, RowDistance, View
from crosschip.golden.limits import QUANTISED

__all__ = ["Cause", "Diagnosis", "diagnose", "of_noise", "one_log_prob"]

Cause = Literal["conversion", "config field", "length", "operator", "engine", "recording", "noise", "none"]

_SHORTEST_TELLING = 15  # in rows of one or two tokens attention has nothing to do, so that they are right says little
_MOST = 0.8
_SHOWN = 4


@dataclass(frozen=True)
class Diagnosis:
    """The cause, the thing that it names (a tensor, a field, a length, a layer), and a sentence."""

    cause: Cause
    subject: str
    words: str


def diagnose(comparison: Comparison) -> Diagnosis:
    """The first cause that explains the comparison, in the order in which one rules out the next."""
    if comparison.weights:
        first = comparison.weights[0]
        others = f" and {len(comparison.weights) - 1} more tensors differ" if len(comparison.weights) > 1 else ""
        shown = "; ".join(each.words for each in comparison.weights[:_SHOWN])
        return Diagnosis("conversion", first.tensor, f"the model was converted wrongly: {shown}{others}")
    if comparison.fields:
        words = "; ".join(each.words for each in comparison.fields)
        return Diagnosis("config field", comparison.fields[0].field, f"the configuration differs: {words}")
    found = [each for view in comparison.views if (each := _of_view(comparison, view)) is not None]
    told = next((each for each in found if each.cause != "noise"), None)
    if told is not None:  # noise explains nothing that another way of running the rows shows beyond it
        return told
    if comparison.curve is not None and _curve_is_bad(comparison):
        return Diagnosis(
            "operator", "training step", "the forward pass agrees and the training curve does not: look at the backward"
        )
    if comparison.broke is not None and comparison.transformers is not None:
        other = comparison.transformers
        return _beside_transformers(comparison, other, f"it broke: {comparison.broke}; ", comparison.is_drowned(other))
    return found[0] if found else Diagnosis("none", comparison.engine, "nothing differs by more than its limit")


def of_noise(comparison: Comparison) -> Diagnosis:
    """The limit cannot tell the model from itself."""
    noise = comparison.floor["mean_kl"]
    words = (
        f"the recording chip's own noise in {comparison.dtype}, {noise:.1e} nats, is beyond the limit, which "
        "cannot tell this model from itself then: hand it off in float32, or train it until rounding decides less"
    )
    return Diagnosis("noise", comparison.dtype, words)


def one_log_prob(comparison: Comparison, view: View) -> str:
    """That some log-prob alone is beyond its limit, in words."""
    return f"one log-prob is off by {view.largest_logprob_difference:.2e} nats, limit {comparison.logprob_limit:.2e}"


def _curve_is_bad(comparison: Comparison) -> bool:
    curve, limit, floor = comparison.curve, comparison.limit, comparison.floor
    assert curve is not None
    return not (
        curve.loss <= limit.loss(floor["loss"]) and curve.gradient_norm <= limit.gradient_norm(floor["gradient_norm"])
    )


def _of_view(comparison: Comparison, view: View) -> Diagnosis | None:
    is_bad = [_row_is_bad(row, comparison) for row in view.rows]
    first = _first_diverging(comparison, view)
    is_beyond_noise = comparison.is_logprob_beyond(view) or comparison.are_flips_beyond(view)
    is_far = any(is_bad) or view.kl.mean > comparison.limit.mean_kl
    if not is_far and first is None and not is_beyond_noise:
        return None
    if first is None and comparison.is_drowned(view):  # noise moves whole rows, too, so their lengths tell nothing
        return _without_layers(comparison, view) if is_beyond_noise else of_noise(comparison)
    length = _of_length(comparison, view, is_bad)
    if length is not None:
        return length
    if first is None:
        return _without_layers(comparison, view)
    error = f"activations {first.error:.1e} apart (limit {first.error_limit:.1e})"
    gain = f"a common factor of {1 + first.gain:.6f} (limit 1 +- {first.gain_limit:.1e})"
    what = gain if first.error <= first.error_limit else error
    where = f"{first.point} is the first to diverge on {comparison.engine}, {view.name}"
    words = f"weights and configuration agree; {where}: {what}"
    return Diagnosis("operator", first.point, words)


def _first_diverging(comparison: Comparison, view: View) -> PointDistance | None:
    """The first point beyond its limit; None of a quantised model: that moves them all, so they tell nothing."""
    return None if comparison.limit.target in QUANTISED else view.first_diverging


def _without_layers(comparison: Comparison, view: View) -> Diagnosis:
    """Only answers were seen to differ: the files are the recorded ones, as far as they were compared."""
    engine, other = comparison.engine, comparison.transformers
    differ = _how_answers_differ(comparison, view)
    if comparison.limit.target in QUANTISED and comparison.files_checked and other is None:
        return _of_quantised(comparison, f"{engine}, {view.name}: {differ}")
    if comparison.route != "http":
        return Diagnosis("operator", engine, f"{engine}, {view.name}: {differ}, and no layer is seen to differ first")
    if other is None:
        unknown = "" if comparison.files_checked else "; its files were not given, so they may be the cause as well"
        return Diagnosis("engine", engine, f"{engine}, {view.name}: {differ}{unknown}")
    is_drowned = comparison.is_drowned(view)
    return _beside_transformers(comparison, other, f"{differ}; " if is_drowned else "", is_drowned)


def _beside_transformers(comparison: Comparison, other: View, what: str, is_drowned: bool) -> Diagnosis:
    """The engine's `what`, beside the same files in transformers; `is_drowned`: the mean tells nothing of them."""
    engine, limit = comparison.engine, comparison.limit.mean_kl
    is_right = not comparison.is_logprob_beyond(other) if is_drowned else other.kl.mean <= limit
    if is_right:
        words = f"{what}the same files in transformers agree (mean KL {other.kl.mean:.1e}): {engine} computes otherwise"
        return Diagnosis("engine", engine, words)
    both = f"{what}the same files in transformers differ as well (mean KL {other.kl.mean:.1e})"
    if comparison.limit.target in QUANTISED:
        return Diagnosis("conversion", comparison.limit.target, f"{both}: look at how they were quantised")
    words = f"{both} and are those of the recording: the chip that recorded may be the one that computes otherwise"
    return Diagnosis("recording", "the bundle", words)


def _of_quantised(comparison: Comparison, differ: str) -> Diagnosis:
    """Of a model that was quantised, run here or by an engine: what rounding left may answer otherwise by itself."""
    if comparison.route == "http":
        unknown = "how it was quantised may be the cause as well: replay the same files in process"
        return Diagnosis("engine", comparison.engine, f"{differ}; {unknown}")
    within = f"{differ}, and every tensor is within its rounding: look at how the model was quantised"
    return Diagnosis("conversion", comparison.limit.target, within)


def _how_answers_differ(comparison: Comparison, view: View) -> str:
    """Where the mean is within the limit, or within the noise, the numbers that are not."""
    if not view.kl.mean <= comparison.limit.mean_kl and not comparison.is_drowned(view):
        return "answers differ"
    if comparison.is_logprob_beyond(view):
        return one_log_prob(comparison, view)
    if comparison.are_flips_beyond(view):
        return f"router choices fall otherwise by more than rounding explains: {view.worst_flip}"
    return "answers differ"


def _row_is_bad(row: RowDistance, comparison: Comparison) -> bool:
    """Whether a row is beyond honest rounding: by its activations where they are judged, else by its log-probs."""
    if row.activation_ratio is not None and comparison.limit.target not in QUANTISED:
        # A row has fewer numbers than all rows together, so a floor measured over all is doubled.
        return not row.activation_ratio <= 2.0
    return row.kl.num_positions > 0 and not row.kl.mean <= 2 * comparison.limit.mean_kl


def _of_length(comparison: Comparison, view: View, is_bad: list[bool]) -> Diagnosis | None:
    """Rows up to a length are right and all longer ones wrong, or rows are right up to a position."""
    bad = [row for row, wrong in zip(view.rows, is_bad, strict=True) if wrong]
    good = [row.length for row, wrong in zip(view.rows, is_bad, strict=True) if not wrong]
    if not bad:
        return None
    starts = [row.first_bad for row in bad if comparison.limit.target not in QUANTISED]
    positions = [start for start in starts if start is not None]
    all_after = all(row.share_bad >= _MOST for row in bad)  # else single positions stick out of noise
    if len(positions) == len(bad) and min(positions) >= _SHORTEST_TELLING and all_after:
        place = min(positions)
        return Diagnosis(
            "length",
            f"position {place}",
            f"{view.name}: right up to position {place - 1}, wrong from position {place} on",
        )
    shortest_bad = min(row.length for row in bad)
    longest_good = max(good, default=0)
    if longest_good >= _SHORTEST_TELLING and longest_good < shortest_bad:
        first = _first_diverging(comparison, view)
        where = f"; the first to diverge there is {first.point}" if first else ""
        return Diagnosis(
            "length",
            f"more than {longest_good} tokens",
            f"{view.name}: rows of up to {longest_good} tokens are right, of {shortest_bad} and more wrong{where}",
        )
    return None
