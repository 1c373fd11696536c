"""Plans beside reports: dates that are none, or of unlike work, decide nothing."""

from __future__ import annotations

from typing import Any

import pytest

from crosschip.report.compare import compare
from tests.report.qualifications import qualification
from tests.report.test_compare import ASCEND, H20, plan

LATE = plan("NVIDIA H20", "2027-05-01", "2027-07-01")


def compared(*plans: dict[str, Any]) -> dict[str, Any]:
    return compare({"a.json": qualification(**ASCEND), "b.json": qualification(**H20)}, plans)


@pytest.mark.parametrize(
    ("p50", "p90"),
    [("never", "never"), ("2027-03-01", "never"), ("", ""), ("2027-04-01", "2027-03-01"), ("2027-02-30", "2027-03-01")],
)
def test_what_is_no_date_decides_nothing(p50: str, p90: str) -> None:
    document = compared(plan("npu:0", p50, p90), LATE)
    assert "no dates under `ready`" in "; ".join(document["notes"])
    assert document["recommendations"]["train"]["answer"] == "INCONCLUSIVE"
    assert document["chips"][0]["plans"] == {}


def test_dates_are_compared_in_one_form() -> None:
    document = compared(plan("npu:0", "20270301", "20270401"), LATE)
    assert document["chips"][0]["plans"]["train"]["p90"] == "2027-04-01"
    assert document["recommendations"]["train"]["chip"] == "Ascend910B2 (npu:0)"


def of_tokens(one: dict[str, Any], number: float) -> dict[str, Any]:
    return {**one, "counts": {"tokens": {"value": number, "unit": "tokens"}}}


@pytest.mark.parametrize(("tokens", "chip"), [((1e9, 1e9), "Ascend910B2 (npu:0)"), ((1e9, 1e12), None)])
def test_dates_of_unlike_work_decide_nothing(tokens: tuple[float, float], chip: str | None) -> None:
    early = plan("npu:0", "2027-03-01", "2027-04-01")
    document = compared(of_tokens(early, tokens[0]), of_tokens(LATE, tokens[1]))
    assert document["recommendations"]["train"]["chip"] == chip
    told = (
        "the plans to train are of different numbers of tokens (Ascend910B2 (npu:0) 1e+09, NVIDIA H20 (cuda:0) 1e+12)"
    )
    assert (told in "; ".join(document["notes"])) == (chip is None)


def test_a_plan_that_another_has_replaced_is_no_other_work() -> None:
    early = plan("npu:0", "2027-03-01", "2027-04-01")
    document = compared(of_tokens(early, 1e12), of_tokens(early, 1e9), of_tokens(LATE, 1e9))
    assert document["recommendations"]["train"]["chip"] == "Ascend910B2 (npu:0)"
