"""The error ratio of attention on a chip, judged as that of any operator: pooled draws, confidence, bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from crosschip.qualify.exams.attention.accuracy import (
    accuracy_inputs,
    attention_errs_too_much,
    exact_answer,
    honest_answers,
)
from crosschip.qualify.exams.attention.answers import describe
from crosschip.qualify.exams.attention.case import AttentionCase, attend_on
from crosschip.qualify.exams.attention.plan import smaller_cases
from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.finding import LEAST_COVERAGE, Finding, Verdict
from crosschip.qualify.judging.judge import BIAS_LIMIT, RATIO_LIMIT, DrawErrors, Judgement, errors_of, judge_draws
from crosschip.qualify.reproducing.reproducers import Check, shrink, write_reproducer

__all__ = ["judge_attention"]

_ROUNDS = 4  # the draws are doubled up to four times while the judgement is open
_CHECK = "error ratio"


def judge_attention(
    context: ExamContext, title: str, cases: Sequence[AttentionCase], used: bool, until_s: float, known_wrong: bool
) -> None:
    """Judge each case, and report the worst that is not passed. What is known to be wrong is not reported again."""
    judged: list[tuple[AttentionCase, Judgement]] = []
    num_asked = 0
    for case in cases:
        if context.remaining_s < until_s:
            break
        num_asked += 1
        context.journal.now(f"{title}: error of {describe(case)}")
        try:
            judged.append((case, _judge(context, case)))
        except _RefusedError as error:
            context.journal.not_covered(f"{title}: error ratio of {describe(case)}: {error}")
    context.journal.covered(f"{title}: {_CHECK}", num_asked, len(cases), LEAST_COVERAGE if used else 0.0)
    context.journal.checked(f"{title}: {_CHECK}", len(judged))
    for case, judgement in judged:
        context.journal.measured(
            operator=title, case=describe(case), check=_CHECK, ratio=judgement.ratio,
            lower=judgement.lower, upper=judgement.upper, num_draws=judgement.num_draws,
        )  # fmt: skip
    by_verdict: dict[Verdict, list[tuple[AttentionCase, Judgement]]] = {}
    for pair in judged:
        verdict = _verdict(pair[1], used)
        by_verdict.setdefault(verdict, []).append(pair)
    for verdict, pairs in by_verdict.items():
        if verdict != "PASS" and not known_wrong:
            _report(context, title, pairs, verdict, used)


def _verdict(judgement: Judgement, used: bool) -> Verdict:
    if judgement.state in ("open", "abstain"):
        return "INCONCLUSIVE"
    if judgement.state == "fail" and used:
        return "FAIL"
    return "PASS WITH LIMITS" if judgement.reason else "PASS"


class _RefusedError(Exception):
    """The chip raised for a case; the family of masks and sizes has reported that."""


def _judge(context: ExamContext, case: AttentionCase) -> Judgement:
    draws: list[DrawErrors] = []
    for number in range(_ROUNDS):
        for seed in range(len(draws) // case.batch, max(1, 2 * len(draws) // case.batch)):
            draws += _draws(context, AttentionCase(**{**asdict(case), "seed": case.seed + seed}))
        judgement = judge_draws(draws)
        if judgement.state != "open" or context.remaining_s < 0 or number == _ROUNDS - 1:
            break
    return judgement


def _draws(context: ExamContext, case: AttentionCase) -> list[DrawErrors]:
    inputs = accuracy_inputs(case)
    try:
        answer = attend_on(context.chip.device, case, inputs)
    except Exception as error:  # whatever the chip raises
        raise _RefusedError(f"{type(error).__name__}: {error}") from error
    golden, honest = exact_answer(case, inputs), honest_answers(case, inputs)
    if answer.shape != golden.shape:
        raise _RefusedError(f"an answer of shape {list(answer.shape)}")
    dtype = getattr(torch, case.dtype)
    limits = torch.finfo(dtype)

    def array(tensor: torch.Tensor, row: int) -> Any:
        return tensor[row].double().numpy()

    made = [
        errors_of(
            f"{describe(case)}, row {row}",
            array(answer, row),
            array(golden, row),
            array(golden.to(dtype), row),
            {name: array(each, row) for name, each in honest.items()},
            limits.eps,
            limits.tiny,
        )
        for row in range(case.batch)
    ]
    return [each for each in made if each is not None]


def _report(
    context: ExamContext, title: str, pairs: list[tuple[AttentionCase, Judgement]], verdict: Verdict, used: bool
) -> None:
    case, judgement = max(pairs, key=lambda pair: pair[1].ratio or 0.0)
    words = {
        "ratio": f"its error is {judgement.ratio or 0:.3g} times the worst honest one",
        "bias": "its error leans to one side",
        "slight bias": "its error leans to one side, by too little to matter for a training",
        "outlier": f"single numbers are off by {judgement.gross:.3g} times what they may be",
        "tail": f"its tail of errors is {judgement.tail or 0:.3g} times the honest one",
    }
    said = words.get(judgement.reason, f"the judgement stays open ({judgement.reason})")
    name = f"{title} {case.dtype}"
    reproducer = None
    if verdict != "INCONCLUSIVE":
        parameters = {"limit": RATIO_LIMIT, "bias_limit": BIAS_LIMIT, **asdict(case)}
        check = shrink(Check(attention_errs_too_much, parameters), context.chip.device, smaller_cases, limit_s=1.5)
        reproducer = write_reproducer(context, f"error-of-{name}", f"{name}: {said}", check)
    context.journal.finding(
        Finding(
            exam=context.exam,
            kind="numerics",
            verdict=verdict,
            subject=name,
            check=_CHECK,
            message=f"{name}: {said}, in {len(pairs)} kinds of calls; worst: {describe(case)}",
            measured=judgement.ratio,
            limit=RATIO_LIMIT,
            limit_source="the worst of four honest implementations of attention in the same dtype, against fp64",
            critical=used,
            severity=(judgement.ratio or 0.0) / RATIO_LIMIT,
            reproducer=reproducer,
            details={
                "reason": judgement.reason,
                "lower": judgement.lower,
                "upper": judgement.upper,
                "num_draws": judgement.num_draws,
                "cases": [describe(each) for each, _ in pairs],
            },
        )
    )
