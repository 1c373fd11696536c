"""The verdict over a comparison, and its findings as plain documents. No torch, no files.

A finding's fields are those of a qualification's findings, but for the exam's name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from crosschip.golden.comparison import Comparison, View
from crosschip.golden.diagnosis import Diagnosis, diagnose, of_noise, one_log_prob
from crosschip.golden.limits import FLIP_SHARE, QUANTISED

__all__ = ["Judgement", "judge"]

_NUM_SEEN = {"model": 4, "transformers": 3, "http": 2}
_RANK = {"FAIL": 0, "INCONCLUSIVE": 1, "PASS WITH LIMITS": 2, "PASS": 3}


@dataclass(frozen=True)
class Judgement:
    """The verdict, what was found (worst first) and what the checks were."""

    verdict: str
    diagnosis: Diagnosis
    findings: list[dict[str, Any]]
    checks: list[str]
    not_covered: list[str]

    def document(self) -> dict[str, Any]:
        """The judgement for JSON."""
        return {
            "schema_version": 1,
            "verdict": self.verdict,
            "cause": self.diagnosis.cause,
            "subject": self.diagnosis.subject,
            "message": self.diagnosis.words,
            "findings": self.findings,
            "checks": self.checks,
            "not_covered": self.not_covered,
        }


def judge(comparison: Comparison) -> Judgement:
    """Hold a comparison against its limit, which was stated before it was measured."""
    cause = diagnose(comparison)
    found: list[dict[str, Any]] = []
    checks = ["tensor manifest", "configuration fields"] if comparison.files_checked else []
    seen = ("mean KL", "log-probs", "activations", "router choices")[: _NUM_SEEN[comparison.route]]
    if comparison.broke is not None:
        words = cause.words if comparison.broke in cause.words else comparison.broke
        found.append(_finding("FAIL", comparison.engine, "golden replay runs", words, "raises", "runs", ""))
    if comparison.weights:
        number = len(comparison.weights)
        found.append(_finding("FAIL", cause.subject, "tensor manifest", cause.words, number, 0, "every tensor once"))
    if comparison.fields:
        words = "; ".join(each.words for each in comparison.fields)
        subject = comparison.fields[0].field
        found.append(_finding("FAIL", subject, "configuration fields", words, len(comparison.fields), 0, "one by one"))
    for view in comparison.views:
        checks += [f"{check}, {view.name}" for check in seen]
        found += _of_view(comparison, view, cause)
    if comparison.curve is not None:
        checks.append("training curve")
        found += _of_curve(comparison, cause)
    made, planned = comparison.rows_made, comparison.rows_planned
    if made < planned / 2 and comparison.broke is None:
        words = f"{made} of {planned} rows were replayed: too few for a verdict"
        found.append(_finding("INCONCLUSIVE", comparison.engine, "golden replay", words, made, planned / 2, ""))
    found.sort(key=lambda each: (_RANK[each["verdict"]], -each["severity"]))
    for each in found:
        each["details"] |= {"cause": cause.cause, "caused_by": cause.subject, "target": comparison.limit.target}
    verdict = found[0]["verdict"] if found else "PASS"
    return Judgement(verdict, cause, found, checks, [*comparison.not_covered, *_not_judged(comparison)])


def _not_judged(comparison: Comparison) -> list[str]:
    """The positions that near-ties of a router excuse, in words."""
    return [
        f"{1 - view.share_judged:.0%} of the positions, {view.name}: a near-tie of a router excuses them from the mean "
        f"KL and the log-probs (mean KL everywhere {view.kl_everywhere.mean:.1e})"
        for view in comparison.views
        if view.share_judged < 0.995
    ]


def _of_view(comparison: Comparison, view: View, cause: Diagnosis) -> list[dict[str, Any]]:
    limit = comparison.limit
    found = []
    if not view.kl.upper_95 < limit.mean_kl:
        is_drowned = comparison.is_drowned(view)
        verdict = "INCONCLUSIVE" if is_drowned or view.kl.mean <= limit.mean_kl else "FAIL"
        why = of_noise(comparison) if is_drowned else cause
        bound = f"mean KL {view.kl.mean:.2e} nats (upper 95 % bound {view.kl.upper_95:.2e})"
        words = f"{bound}, limit {limit.mean_kl:.2e}: {why.words}"
        found.append(
            _finding(
                verdict, why.subject, f"mean KL, {view.name}", words, view.kl.upper_95, limit.mean_kl, limit.source
            )
        )
    point = view.first_diverging
    if point is not None and limit.target not in QUANTISED:
        in_gain = point.error <= point.error_limit
        measured, most = (abs(point.gain), point.gain_limit) if in_gain else (point.error, point.error_limit)
        source = "5 x the recording chip's own noise there, or a stated share of the dtype's unit"
        found.append(_finding("FAIL", cause.subject, f"activations, {view.name}", cause.words, measured, most, source))
    found += _of_log_probs(comparison, view, cause)
    if view.unexplained_flips and limit.target not in QUANTISED:
        verdict = "FAIL" if comparison.are_flips_beyond(view) else "PASS WITH LIMITS"
        number = f"{view.unexplained_flips} of {view.judged_choices} router choices fell otherwise"
        words = f"{number} by more than rounding explains: {view.worst_flip}"
        source = "share of choices whose recorded margin exceeds 5 x the recorded noise"
        check = f"router choices, {view.name}"
        found.append(_finding(verdict, cause.subject, check, words, view.flip_share, FLIP_SHARE, source))
    return found


def _of_log_probs(comparison: Comparison, view: View, cause: Diagnosis) -> list[dict[str, Any]]:
    limit = comparison.limit
    found = []
    if comparison.is_logprob_beyond(view):
        words = one_log_prob(comparison, view)
        words = cause.words if words in cause.words else f"{words}: {cause.words}"
        source = "10 x the recording chip's own largest, or what was stated for the dtype"
        number, most = view.largest_logprob_difference, comparison.logprob_limit
        found.append(_finding("FAIL", cause.subject, f"log-probs, {view.name}", words, number, most, source))
    for row in view.rows:
        # One row among many is held to the limit by its lower bound: the upper one of few positions says little.
        if row.kl.num_positions >= 2 and not row.kl.lower_95 <= limit.mean_kl and view.kl.upper_95 < limit.mean_kl:
            words = f"the row of {row.length} tokens alone has mean KL {row.kl.mean:.2e}, limit {limit.mean_kl:.2e}"
            subject = f"{row.length} tokens"
            found.append(
                _finding(
                    "PASS WITH LIMITS",
                    subject,
                    f"mean KL by length, {view.name}",
                    words,
                    row.kl.mean,
                    limit.mean_kl,
                    limit.source,
                )
            )
    return found


def _of_curve(comparison: Comparison, cause: Diagnosis) -> list[dict[str, Any]]:
    curve, limit, floor = comparison.curve, comparison.limit, comparison.floor
    assert curve is not None
    found = []
    rows = (
        ("loss", curve.loss, curve.loss_step, limit.loss(floor["loss"])),
        ("gradient norm", curve.gradient_norm, curve.gradient_norm_step, limit.gradient_norm(floor["gradient_norm"])),
    )
    for name, measured, step, most in rows:
        if not measured <= most:
            how = f"differs by {measured:.2%} (RMS over its steps; most at step {step}), limit {most:.2%}"
            words = f"the {name} of the short training {how}: {cause.words}"
            source = "5 x the recording chip's own noise, or what was stated for the dtype"
            found.append(_finding("FAIL", cause.subject, f"training curve, {name}", words, measured, most, source))
    return found


def _finding(
    verdict: str, subject: str, check: str, message: str, measured: float | str, limit: float | str, source: str
) -> dict[str, Any]:
    ratio = 1.0
    if isinstance(measured, int | float) and isinstance(limit, int | float):
        ratio = measured / limit if limit > 0 else float(measured)
    finite = math.isfinite(ratio)
    return {
        "verdict": verdict,
        "subject": subject,
        "check": check,
        "message": message,
        "measured": measured if not isinstance(measured, float) or math.isfinite(measured) else str(measured),
        "limit": limit,
        "limit_source": source,
        "critical": verdict in ("FAIL", "INCONCLUSIVE"),
        "severity": ratio if finite else 1e12,
        "details": {},
    }
