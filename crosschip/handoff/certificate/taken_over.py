"""Gates that others went through, read from the documents they left: answers, generation health, write-read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from crosschip.certificate.document import VERDICTS, check_readable
from crosschip.checkpoints import VERDICT_FILE
from crosschip.errors import HandoffError, RunDirectoryError
from crosschip.handoff.answers.identity import weights_hash
from crosschip.handoff.certificate.gate import Gate, Measure, not_covered, plain
from crosschip.rundir import read_json

__all__ = ["answer_gates", "bound_answer_gates", "summarised", "write_read_gate"]

_ANSWERS, _HEALTH, _WRITE_READ = "answer-level scores", "generation health", "write-read"
_TASKS_OF_HEALTH = ("format", "length")
_UNHEALTHY = {
    "num_reasoning_open": "answers whose reasoning does not end",
    "num_without_one_answer": "answers that are none, or several",
    "num_loops": "answers that end in a loop",
    "num_not_utf8": "answers with broken characters",
}


def answer_gates(report: dict[str, Any] | None) -> list[Gate]:
    """Two gates from the report of a paired comparison of answers, or none.

    Raises:
        HandoffError: the document has another form.
    """
    if report is None:
        return []
    try:
        tasks = [(str(each["task"]), each) for each in report["tasks"]]
        scores = [_task(each) for name, each in tasks if name not in _TASKS_OF_HEALTH]
        health = [_task(each) for name, each in tasks if name in _TASKS_OF_HEALTH]
        verdict = str(report["verdict"])
        gates = [_scores(verdict, scores, [str(words) for words in report["not_covered"]])]
        return [*gates, _health(report["a"]["health"], report["b"]["health"], health)]
    except (KeyError, TypeError, ValueError, OverflowError) as error:  # the last: 1e999 is no count
        raise HandoffError(
            f"the report of answers has another form: {type(error).__name__}: {error}",
            "make it again with `crosschip handoff compare A B --json FILE`",
        ) from None


def summarised(report: dict[str, Any]) -> dict[str, Any]:
    """A report of answers as it stands in a certificate: without each single outcome, with the hash of the whole.

    Raises:
        HandoffError: what is left is too large or too deep for a certificate.
    """
    kept = {key: value for key, value in report.items() if key != "outcomes"}
    try:
        check_readable(plain(kept), "the report of answers")
        as_written = json.dumps(report, indent=2, ensure_ascii=False) + "\n"  # as `handoff compare --json` does
    except RecursionError:
        raise HandoffError("the report of answers is nested too deep for a certificate", "make it again") from None
    return {**kept, "report_sha256": hashlib.sha256(as_written.encode(errors="backslashreplace")).hexdigest()}


def bound_answer_gates(
    report: dict[str, Any] | None,
    directory: Path,
    source: Path | None,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Gate]:
    """As `answer_gates`, for the certificate of `directory`: a report whose B has other weights covers nothing.

    Args:
        report: the document of the comparison.
        directory: the files that are certified.
        source: the directory that they were made from; None where it is not at hand.
        tell: hears how far the hashing is.

    Raises:
        HandoffError: the document has another form.
    """
    gates = answer_gates(report)
    if report is None:
        return gates
    before, after = _Side("A", report["a"]), _Side("B", report["b"])
    unseen = [words for words in (before.unknown, after.unknown) if words is not None]
    if after.unknown is None and after.weights != weights_hash(directory, tell):
        why = f"the report is about {after.words}, and the weights certified here are other files"
        if after.weights is None:
            why = f"the report is about {after.words} and does not hold a hash of its weights: make it again"
        return [not_covered(gate.name, why) for gate in gates]
    if before.unknown is None and source is None:
        unseen.append(f"{before.words}: the source is not at hand, to tell whether it is that")
    elif before.unknown is None and source is not None and before.weights != weights_hash(source, tell):
        unseen.append(f"{before.words}: its weights are other files than the source's")
    return [replace(gate, not_covered=[*gate.not_covered, *unseen]) for gate in gates]


class _Side:
    """One side of a report: `weights` is the hash of a directory's, `unknown` says why an address has none."""

    def __init__(self, name: str, side: dict[str, Any]) -> None:
        target = str(side.get("target"))
        self.words = f"{name} = {target}"
        self.weights = side.get("weights")
        is_address = target.startswith(("http://", "https://"))
        self.unknown = f"{self.words}: which files answered at an address is not known" if is_address else None


def write_read_gate(checkpoint: Path) -> Gate | None:
    """Whether the chip that saved a checkpoint read it back to the loss of the saving step; None if nobody looked."""
    try:
        document = read_json(checkpoint / VERDICT_FILE)
    except RunDirectoryError:
        return None
    found = document if isinstance(document, dict) else {}
    loss, words = found.get("loss"), str(found.get("detail"))
    measures = []
    match loss:  # without an expected number training did not believe its own
        case {
            "found": int() | float() as value,
            "expected": int() | float() as wanted,
            "limit": int() | float() as limit,
        }:
            source = "0 where every bit must be the same, else what honest rounding explains"
            measures.append(Measure("difference of the loss, in nats", abs(value - wanted), limit, source))
    if found.get("verdict") == "wrong":
        return Gate(_WRITE_READ, "FAIL", words, str(checkpoint), measures)
    if found.get("verdict") != "right":
        return not_covered(_WRITE_READ, words)
    left_out = [] if measures else ["the loss after reading back: it was not compared"]
    return Gate(_WRITE_READ, "PASS", words, None, measures, left_out)


def _task(result: dict[str, Any]) -> tuple[str, Measure]:
    """A task's verdict, and its difference with its margin."""
    if result["verdict"] not in VERDICTS:
        raise ValueError(f"a verdict is {result['verdict']!r}")
    detectable = result["smallest_detectable"]
    source = "the margin that was stated before" + (
        "" if detectable is None else f"; the smallest difference that would have been seen is {detectable:.3g}"
    )
    measure = Measure(f"{result['task']}, B - A", float(result["difference"]), float(result["margin"]), source)
    return str(result["verdict"]), measure


def _scores(verdict: str, tasks: list[tuple[str, Measure]], left_out: list[str]) -> Gate:
    if verdict not in VERDICTS:
        raise ValueError(f"the verdict is {verdict!r}")
    if not tasks:
        return not_covered(_ANSWERS, "the report holds no task with answers")
    words = ", ".join(f"{measure.what} {measure.value:+.3g}: {of_task}" for of_task, measure in tasks)
    return Gate(_ANSWERS, verdict, words, None, [measure for _, measure in tasks], left_out)


def _health(before: dict[str, Any], after: dict[str, Any], tasks: list[tuple[str, Measure]]) -> Gate:
    """Judged by the tasks that test it pair by pair; the counts are reported."""
    number = int(after["num_replies"])
    measures = [measure for _, measure in tasks]
    measures += [Measure(f"{words}, of {number}", int(after[key])) for key, words in _UNHEALTHY.items()]
    counts = ", ".join(f"{int(after[key])} {words} (before: {int(before[key])})" for key, words in _UNHEALTHY.items())
    if not tasks:
        return Gate(_HEALTH, "PASS WITH LIMITS", f"reported, not judged: {counts}", None, measures)
    verdict = min((of_task for of_task, _ in tasks), key=VERDICTS.index)
    return Gate(_HEALTH, verdict, counts, None, measures)
