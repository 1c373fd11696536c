"""A model whose own rounding moves its answers by more than the limit: nothing can be said for or against an engine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from crosschip.golden.comparison import Comparison, View
from crosschip.golden.judge import Judgement, judge
from crosschip.golden.limits import limit_for
from crosschip.golden.views import LogProbs, view_of_log_probs

NUM = 400


def view(kl: float) -> View:
    """Answers that differ by `kl` nats at each position."""
    zeros = np.zeros(NUM)
    same = np.zeros(NUM, dtype=np.int64)
    compared = LogProbs(np.full(NUM, kl) * np.linspace(0.9, 1.1, NUM), zeros, zeros, same, same, np.ones(NUM))
    return view_of_log_probs("one by one", compared, np.zeros(NUM, dtype=np.int64), np.ones(NUM, dtype=bool))


def judged(kl: float, noise: float, dtype: str = "bfloat16") -> Judgement:
    target = "bf16 to bf16" if dtype == "bfloat16" else "fp32 to fp32"
    floor = {"mean_kl": noise, "logprob": 1.0, "router_margin": 0.0, "loss": 0.0, "gradient_norm": 0.0, "points": {}}
    comparison = Comparison("http", "an engine", dtype, limit_for(target, dtype, noise), floor, [view(kl)])
    return judge(replace(comparison, rows_planned=1, rows_made=1))


def test_within_its_own_noise_it_is_inconclusive_and_says_what_to_do() -> None:
    judgement = judged(kl=8e-3, noise=5e-3)
    assert judgement.verdict == "INCONCLUSIVE"
    assert judgement.diagnosis.cause == "noise"
    assert "hand it off in float32" in judgement.findings[0]["message"]


@pytest.mark.parametrize(
    ("kl", "noise", "dtype"),
    [
        (5e-2, 5e-3, "bfloat16"),  # beyond five times the noise
        (8e-3, 1e-4, "bfloat16"),  # the noise is small
        (8e-3, 5e-3, "float32"),  # in fp32 the limit does not come from the noise
    ],
)
def test_what_noise_does_not_explain_fails(kl: float, noise: float, dtype: str) -> None:
    assert judged(kl, noise, dtype).verdict == "FAIL"


def test_below_the_limit_it_passes_whatever_the_noise() -> None:
    assert judged(kl=5e-4, noise=5e-3).verdict == "PASS"
