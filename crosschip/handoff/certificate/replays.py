"""A golden replay as a part of the certificate: which engine, on which chip, each number with its limit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from crosschip.certificate import chip_kind
from crosschip.certificate.document import PASSED, worst_verdict
from crosschip.chips import Chip, fingerprint
from crosschip.golden.comparison import Comparison, View
from crosschip.golden.judge import Judgement, judge
from crosschip.golden.limits import FLIP_SHARE, QUANTISED
from crosschip.handoff.certificate.gate import Gate, Measure, plain

__all__ = ["Replayed", "replay_document", "replay_gate"]

_NAME = "golden replay"


@dataclass(frozen=True)
class Replayed:
    """One replay: the engine by name, what is known of it (version, command, environment), the chip it ran on.

    `chip` None: an engine behind an address, of which nobody here knows the chip.
    """

    engine: str
    comparison: Comparison
    chip: Chip | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    form: str = "the files"  # what was run: the files themselves, or what they are multiplied out to
    tokenizer: Gate | None = None  # of the engine's own tokenizer, where that is inside of the files

    @property
    def judgement(self) -> Judgement:
        """The verdict with its findings."""
        return judge(self.comparison)


def replay_document(replayed: Replayed, beside: Sequence[Replayed] = ()) -> dict[str, Any]:
    """The replay for the certificate. `beside` are the others of the same files: together they tell whom to blame."""
    comparison, judgement, chip = replayed.comparison, replayed.judgement, replayed.chip
    return plain(
        {
            "engine": {"name": replayed.engine, **{k: v for k, v in replayed.facts.items() if k != "engine"}},
            "route": comparison.route,
            "ran": replayed.form,
            "chip": None if chip is None else chip.name,
            "chip_kind": None if chip is None else chip_kind(chip.name, chip.vendor, chip.model_name),
            "dtype": comparison.dtype,
            "target": comparison.limit.target,
            "verdict": judgement.verdict,
            "cause": judgement.diagnosis.cause,
            "subject": judgement.diagnosis.subject,
            "message": _message(comparison, judgement),
            "blame": _blame(comparison, judgement, beside),
            "broke": comparison.broke,
            "rows": {"replayed": comparison.rows_made, "of": comparison.rows_planned},
            "views": [_view(comparison, view) for view in comparison.views],
            "in_transformers": None
            if comparison.transformers is None
            else _answers(comparison, comparison.transformers),
            "findings": [_finding(each) for each in judgement.findings],
            "not_covered": judgement.not_covered,
            "fingerprint": None if chip is None else fingerprint(chip),
            "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
    )


def _message(comparison: Comparison, judgement: Judgement) -> str:
    if judgement.verdict == "PASS":
        return "within every limit"
    if comparison.broke is not None and judgement.diagnosis.cause in ("none", "noise"):
        return f"it broke: {comparison.broke}"
    if judgement.verdict == "INCONCLUSIVE" and judgement.diagnosis.cause == "none":
        return str(judgement.findings[0]["message"])
    return judgement.diagnosis.words


def replay_gate(replays: list[dict[str, Any]]) -> Gate:
    """All replays as one gate of the certificate."""
    if not replays:
        return Gate(_NAME, "INCONCLUSIVE", "nothing was replayed: no engine was asked")
    worst = worst_verdict([each["verdict"] for each in replays])
    first = next(each for each in replays if each["verdict"] == worst)
    where = f"{first['engine']['name']} on {first['chip'] or 'an unknown chip'} in {first['dtype']}"
    measures = []
    for each in replays:
        if each["views"]:
            name = f"upper 95 % bound of the mean KL, {each['engine']['name']}, {each['dtype']}"
            highest = max((view["measures"][0] for view in each["views"]), key=_size)
            measures.append(Measure(name, highest["value"], highest["limit"], highest["limit_source"]))
    if worst == "PASS":
        return Gate(_NAME, worst, f"{len(replays)} replays within every limit", None, measures)
    return Gate(_NAME, worst, f"{where}: {first['message']}", first["subject"], measures)


def _size(measure: dict[str, Any]) -> float:
    value = measure["value"]
    return value if isinstance(value, int | float) else float("inf")


def _view(comparison: Comparison, view: View) -> dict[str, Any]:
    document = _answers(comparison, view)
    if not view.points:
        return document
    first = view.first_diverging
    judged = (
        "" if comparison.limit.target not in QUANTISED else ", reported and not judged: quantisation moves them all"
    )
    source = f"each point against 5 x the recorded noise there{judged}"
    document["measures"] += [
        Measure("first diverging point", first.point if first else "none", "none", source).document(),
    ]
    if comparison.route == "model":
        source = "share of router choices that fell otherwise with a margin beyond 5 x the recorded noise"
        document["measures"].append(
            Measure("router flips beyond the noise", view.flip_share, FLIP_SHARE, source).document()
        )
    return document


def _answers(comparison: Comparison, view: View) -> dict[str, Any]:
    limit = comparison.limit
    most = comparison.logprob_limit
    measures = (
        Measure("upper 95 % bound of the mean KL, in nats", view.kl.upper_95, limit.mean_kl, limit.source),
        Measure("mean KL, in nats", view.kl.mean),
        Measure(
            "largest difference of one log-prob, in nats",
            view.largest_logprob_difference,
            most if most < float("inf") else None,
            "10 x the recording chip's own largest, or what was stated for the dtype",
        ),
        Measure("mean shift of probabilities", view.probability_shift.mean),
        Measure("same first token", view.top1),
        Measure("same first token, weighted by margin", view.top1_weighted),
    )
    return {
        "name": view.name,
        "positions": view.kl.num_positions,
        "share_judged": view.share_judged,
        "measures": [measure.document() for measure in measures],
    }


def _finding(finding: dict[str, Any]) -> dict[str, Any]:
    kept = ("verdict", "check", "subject", "message", "measured", "limit", "limit_source")
    return {key: finding[key] for key in kept}


def _blame(comparison: Comparison, judgement: Judgement, beside: Sequence[Replayed]) -> str | None:
    """`files`, `engine`, `chip` or `recording`; None where nothing differs or nobody can tell."""
    cause = judgement.diagnosis.cause
    if judgement.verdict == "PASS":
        return None  # rounding has a first place, too, where it is larger than elsewhere
    if comparison.broke is not None and cause in ("none", "noise"):
        return "engine" if comparison.route == "http" else None
    if cause in ("conversion", "config field"):
        return "files"
    if cause == "operator" and comparison.route != "http":
        return "chip"
    if cause == "engine" and comparison.limit.target in QUANTISED and comparison.transformers is None:
        return _blame_by_others(beside)
    if cause in ("engine", "recording"):
        told = comparison.transformers is not None or comparison.files_checked
        return cause if told else None
    if cause == "length":
        return "engine" if comparison.route == "http" else "chip"
    return None


def _blame_by_others(beside: Sequence[Replayed]) -> str | None:
    """What the same files, quantised within rounding, answered when they were run here; None where they were not."""
    here = [each for each in beside if each.comparison.route != "http" and each.comparison.broke is None]
    verdicts = [each.judgement.verdict for each in here]
    if any(verdict in PASSED for verdict in verdicts):
        return "engine"
    return "files" if "FAIL" in verdicts else None
