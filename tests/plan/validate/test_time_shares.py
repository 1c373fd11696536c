"""The share of time that trains: what stops leave of a run on one cluster, what of a round over thin links computes."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crosschip.plan.counts import num_parameters
from crosschip.plan.failures import expected_goodput, published_rates, simulate, usual_recovery
from crosschip.plan.step_time import estimate_step
from crosschip.plan.validate import Row, read_rows, validate_rows
from crosschip.plan.validate.cases import CannotPredict, case_of
from crosschip.plan.validate.predicting import choose_layout, predicted_value
from crosschip.plan.validate.rows import OUTCOMES, TIME_SHARE
from crosschip.plan.validate.stops import is_of_stops, stopped_run, training_shares
from tests.plan.validate.test_validation import by_id, cells, written

STOPS, GROUPS = "llama3_405b_54d", "intellect1_share"


def row(name: str, **changes: Any) -> Row:
    return replace(next(row for row, _ in read_rows() if row.id == name), **changes)


def median(num_chips: int) -> float:
    return training_shares(stopped_run(row(STOPS, num_chips=num_chips)))[1]


def test_what_stops_leave_is_what_the_closed_form_leaves() -> None:
    """With the rates at their median and no host that waits for a spare, whatever the number of chips."""
    rates = published_rates()
    for num_chips in (1024, 16_384):
        recovery = usual_recovery(rates, num_chips, 8)
        between_s = rates.hours_between_stops(num_chips)[1] * 3600
        lost_s = recovery.mean_stop_s + recovery.save_lag_s
        expected = expected_goodput(recovery.interval_s, recovery.save_blocking_s, lost_s, between_s)
        # Silent corruption, an hour each, is in the simulation and not in the closed form.
        corrupted = rates.corruption_per_day.mean * recovery.corruption_caught * num_chips * 3600 / 86_400
        assert median(num_chips) == pytest.approx(100 * expected, abs=100 * corrupted + 1.0)


def test_more_chips_train_for_less_of_the_time() -> None:
    shares = [median(number) for number in (8, 1024, 16_384, 100_000)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 98.0
    assert shares[-1] < 80.0


def test_a_runs_days_hardly_move_the_share() -> None:
    """What lets the published days, an outcome, go unread."""
    rates = published_rates()
    recovery = usual_recovery(rates, 16_384, 8)
    found = []
    for days in (1, 54, 120):
        ledger = simulate(rates.sample(1000, 0), 16_384, recovery, work_s=days * 86_400.0)
        found.append(100 * float(np.median(ledger.goodput)))
    assert max(found) - min(found) < 0.5


def test_no_outcome_moves_a_share(tmp_path: Path) -> None:
    given = cells((STOPS, GROUPS, "sparseloco8b", "hsdp_100k"))
    honest = by_id(validate_rows(read_rows(written(tmp_path / "a.csv", given))))
    blinded = by_id(
        validate_rows(
            read_rows(written(tmp_path / "b.csv", [{**each, **dict.fromkeys(OUTCOMES, "12")} for each in given]))
        )
    )
    assert {key: each["predicted"] for key, each in honest.items()} == {
        key: each["predicted"] for key, each in blinded.items()
    }
    assert all(each["published"] == 12.0 for each in blinded.values())
    assert not {field.name for field in fields(Row)} & {TIME_SHARE}


def test_a_round_of_groups_computes_but_for_its_exchange() -> None:
    case = case_of(row(GROUPS))
    case, layout = choose_layout(case, case.hardware)
    estimate = estimate_step(case.job, layout, case.hardware)
    link = case.job.thin_link
    assert link is not None
    exchange_s = link.exchange_s(num_parameters(case.job.architecture), layout.groups)
    computing_s = link.sync_every * (estimate.step_s - estimate.parts["outer step"])
    expected = 100 * computing_s / (computing_s + exchange_s)
    assert predicted_value(case, layout, case.hardware) == pytest.approx(expected)
    # The control: rarer exchanges leave more, the same run in bf16 less.
    rarer = case_of(row(GROUPS, parallelism="DiLoCo H=500 x FSDP2"))
    wider = case_of(row(GROUPS, precision="bf16"))
    assert predicted_value(rarer, layout, case.hardware) > expected > predicted_value(wider, layout, case.hardware)


def test_sparse_exchanges_are_of_what_the_others_keep() -> None:
    link = case_of(row("sparseloco8b")).job.thin_link
    assert link is not None
    received = link.exchange_s(1e9, 15) - link.exchange_s(0, 15)
    assert received == pytest.approx(14 * 1e9 * 4 / 146 / link.bandwidth_bytes_s, rel=0.01)


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ("83-96 compute utilisation", 89.5),
        ("83–96 %", 89.5),
        ("90 to 95", 92.5),
        (">90", 90.0),
        ("> 90 %", 90.0),
        ("≥90", 90.0),
        ("more than 90", 90.0),
        ("90+", 90.0),
        ("~97%", 97.0),
        ("goodput 97%", 97.0),
        ("97 (Gemini 1.0)", 97.0),
        ("0.96", 96.0),
        ("95.7 compute utilisation", 95.7),
    ],
)
def test_shares_in_other_spellings_are_read_and_said(tmp_path: Path, cell: str, value: float) -> None:
    given = {**cells((STOPS,))[0], TIME_SHARE: cell}
    ((_, outcome),) = read_rows(written(tmp_path / "a.csv", [given]))
    assert outcome.value == pytest.approx(value)
    assert f"{TIME_SHARE} = {cell!r} is read as" in outcome.note


@pytest.mark.parametrize("cell", ["44% -> 80% effective", "197", "82.1 at 14 nodes", "-5"])
def test_what_is_no_one_share_counts_as_not_published(tmp_path: Path, cell: str) -> None:
    given = {**cells((STOPS,))[0], TIME_SHARE: cell}
    found = by_id(validate_rows(read_rows(written(tmp_path / "a.csv", [given]))))[STOPS]
    assert found["published"] is None
    assert found["predicted"] == pytest.approx(median(16_384))
    assert any("taken as not published" in note for note in found["notes"])


def test_bounds_and_words_between_numbers_are_read_of_other_cells_too(tmp_path: Path) -> None:
    given = {**cells((STOPS,))[0], "n_chips": "2048 to 16384", "tokens_t": "15+", "seq_len": "up to 8K"}
    ((found, _),) = read_rows(written(tmp_path / "a.csv", [given]))
    assert (found.num_chips, found.tokens, found.seq_len) == (9216, 15e12, 8192)
    assert len(found.readings) == 3


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (STOPS, {"num_chips": None}, "no number of chips"),
        (STOPS, {"kind": "rl_run"}, "hangs on its rollouts"),
        (STOPS, {"num_chips": None, "parallelism": "TP8 DP99999999"}, "chips in parallelism"),
        (GROUPS, {"parallelism": "FSDP2"}, "how often groups exchange"),
        (GROUPS, {"num_chips": 8}, "8 chips are no groups of 8"),
    ],
)
def test_what_a_share_hangs_on_is_asked_for(name: str, change: dict[str, Any], words: str) -> None:
    changed = row(name, **change)
    with pytest.raises(CannotPredict, match=words):
        (stopped_run if is_of_stops(changed) else case_of)(changed)


def test_a_share_is_fitted_on_nowhere_and_judged_by_itself(tmp_path: Path) -> None:
    given = {**cells((GROUPS,))[0], "calibration": "yes"}
    document = validate_rows(read_rows(written(tmp_path / "a.csv", [given])))
    assert not any(GROUPS in each["fitted_on"] for each in document["parameters"].values())
    assert [each["name"] for each in document["groups"]] == ["share of time that trains"]
    assert any("nothing is fitted on it" in note for note in by_id(document)[GROUPS]["notes"])


def test_a_cluster_on_which_nothing_comes_to_an_end_is_skipped(tmp_path: Path) -> None:
    given = {**cells((STOPS,))[0], "n_chips": "90000000"}
    found = by_id(validate_rows(read_rows(written(tmp_path / "a.csv", [given]))))[STOPS]
    assert "trials do not end" in found["skipped"]
