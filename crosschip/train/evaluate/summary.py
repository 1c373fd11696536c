"""The figures of an evaluation: shares with their intervals, pass@k, lengths. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

import numpy as np

from crosschip.intervals import bootstrap_mean, wilson_interval
from crosschip.train.evaluate.judging import Answered

__all__ = ["pass_at_k", "summarise"]


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """The chance that of k answers at least one is right: the unbiased estimator of arXiv 2107.03374, equation 1.

    1 - C(n - c, k) / C(n, k) as a product, which does not overflow.
    """
    assert 0 <= num_right <= num_samples >= k >= 1, (num_samples, num_right, k)
    if num_samples - num_right < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(num_samples - num_right + 1, num_samples + 1)))


def summarise(
    greedy: Sequence[Answered], drawn: Sequence[Sequence[Answered]], pass_at: Sequence[int], seed: int
) -> dict[str, Any]:
    """The document's figures. `drawn` holds each problem's drawn answers, or nothing where only greedy ones are.

    `pass_at_k` is of the drawn answers, and of the greedy ones where there are no others (then k is 1).
    """
    num_asked, num_right = len(greedy), sum(answer.right for answer in greedy)
    low, high = wilson_interval(num_right, num_asked)
    errors = [answer.error for answers in (greedy, *drawn) for answer in answers if answer.error is not None]
    summary: dict[str, Any] = {
        "num_problems": num_asked,
        "num_right": num_right,
        "score": num_right / num_asked,
        "score_low_95": low,
        "score_high_95": high,
        **_form(greedy),
        "pass_at_k": [_pass_at(drawn or [[answer] for answer in greedy], k, seed) for k in sorted(set(pass_at))],
        "num_checker_errors": len(errors),
        "first_checker_error": errors[0] if errors else None,
        "pass_at_k_of": "drawn answers" if drawn else "greedy answers",
    }
    if drawn:
        every = [answer for answers in drawn for answer in answers]
        num_drawn_right = sum(answer.right for answer in every)
        summary["drawn"] = {"num_answers": len(every), "num_right": num_drawn_right, **_form(every)}
    return summary


def _pass_at(answers: Sequence[Sequence[Answered]], k: int, seed: int) -> dict[str, Any]:
    values = [pass_at_k(len(each), sum(answer.right for answer in each), k) for each in answers]
    low, high = bootstrap_mean(values, seed)
    return {"k": k, "value": float(np.mean(values)), "low_95": low, "high_95": high}


def _form(answers: Sequence[Answered]) -> dict[str, float]:
    """How the answers look, right or not; lengths in tokens."""
    reasoning = [answer.num_reasoning_tokens for answer in answers]
    rest = [answer.num_tokens - answer.num_reasoning_tokens for answer in answers]
    return {
        "closed_reasoning_share": fmean(answer.closed for answer in answers),
        "finished_share": fmean(answer.finished for answer in answers),
        "mean_num_tokens": fmean(answer.num_tokens for answer in answers),
        "mean_reasoning_tokens": fmean(reasoning),
        "median_reasoning_tokens": float(median(reasoning)),
        "mean_answer_tokens": fmean(rest),
        "median_answer_tokens": float(median(rest)),
    }
