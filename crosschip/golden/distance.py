"""How far two engines' answers about the same tokens lie apart. Plain arrays: no torch, no files.

N positions, k tokens that each position's list holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["MeanBound", "bucketed_kl", "kl_of_lists", "mean_with_bound", "signed_probability_shift", "top1_agreement"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_Z_95_ONE_SIDED = 1.6448536269514722
# The least mass of "all other tokens": log-probs in fp32 cannot tell a smaller one from 0.
_LEAST_REST = 2.0**-24


@dataclass(frozen=True)
class MeanBound:
    """A mean over positions with its one-sided 95 % bounds."""

    mean: float
    lower_95: float
    upper_95: float
    num_positions: int


def bucketed_kl(reference: Floats, found: Floats, reference_rest: Floats, found_rest: Floats) -> Floats:
    """KL(reference || found) in nats at each position over k tokens and one bucket for the rest.

    Args:
        reference: log-probs of the same k tokens, [N, k]; -inf is a probability of 0.
        found: the other engine's, [N, k].
        reference_rest: log-prob of all other tokens together, [N].
        found_rest: the other engine's, [N].

    Both sides are made to add up to 1, so that rounding of their log-probs counts in second order only. A log-prob that
    is not a number gives infinity.
    """
    p, log_p = _normalised(np.concatenate((reference, reference_rest[:, None]), axis=1))
    _, log_q = _normalised(np.concatenate((found, found_rest[:, None]), axis=1))
    terms = np.where(p > 0, p * (np.where(p > 0, log_p, 0.0) - log_q), 0.0)
    kl = terms.sum(axis=1)
    return np.where(np.isnan(kl), np.inf, np.maximum(kl, 0.0))


def _normalised(log_probs: Floats) -> tuple[Floats, Floats]:
    log_probs = log_probs.astype(np.float64)
    largest = log_probs.max(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        shifted = log_probs - largest
        log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return np.exp(log_p), log_p


def kl_of_lists(
    reference: list[dict[int, float]],
    found: list[dict[int, float]],
    least: list[tuple[float, float]] | None = None,
) -> Floats:
    """KL at each position of two lists of top tokens, {id: log-prob}, and one bucket for the rest: [N].

    A token that only one side lists is given, on the other side, the least probability of that side's list, the most
    it can have there. So lists that differ by a near-tie at their ends are close, and lists that have nothing in common
    are far apart.

    `least` is the least log-prob among the top tokens of the reference's and the other's list, at each position, where
    the lists hold a token beside those (the prompt's own next one, however unlikely); None: the least of the whole.
    """
    least = least or [(math.inf, math.inf)] * len(reference)
    triples = zip(reference, found, least, strict=True)
    return np.array([_kl_of_two(p, q, *bounds) for p, q, bounds in triples], dtype=np.float64)


def _kl_of_two(reference: dict[int, float], found: dict[int, float], least_p: float, least_q: float) -> float:
    if any(math.isnan(value) for value in (*reference.values(), *found.values())) or not reference or not found:
        return math.inf
    tokens = [*reference, *(token for token in found if token not in reference)]
    p, q = _filled(reference, tokens, least_p), _filled(found, tokens, least_q)
    return float(bucketed_kl(np.log(p[None, :-1]), np.log(q[None, :-1]), np.log(p[-1:]), np.log(q[-1:]))[0])


def _filled(listed: dict[int, float], tokens: list[int], least_listed: float) -> Floats:
    """Probabilities of `tokens` and of the rest; what is not listed shares the unlisted mass, at most the least."""
    known = np.exp(np.array([listed[token] for token in tokens if token in listed]))
    unlisted = max(1.0 - float(known.sum()), _LEAST_REST)
    num_missing = len(tokens) - len(known)
    most = float(known.min()) if math.isinf(least_listed) else math.exp(least_listed)
    share = min(most, unlisted / (num_missing + 1)) if num_missing else 0.0
    least = np.finfo(np.float64).tiny
    values = [math.exp(listed[token]) if token in listed else share for token in tokens]
    rest = max(unlisted - num_missing * share, _LEAST_REST)
    return np.maximum(np.array([*values, rest]), least)


def mean_with_bound(values: Floats) -> MeanBound:
    """The mean and its 95 % bounds by the normal approximation; one value that is not finite makes all infinite."""
    if len(values) == 0:
        return MeanBound(0.0, 0.0, 0.0, 0)
    if not np.isfinite(values).all():
        return MeanBound(math.inf, math.inf, math.inf, len(values))
    mean = float(values.mean())
    half = _Z_95_ONE_SIDED * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return MeanBound(mean, mean - half, mean + half, len(values))


def signed_probability_shift(reference: Floats, found: Floats) -> MeanBound:
    """mean(p_found - p_reference) of the tokens that follow: a bias that a KL, which has no sign, hides."""
    return mean_with_bound(np.exp(found.astype(np.float64)) - np.exp(reference.astype(np.float64)))


def top1_agreement(reference_ids: Ints, found_ids: Ints, reference_margins: Floats) -> tuple[float, float]:
    """The share of positions with the same first token, plain and weighted by the reference's margin in log-prob.

    A near-tie that falls the other way costs next to nothing in the weighted share.
    """
    same = reference_ids == found_ids
    if len(same) == 0:
        return 1.0, 1.0
    margins = np.maximum(np.nan_to_num(reference_margins.astype(np.float64), posinf=0.0), 0.0)
    weighted = float((same * margins).sum() / margins.sum()) if margins.sum() > 0 else float(same.mean())
    return float(same.mean()), weighted
