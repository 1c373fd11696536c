"""Held-out problems as the page shows them: the score with its interval, examples, before and after handoff."""

from __future__ import annotations

from dataclasses import dataclass

from crosschip.intervals import wilson_interval
from crosschip.report.documents import Document, objects
from crosschip.report.figures import count, percent

__all__ = ["AgreementView", "Answer", "EvaluationView", "score_sentence", "view_agreement", "view_evaluation"]

MAX_RIGHT, MAX_WRONG = 4, 8
MAX_CHARACTERS = 2000


@dataclass(frozen=True)
class Answer:
    """One problem and what the model said. `reasoning` is `None` when it showed none."""

    question: str
    reasoning: str | None
    answer: str
    expected: str
    cut_off: bool


@dataclass(frozen=True)
class EvaluationView:
    """The score, its interval for the bar (in percent), examples, the share by group of problems, and `details`.

    `details` are (what, value, note) of pass@k and lengths; a document of version 1 has none.
    """

    sentence: str
    score_percent: float
    low_percent: float
    high_percent: float
    score: str
    interval: str
    right: list[Answer]
    wrong: list[Answer]
    num_right: int
    num_wrong: int
    groups: list[tuple[str, str, str]]
    details: list[tuple[str, str, str]]


@dataclass(frozen=True)
class AgreementView:
    """Greedy answers before and after the handoff, side by side."""

    sentence: str
    share: str
    unit: str
    all_same: bool
    rows: list[tuple[str, str, str]]  # (what, before, after)
    differences: list[Document]


def _split(text: str) -> tuple[str | None, str]:
    """Reasoning and answer of `<think>...</think>answer`; without the closing tag everything is reasoning."""
    if "<think>" not in text:
        return None, text.strip()
    reasoning, _, answer = text.partition("<think>")[2].partition("</think>")
    return reasoning.strip(), answer.strip()


def _answer(row: Document) -> Answer:
    reasoning, answer = _split(str(row.get("text", row.get("answer", ""))))
    if row.get("reasoning") is not None:
        reasoning = str(row["reasoning"])
    return Answer(
        question=str(row.get("question", ""))[:MAX_CHARACTERS],
        reasoning=None if reasoning is None else reasoning[:MAX_CHARACTERS],
        answer=answer[:MAX_CHARACTERS],
        expected=str(row.get("expected", "")),
        cut_off=row.get("finished") is False,
    )


def score_sentence(num_right: int, num_asked: int) -> str:
    """`174 of 200 right: 87 % (82-91 %)`, for the page and the terminal."""
    low, high = wilson_interval(num_right, num_asked)
    interval = f"{percent(low, 0)} to {percent(high, 0)}"
    share = num_right / num_asked if num_asked else 0.0
    return f"{count(num_right)} of {count(num_asked)} right, {percent(share)} (95 % interval {interval})"


def _groups(rows: list[Document]) -> list[tuple[str, str, str]]:
    """(group, right of asked, share) when the problems differ in level or kind."""
    for key in ("kind", "level"):
        names = sorted({str(row[key]) for row in rows if key in row})
        if len(names) > 1:
            members = [(name, [row for row in rows if str(row.get(key)) == name]) for name in names]
            right = [(name, sum(bool(row.get("right")) for row in group), len(group)) for name, group in members]
            return [(f"{key} {name}", f"{num} of {asked}", percent(num / asked)) for name, num, asked in right]
    return []


def _details(document: Document) -> list[tuple[str, str, str]]:
    found = []
    for each in objects(document, "pass_at_k") if "drawn" in document else []:
        interval = f"95 % interval {percent(each['low_95'], 0)} to {percent(each['high_95'], 0)}"
        found.append(
            (f"pass@{each['k']}", percent(each["value"]), f"of {document['samples']} drawn answers; {interval}")
        )
    for what in ("reasoning", "answer"):
        if f"mean_{what}_tokens" in document:
            middle = f"median {document[f'median_{what}_tokens']:g}"
            found.append((f"{what} length", f"{document[f'mean_{what}_tokens']:.0f} tokens", middle))
    if found and "closed_reasoning_share" in document:
        found.append(("reasoning closed", percent(document["closed_reasoning_share"]), "of greedy answers"))
    return found


def view_evaluation(document: Document | None) -> EvaluationView | None:
    """The view of evaluation.json, or `None` when there is none or it holds no problems."""
    rows = objects(document, "problems")
    if not rows:
        return None
    right = [row for row in rows if row.get("right")]
    wrong = [row for row in rows if not row.get("right")]
    low, high = wilson_interval(len(right), len(rows))
    return EvaluationView(
        sentence=score_sentence(len(right), len(rows)),
        score_percent=100 * len(right) / len(rows),
        low_percent=100 * low,
        high_percent=100 * high,
        score=percent(len(right) / len(rows)),
        interval=f"{percent(low, 0)} to {percent(high, 0)}",
        right=[_answer(row) for row in right[:MAX_RIGHT]],
        wrong=[_answer(row) for row in wrong[:MAX_WRONG]],
        num_right=len(right),
        num_wrong=len(wrong),
        groups=_groups(rows),
        details=_details(document or {}),
    )


def view_agreement(document: Document | None) -> AgreementView | None:
    """The view of `agreement` in voyage.json: the same questions before and after the model was handed off."""
    agreement = (document or {}).get("agreement")
    if not isinstance(agreement, dict) or not agreement.get("num_asked"):
        return None
    asked, same = int(agreement["num_asked"]), int(agreement.get("num_same", 0))
    compared = str(agreement.get("compared", "text"))
    sentence = f"{count(same)} of {count(asked)} greedy answers are the same, {compared} by {compared}"
    rows = [("right", count(agreement.get("num_right_before", 0)), count(agreement.get("num_right_after", 0)))]
    if "num_tokens_before" in agreement:
        rows.append(
            ("tokens", count(agreement.get("num_tokens_before", 0)), count(agreement.get("num_tokens_after", 0)))
        )
    rows += [(str(name), str(before), str(after)) for name, before, after in agreement.get("sides", [])]
    share = f"{count(same)} of {count(asked)}"
    return AgreementView(sentence, share, compared, same == asked, rows, objects(agreement, "differences"))
