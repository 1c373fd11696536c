"""A model whose own rounding moves its answers by more than the limit: nothing can be said for or against an engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

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


def compared(kl: float, noise: float, dtype: str, **changes: Any) -> Comparison:
    target = "bf16 to bf16" if dtype == "bfloat16" else "fp32 to fp32"
    floor = {"mean_kl": noise, "logprob": 1.0, "router_margin": 0.0, "loss": 0.0, "gradient_norm": 0.0, "points": {}}
    comparison = Comparison(
        "http", "an engine", dtype, limit_for(target, dtype, noise), floor, [replace(view(kl), **changes)]
    )
    return replace(comparison, rows_planned=1, rows_made=1)


def judged(kl: float, noise: float, dtype: str = "bfloat16", **changes: Any) -> Judgement:
    return judge(compared(kl, noise, dtype, **changes))


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


def test_one_log_prob_beyond_its_own_limit_fails_and_the_message_is_about_it() -> None:
    judgement = judged(kl=8e-3, noise=5e-3, largest_logprob_difference=12.0)  # ten times the recorded 1.0 are allowed
    assert (judgement.verdict, judgement.diagnosis.cause) == ("FAIL", "engine")
    words = "one log-prob is off by 1.20e+01 nats, limit 1.00e+01"
    assert words in judgement.diagnosis.words
    assert judgement.findings[0]["message"].count(words) == 1
    assert "cannot tell" not in judgement.findings[0]["message"]
    mean = next(each for each in judgement.findings if each["check"].startswith("mean KL"))
    assert (mean["verdict"], "cannot tell" in mean["message"]) == ("INCONCLUSIVE", True)


@pytest.mark.parametrize(("in_transformers", "cause"), [(0.5, "engine"), (12.0, "recording")])
def test_in_noise_the_same_files_elsewhere_are_asked_for_single_log_probs(in_transformers: float, cause: str) -> None:
    other = replace(view(8e-3), largest_logprob_difference=in_transformers)
    judgement = judge(replace(compared(8e-3, 5e-3, "bfloat16", largest_logprob_difference=12.0), transformers=other))
    assert (judgement.verdict, judgement.diagnosis.cause) == ("FAIL", cause)
    assert "one log-prob is off by 1.20e+01 nats" in judgement.diagnosis.words


def test_a_log_prob_alone_is_a_cause_where_the_mean_is_within_its_limit() -> None:
    judgement = judged(kl=1e-8, noise=1e-9, dtype="float32", largest_logprob_difference=12.0)
    assert (judgement.verdict, judgement.diagnosis.cause) == ("FAIL", "engine")
    assert "nothing differs" not in judgement.findings[0]["message"]


def test_router_choices_beyond_their_share_are_the_cause_in_noise_as_well() -> None:
    flips = {"judged_choices": 100, "unexplained_flips": 5, "worst_flip": "layers.1 by 0.2"}
    judgement = judged(kl=8e-3, noise=5e-3, **flips)
    assert judgement.verdict == "FAIL"
    assert "layers.1 by 0.2" in judgement.diagnosis.words


def test_what_one_way_of_running_shows_is_not_explained_by_the_noise_of_another() -> None:
    judgement = judge(replace(compared(8e-3, 5e-3, "bfloat16"), views=[view(8e-3), view(5e-2)]))
    assert (judgement.verdict, judgement.diagnosis.cause) == ("FAIL", "engine")


def test_below_the_limit_it_passes_whatever_the_noise() -> None:
    assert judged(kl=5e-4, noise=5e-3).verdict == "PASS"
