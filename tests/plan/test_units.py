"""Every number of a plan's document has a unit and an origin, beside it or in the table that the document carries."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

from crosschip.errors import RecipeError
from crosschip.plan.dates import Calendar, Scenario, plan_dates
from crosschip.plan.document import explain, meaning, plan_document
from crosschip.plan.figures_of import figures_of
from crosschip.plan.hardware import kinds
from crosschip.plan.page import dates_document, plan_page
from crosschip.plan.serving import Load
from crosschip.plan.stages import StageChoices
from crosschip.plan.units import is_figure, joined, meaning_of, units_of
from tests.plan.test_planning import ROOT
from tests.plan.test_whole_run import PLAIN, START, cluster, invoke, planned, recipe

ORIGINS = {"measured", "published", "assumed", "computed", "given"}


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    """Two plans that have every part: rollouts apart, a comparison, a load, prices, a date; groups on two chips."""
    slow = cluster("A100 80 GB", 32, "slow", price={"per_chip_hour": 1.0})
    first = planned(
        cluster(price={"per_chip_hour": 3.0, "chip_kw": 1.0, "per_kwh": 0.1}), compared=(slow,),
        by=START + timedelta(400), load=Load(50, 1000, 500),
        choices=StageChoices(rollouts_on=cluster("H20", 64, "answers", price={"per_chip_hour": 1.0})),
    )  # fmt: skip
    of = recipe(PLAIN, groups={"num_groups": 2, "sync_every": 50, "mode": "diloco"}, links={"bandwidth_mbit_s": 1e4})
    second = planned(of=of, choices=StageChoices(joined_with=(cluster("Ascend 910B", 64, "there"),)))
    return [json.loads(json.dumps(plan_document(each), allow_nan=False)) for each in (first, second)]


def numbers(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any] | None]]:
    """Every leaf number with the figure that it stands in, if it stands in one."""
    if isinstance(value, dict) and {"value", "unit", "origin", "source"} <= set(value):
        yield path, value
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from numbers(part, (*path, name))
    elif isinstance(value, list):
        for place, part in enumerate(value):
            yield from numbers(part, (*path, str(place)))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, None


def fits(pattern: str, path: tuple[str, ...]) -> bool:
    parts = pattern.split(".")
    return len(parts) == len(path) and all(mine in ("*", each) for mine, each in zip(parts, path, strict=True))


def test_every_leaf_number_has_a_unit_an_origin_and_a_source(documents: list[dict[str, Any]]) -> None:
    for document in documents:
        found = list(numbers(document))
        assert len(found) > 400
        for path, figure in found:
            told = figure or next((each for each in document["units"] if fits(each["path"], path)), None)
            assert told is not None, path
            assert told["unit"], path
            assert told["source"], path
            assert told["origin"] in ORIGINS, path
        assert {path[0] for path, figure in found if figure is None} >= {"failures", "dates", "money", "step"}


def test_a_number_without_a_unit_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match=r"step\.new has no unit"):
        units_of({"step": {"new": 1.0}})
    assert units_of({"step": {"new": {"value": 1.0, "unit": "s", "origin": "given", "source": "x"}}}) == []


def test_the_table_says_of_a_figure_what_the_document_says(documents: list[dict[str, Any]]) -> None:
    compared = 0
    for document in documents:
        for path, figure in numbers(document):
            if figure is None or "figures" in path:
                continue
            told = meaning_of(path)
            assert told is not None, path
            assert (told.unit, told.origin) == (figure["unit"], figure["origin"])
            compared += 1
    assert compared > 50


def test_explain_joins_a_unit_and_an_origin_to_what_it_shows(documents: list[dict[str, Any]]) -> None:
    document = documents[0]
    parts = explain(document, "step.parts_s")
    assert {name: each["value"] for name, each in parts.items()} == document["step"]["parts_s"]
    assert all((each["unit"], each["origin"]) == ("s", "computed") for each in parts.values())
    assert explain(document, "failures.goodput.p50")["unit"] == "share"
    assert explain(document, "step.step_s") == document["step"]["step_s"]
    assert explain(document, "step.step_s.value") == document["step"]["step_s"]["value"]
    assert explain(document, "dates.end_histogram.edges_days")["unit"] == "days"
    assert [each["unit"] for each in explain(document, "failures.interval.curve.0")] == ["s", "share"]
    for key, value in document.items():
        assert all(figure is not None for _, figure in numbers(joined(value, (key,)))), key


def test_explain_without_a_recipe_says_what_a_key_means() -> None:
    assert meaning("failures.interval.young_s")[0]["unit"] == "s"
    assert meaning("stages.0.rollouts.token_s") == meaning("stages.*.rollouts.token_s")
    ended = invoke("--explain", "step.parts_s")
    assert ended.exit_code == 0, ended.output
    assert json.loads(ended.output)[0]["path"] == "step.parts_s.*"
    with pytest.raises(RecipeError, match=r"no number of a plan is there"):
        meaning("step.nothing")
    refused = invoke("--explain", "step.nothing")
    assert refused.exit_code == 2
    assert "plan RECIPE --explain KEY" in " ".join(refused.output.split())


def test_the_page_shows_the_table(documents: list[dict[str, Any]]) -> None:
    page = plan_page(documents[0])
    for each in documents[0]["units"]:
        assert each["path"] in page


def test_what_is_assumed_of_chips_trainer_and_memory_is_among_the_figures() -> None:
    where = cluster()
    figures = figures_of(where)
    wanted = {
        "link_latency_us": 3.0, "network_latency_us": 10.0, "link_share": 0.8, "memory_share": 0.85, "imbalance": 1.15,
        "eager_stream": 4.9, "eager_kept": 1.22, "runtime_gb": 3.0,
    }  # fmt: skip
    for key, value in wanted.items():
        assert figures[key]["value"] == pytest.approx(value)
        assert figures[key]["origin"] == "assumed"
    assert all(is_figure(each) and each["unit"] and each["source"] for each in figures.values())


def test_a_shares_source_agrees_with_its_value() -> None:
    """What is said to be taken from elsewhere is; half of a published figure is no published one."""
    by_kind = {each.kind: dict(each.sources) for _, each in kinds()}
    for name in ("TPU v4", "TPU v5p"):
        assert "H100" in by_kind[name]["product_share"].source
        assert by_kind[name]["product_share"].value == by_kind["H100"]["product_share"].value
    assert not any("0.70 as for others" in each["product_share"].source for each in by_kind.values())
    link = by_kind["Ascend 910C"]["link_gb_s"]
    assert (link.value, link.origin) == (196.0, "assumed")
    assert "392" in link.source


def test_rates_of_serving_come_from_where_the_chips_figures_come_from(documents: list[dict[str, Any]]) -> None:
    figures = documents[0]["serving"]["figures"]
    assert {figures[name]["origin"] for name in ("product_tflop_s", "memory_gb_s", "memory_gb")} == {"published"}
    assert figures["product_share"]["origin"] == "assumed"
    here = next(each for each in planned().stages if each.reinforced is not None).reinforced
    assert here is not None
    assert dict(here.serving.sources)["usable_memory"].origin == "assumed"


def test_a_spread_of_the_speed_is_assumed_unless_it_is_given() -> None:
    run = planned(of=recipe(PLAIN))
    scenario = run.schedule.scenario
    for spread, origin in ((Scenario.speed_spread, "assumed"), (0.2, "given")):
        schedule = plan_dates(Scenario(scenario.stages, run.rates, Calendar(START), spread, num_trials=20))
        assert dates_document(schedule)["figures"]["speed spread"]["origin"] == origin


def test_the_table_is_of_known_origins_alone() -> None:
    table = tomllib.loads((ROOT / "crosschip" / "plan" / "data" / "units.toml").read_text(encoding="utf-8"))
    told = [leaf for group in table["group"] for leaf in group["leaves"]]
    assert all(len(leaf) == 4 for leaf in told)
    assert {origin for path, _, origin, _ in told if path != "figures.*"} <= ORIGINS
