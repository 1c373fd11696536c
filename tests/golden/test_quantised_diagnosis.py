"""A quantised model beyond its limit: its layers all differ, so that none of them tells who is to blame."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest

from crosschip.golden.comparison import Comparison, PointDistance
from crosschip.golden.judge import judge
from crosschip.golden.limits import limit_for
from crosschip.golden.views import LogProbs, view_of_log_probs

LIMIT = limit_for("q8_0", "float32", 0.0)
NUM = 200


def compared(route: Literal["model", "http"], kl: float) -> Comparison:
    """Four rows, each 20 times as far off in its activations as in fp32 may be, from position 16 on."""
    rows = np.repeat(np.arange(4), NUM // 4)
    zeros, same = np.zeros(NUM), np.zeros(NUM, dtype=np.int64)
    answers = LogProbs(np.full(NUM, kl) * np.linspace(0.9, 1.1, NUM), zeros, zeros, same, same, np.ones(NUM))
    seen: tuple[Any, ...] = ()
    if route == "model":
        seen = (np.full(4, 20.0), np.tile(np.arange(NUM // 4) >= 16, 4))
    view = view_of_log_probs("one by one", answers, rows, np.ones(NUM, dtype=bool), *seen)
    if route == "model":
        view = replace(view, points=[PointDistance("layers.0.self_attn", 8e-3, 0.0, 0.0, 4e-4, 1e-5, NUM)])
    floor = {"mean_kl": 0.0, "logprob": 1.0, "router_margin": 0.0, "loss": 0.0, "gradient_norm": 0.0, "points": {}}
    return Comparison(route, "cpu", "float32", LIMIT, floor, [view], rows_planned=4, rows_made=4)


def test_within_its_limit_nothing_is_the_cause() -> None:
    judgement = judge(compared("model", LIMIT.mean_kl / 10))
    assert (judgement.verdict, judgement.diagnosis.cause) == ("PASS", "none")


def test_beyond_its_limit_it_is_the_quantisation_and_no_layer_of_the_chip() -> None:
    judgement = judge(compared("model", 10 * LIMIT.mean_kl))
    assert (judgement.verdict, judgement.diagnosis.cause, judgement.diagnosis.subject) == ("FAIL", "conversion", "q8_0")
    assert "look at how the model was quantised" in judgement.diagnosis.words


@pytest.mark.parametrize("is_checked", [True, False])
def test_over_http_the_engine_is_not_the_only_one_that_may_be_it(is_checked: bool) -> None:
    judgement = judge(replace(compared("http", 10 * LIMIT.mean_kl), files_checked=is_checked))
    assert (judgement.verdict, judgement.diagnosis.cause) == ("FAIL", "engine")
    assert "may be the cause as well" in judgement.diagnosis.words
