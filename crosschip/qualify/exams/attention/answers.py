"""A chip's answers to cases of attention, grouped into findings: what fails, from where on, with a reproducer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from crosschip.qualify.exams.attention.case import AttentionCase, Comparison
from crosschip.qualify.exams.attention.plan import features, smaller_cases, with_length
from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.finding import LEAST_COVERAGE, Finding
from crosschip.qualify.judging.condition import Cause, causes
from crosschip.qualify.reproducing.reproducers import Check, shrink, write_reproducer

__all__ = ["Answer", "Question", "ask_all", "report"]

_SHRINK_S = 1.5
_FLEETING_REPEATS = 300  # of a check whose failure comes and goes
_LENGTHS = ("number of keys", "number of queries")


@dataclass(frozen=True)
class Question:
    """What is asked of every case of a family: `ask(device, case)` raises only what the device raises.

    `is_wrong` is the same question as a check for reproducers. `limit` is what `Comparison.ratio` may reach.
    """

    title: str  # "fused attention"
    check: str  # "masks, lengths and sizes"
    ask: Callable[[Any, AttentionCase], Comparison]
    is_wrong: Callable[..., tuple[bool, str, str]]
    limit_source: str


@dataclass(frozen=True)
class Answer:
    """One case as the chip answered it. `refused` is the error it raised instead."""

    case: AttentionCase
    found: Comparison | None = None
    refused: str | None = None
    traced: bool = False

    @property
    def wrong(self) -> bool:
        """A wrong result without an error."""
        return self.found is not None and not self.found.ratio <= 1


def ask_all(
    context: ExamContext, question: Question, cases: Iterable[tuple[AttentionCase, bool]], until_s: float, used: bool
) -> list[Answer]:
    """Ask cases until the exam's remaining time is down to `until_s`. What the CPU refuses as well does not count.

    `used` says whether the subject uses this way of attention, so that its verdict needs the answers.
    """
    answers: list[Answer] = []
    pending, num_asked = list(dict.fromkeys(cases)), 0
    for case, traced in pending:
        if context.remaining_s < until_s:
            break
        num_asked += 1
        name = f"{question.title} {describe(case)}"
        if name in context.skip:
            continue
        context.journal.now(name)
        answer = _ask(context, question, case, traced)
        if answer is not None:
            answers.append(answer)
    what = f"{question.title}: {question.check}"
    context.journal.covered(what, num_asked, len(pending), LEAST_COVERAGE if used else 0.0)
    context.journal.checked(what, len(answers))
    return answers


def describe(case: AttentionCase) -> str:
    """A case in one line: what differs from the plainest."""
    plain = AttentionCase(way=case.way, dtype=case.dtype)
    shown = [f"{field.name}={getattr(case, field.name)}" for field in fields(case) if field.name not in ("way", "seed")]
    told = ("dtype", "batch", "heads", "queries", "keys", "head_size")
    return " ".join(
        text for text in shown if (name := text.split("=")[0]) in told or getattr(case, name) != getattr(plain, name)
    ) + (f" seed={case.seed}" if case.seed else "")


def _ask(context: ExamContext, question: Question, case: AttentionCase, traced: bool) -> Answer | None:
    refused = None
    try:
        found: Comparison | None = question.ask(context.chip.device, case)
    except Exception as error:  # whatever the chip raises for a case it has not got
        found, refused = None, f"{type(error).__name__}: {error}"
    answer = Answer(case, found, refused, traced)
    if refused is None and not answer.wrong:
        return answer
    try:
        reference = question.ask("cpu", case)
    except Exception:  # torch itself does not take such a call
        return None
    if not reference.ratio <= 1:
        context.journal.not_covered(f"{question.title} {describe(case)}: torch's CPU is off as well ({reference.got})")
        return None
    return answer


def report(
    context: ExamContext, question: Question, answers: list[Answer], used: bool, refusals: bool = True
) -> tuple[bool, bool]:
    """Write the findings: one for each cause of wrong results, one for what the chip refuses (unless that is known).

    Returns whether any was wrong and whether any was refused.

    Wrong without an error fails the role when the subject uses this way of attention, whatever the case: programmes pad
    batches and lengths, and nothing would tell them. Only what a query gets that may see no key at all is nobody's
    result; any finite number there is a limit. A refusal fails the role only when the subject needs the case.
    """
    wrong = [answer for answer in answers if answer.wrong]
    able = {answer.case.values for answer in wrong}  # what could show the failure
    right = [
        features(answer.case) for answer in answers if answer.found and not answer.wrong and answer.case.values in able
    ]
    if wrong and (again := _share_wrong_again(context, question, wrong)) < 0.5:
        _report_wrong(context, question, wrong, _Where("now and then", _smallest(wrong), again), len(answers), used)
    else:
        for cause in causes([features(answer.case) for answer in wrong], right):
            members = [wrong[place] for place in cause.members]
            _report_wrong(context, question, members, _where(context, question, members, cause), len(answers), used)
    refused = [answer for answer in answers if answer.refused is not None]
    taken = [features(answer.case) for answer in answers if answer.refused is None]
    for cause in causes([features(answer.case) for answer in refused], taken) if refusals else []:
        _report_refused(context, question, [refused[place] for place in cause.members], cause, len(answers))
    return bool(wrong), bool(refused)


@dataclass(frozen=True)
class _Where:
    """Where it fails, in words, the smallest case that does, and how likely that one fails when it is asked again."""

    words: str
    smallest: AttentionCase
    again: float = 1.0


def _share_wrong_again(context: ExamContext, question: Question, wrong: list[Answer]) -> float:
    asked = [_ask(context, question, answer.case, traced=False) for answer in wrong[:8]]
    return sum(answer is not None and (answer.wrong or answer.refused is not None) for answer in asked) / len(asked)


def _report_wrong(
    context: ExamContext, question: Question, wrong: list[Answer], where: _Where, num_asked: int, used: bool
) -> None:
    worst = max(wrong, key=_severity)
    assert worst.found is not None
    matters = used and not all(_is_nobodys(answer) for answer in wrong)
    title = f"{question.title} {where.smallest.dtype}"
    fleeting = where.again < 0.5
    context.journal.finding(
        Finding(
            exam=context.exam,
            kind="numerics",
            verdict="FAIL" if matters else "PASS WITH LIMITS",
            subject=title,
            check=question.check,
            message=f"{title} is wrong {where.words}: {len(wrong)} of {num_asked} cases; "
            f"expected {worst.found.expected}, got {worst.found.got}"
            + ("" if used else "; the subject does not use it")
            + ("; the same cases asked again were mostly right" if fleeting else ""),
            measured=worst.found.ratio if math.isfinite(worst.found.ratio) else "not a finite error",
            limit=1.0,
            limit_source=question.limit_source,
            critical=matters,
            severity=_severity(worst) if matters else 1.0,
            reproducer=_reproducer(context, question, where.smallest, f"{title} is wrong {where.words}", fleeting),
            details=_details(wrong, where.words, worst),
        )
    )


def _is_nobodys(answer: Answer) -> bool:
    """Whether the subject would never look at what is wrong: finite results of queries that may see no key."""
    assert answer.found is not None
    return answer.found.is_nobodys and not answer.traced


def _report_refused(
    context: ExamContext, question: Question, refused: list[Answer], cause: Cause, num_asked: int
) -> None:
    needed = [answer for answer in refused if answer.traced]
    worst = (needed or refused)[0]
    title = f"{question.title} {worst.case.dtype}"
    whose = "the subject needs it" if needed else "the subject does not need it"
    context.journal.finding(
        Finding(
            exam=context.exam,
            kind="software",
            verdict="FAIL" if needed else "PASS WITH LIMITS",
            subject=title,
            check="accepted",
            message=f"{title} is refused {cause}: {len(refused)} of {num_asked} cases, {whose}; "
            f"head sizes {worst.case.head_size} (keys) and {worst.case.value_size} (values): {worst.refused}",
            measured=f"{len(refused)} refused",
            limit="every case that the CPU takes",
            limit_source="torch's documentation of scaled_dot_product_attention",
            critical=bool(needed),
            reproducer=_reproducer(context, question, worst.case, f"{title} is refused {cause}"),
            details=_details(refused, str(cause), worst),
        )
    )


def _severity(answer: Answer) -> float:
    return min(1e6, answer.found.ratio) if answer.found is not None else 1.0


def _details(answers: list[Answer], cause: str, worst: Answer) -> dict[str, Any]:
    return {
        "cause": cause,
        "num_cases": len(answers),
        "cases": [describe(answer.case) for answer in answers[:20]],
        "worst": asdict(worst.case),
        "errors": sorted({answer.refused for answer in answers if answer.refused is not None})[:5],
    }


def _where(context: ExamContext, question: Question, wrong: list[Answer], cause: Cause) -> _Where:
    """The cause in words, with the exact length from which on it fails where a length decides."""
    lengths = [each for each in cause.atoms if each.feature in _LENGTHS and each.relation == "more than"]
    shared = {features(answer.case)["mask"] for answer in wrong}
    told = any(each.feature.startswith(("mask", "number of mask")) for each in cause.atoms)
    more = f", all of them with mask {shared.pop()}" if len(shared) == 1 and not told and "none" not in shared else ""
    if not lengths:
        return _Where(f"{cause}{more}", _smallest(wrong))
    feature, right = lengths[0].feature, lengths[0].value
    smallest = min((answer.case for answer in wrong), key=lambda case: (features(case)[feature], _size(case)))
    while features(smallest)[feature] - right > 1 and context.remaining_s > 0:
        middle = with_length(smallest, feature, (right + features(smallest)[feature]) // 2)
        answer = _ask(context, question, middle, traced=False)
        if answer is not None and answer.wrong:
            smallest = middle
        else:
            right = features(middle)[feature]
    others = [str(each) for each in cause.atoms if each is not lengths[0]]
    words = [f"from {feature} {features(smallest)[feature]} on ({right} is right)"] if right > 1 else []
    words += ["where " + " and ".join(others)] if others else [] if words else ["in nearly every case"]
    return _Where(" ".join(words) + more, smallest)


def _smallest(answers: list[Answer]) -> AttentionCase:
    return min((answer.case for answer in answers), key=_size)


def _size(case: AttentionCase) -> int:
    return case.batch * case.heads * case.queries * case.keys * (case.head_size + case.value_size)


def _reproducer(
    context: ExamContext, question: Question, case: AttentionCase, title: str, fleeting: bool = False
) -> str | None:
    if context.remaining_s < -_SHRINK_S:
        return None
    check = Check(question.is_wrong, asdict(case), repeats=_FLEETING_REPEATS if fleeting else 1)
    if not fleeting:
        check = shrink(check, context.chip.device, smaller_cases, limit_s=_SHRINK_S)
    return write_reproducer(
        context, title.replace(" is wrong ", " ").replace("scaled_dot_product_attention", "sdpa"), title, check
    )
