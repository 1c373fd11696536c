"""Router choices: near-ties excuse what comes after them, and a flip with a margin is an error."""

from __future__ import annotations

import numpy as np

from crosschip.golden.flips import NO_FLIP, RouterChoices, judge_flips
from crosschip.golden.limits import limit_for
from crosschip.golden.views import LogProbs, near_ties, view_of_log_probs

ROWS = np.array([0, 0, 0, 1, 1])


def choices(ids: list[int], margins: list[float]) -> RouterChoices:
    return RouterChoices({2: np.array(ids)[:, None]}, {2: np.array(margins)})


def test_a_near_tie_excuses_its_row_from_there_on() -> None:
    reference = choices([0, 0, 0, 0, 0], [1.0, 1e-6, 1.0, 1.0, 1.0])
    flips = judge_flips(reference, choices([0, 1, 0, 0, 0], [1.0, 1e-6, 1.0, 1.0, 1.0]), ROWS, 1e-3)
    assert flips.excused_from.tolist() == [NO_FLIP, 2, 2, NO_FLIP, NO_FLIP]
    assert (flips.num_flips, flips.unexplained, flips.worst) == (1, 0, None)


def test_a_flip_with_a_margin_is_counted_and_named() -> None:
    reference = choices([0, 0, 0, 0, 0], [1.0, 0.5, 1.0, 0.25, 1.0])
    flips = judge_flips(reference, choices([0, 1, 0, 1, 0], [1.0] * 5), ROWS, 1e-3)
    assert (flips.num_flips, flips.judged, flips.unexplained) == (2, 5, 2)
    assert flips.worst == (2, 1, 0.5)
    assert flips.excused_from.tolist() == [NO_FLIP] * 5


def test_near_ties_are_told_without_the_other_runs_choices() -> None:
    arrays = {
        "router_ids/layers.2": np.zeros((5, 1), dtype=np.int16),
        "router_margin/layers.2": np.array([1.0, 1e-6, 1.0, 1.0, 1.0]),
    }
    assert near_ties(arrays, 1e-3).tolist() == [False, True, False, False, False]
    assert near_ties({"top1_id": np.zeros(5)}, 1e-3).tolist() == [False] * 5


def test_few_positions_that_are_left_are_not_judged_alone() -> None:
    """Where near-ties excuse nearly everything, everything is judged: nothing passes for lack of evidence."""
    number = 400
    kl = np.full(number, 1.0)
    kl[:10] = 0.0
    zeros, ids = np.zeros(number), np.zeros(number, dtype=np.int64)
    log_probs = LogProbs(kl, zeros, zeros, ids, ids, zeros)
    rows, clean = np.zeros(number, dtype=np.int64), kl == 0.0
    assert view_of_log_probs("few", log_probs, rows, clean).kl.mean > 0.9
    many = np.arange(number) < 150
    assert view_of_log_probs("many", log_probs, rows, many).kl.num_positions == 150


def test_the_limits_are_those_that_were_stated() -> None:
    assert limit_for("fp32 to fp32", "float32", 1e-3).mean_kl == 1e-6
    assert [limit_for("bf16 to bf16", "bfloat16", floor).mean_kl for floor in (1e-6, 1e-4, 1e-2)] == [1e-4, 5e-4, 1e-3]
    assert limit_for("q8_0", "float32", 0.0).mean_kl == 3e-3
