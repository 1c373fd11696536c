"""Spares are hosts and not domains of fast links, and what lies beyond the cluster is not billed unless it is named."""

from __future__ import annotations

from typing import Any

import pytest

from crosschip.errors import RecipeError
from crosschip.plan.document import plan_document
from crosschip.plan.failures import Observation, failure_outlook, published_rates, usual_recovery
from crosschip.plan.hardware import kinds
from crosschip.plan.page import plan_page
from tests.plan.test_whole_run import PLAIN, cluster, planned, recipe

ONE_USD: dict[str, Any] = {"price": {"per_chip_hour": 1.0}}


def document(chip: str, num_chips: int, batch: int, **more: Any) -> dict[str, Any]:
    of = recipe(PLAIN, train={**PLAIN["train"], "batch_size": batch})
    return plan_document(planned(cluster(chip, num_chips, **ONE_USD, **more), of))


def paid_chips(found: dict[str, Any]) -> float:
    return float(found["money"]["chip_hours"]["p50"] / found["dates"]["end_days"]["p50"] / 24)


def test_spares_beyond_the_cluster_are_not_billed_and_the_bill_says_so() -> None:
    found = document("CloudMatrix384", 384, 384)
    spares = found["failures"]["spares"]
    assert spares["chips_per_node"] == 8
    assert spares["nodes"] > 0
    assert paid_chips(found) == pytest.approx(384)
    assert any(
        f"{8 * spares['nodes']} chips of spare hosts beyond the cluster" in each for each in found["money"]["left_out"]
    )
    assert "paid spares included" in plan_page(found)


def test_spares_that_are_named_are_billed_by_the_host() -> None:
    found = document("CloudMatrix384", 384, 384, recovery={"num_spares": 2})
    assert paid_chips(found) == pytest.approx(384 + 2 * 8)
    assert not any("spare hosts" in each for each in found["money"]["left_out"])


def test_spares_within_the_cluster_are_billed() -> None:
    of = recipe(PLAIN, train={**PLAIN["train"], "batch_size": 64}, sft={"steps": 100, "batch_size": 4})
    run = planned(cluster("H200", 64, **ONE_USD), of)
    by_name = {each.stage.name: each.stage for each in run.schedule.stages}
    assert by_name["pretrain"].spare_chips == 0
    later = by_name["sft"]
    assert later.recovery is not None
    free = 64 - later.num_chips
    assert later.spare_chips == min(free, later.recovery.num_spares * later.recovery.chips_per_host)


@pytest.mark.parametrize(
    ("kind", "chips"), [("GB200", 4), ("TPU v4", 4), ("TPU v5p", 4), ("TPU v6e", 8), ("Ascend 910C", 8), ("H100", 8)]
)
def test_a_host_has_a_few_chips_with_a_source(kind: str, chips: int) -> None:
    found = next(each for _, each in kinds() if each.kind == kind)
    figure = dict(found.sources)["host_chips"]
    assert found.host_size == figure.value == chips
    assert figure.source
    assert all(1 <= each.host_size <= 16 for _, each in kinds())


def test_a_clusters_file_may_say_how_large_a_host_is() -> None:
    def given(value: float) -> dict[str, Any]:
        return {"host_chips": {"value": value, "origin": "given", "source": "me"}}

    assert cluster("GB200", 64, figures=given(2.0)).hardware.host_size == 2
    assert cluster("Ascend 910C", 64, node_size=4).hardware.host_size == 4
    for value in (2.5, 100.0):
        with pytest.raises(RecipeError, match="no whole number of chips of a node of 64"):
            cluster("GB200", 64, figures=given(value))


def test_many_stops_seen_ask_for_more_spares_than_the_published_rates() -> None:
    published = published_rates()
    often = published.with_seen(Observation(num_stops=600, days=10.0, num_chips=1024))
    (fewer, rare), (more, frequent) = (
        (found.num_spares, failure_outlook(rates, 1024, found).swaps_per_day)
        for rates, found in ((rates, usual_recovery(rates, 1024, 8)) for rates in (published, often))
    )
    assert more > fewer
    assert frequent > rare
