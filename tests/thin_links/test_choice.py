from __future__ import annotations

import json
from pathlib import Path

import pytest

from crosschip.errors import RecipeError
from crosschip.recipe import GroupSettings, LinkSettings
from crosschip.thin_links import BYTES_PER_ELEMENT, TARGET_UTILISATION, Link, choose, link_from

NUM_ELEMENTS, STEP_S = 35_000_000, 1.0
FAST = Link(12.5e9, 1e-5)  # 100 Gbit/s
THIN = Link(12.5e6, 0.025)  # 100 Mbit/s
TWO = GroupSettings(num_groups=2)


def test_a_fast_link_averages_each_step() -> None:
    choice = choose(TWO, FAST, NUM_ELEMENTS, STEP_S)
    assert (choice.mode, choice.compression) == ("every-step", "none")
    assert "averaged each step" in choice.reason


@pytest.mark.parametrize("mbit", [1000, 100, 10])
def test_a_thin_link_sends_a_hundredth_or_less_of_what_each_step_would(mbit: float) -> None:
    choice = choose(TWO, Link(mbit * 125e3, 0.05), NUM_ELEMENTS, STEP_S)
    each_step = choose(TWO.model_copy(update={"mode": "every-step"}), THIN, NUM_ELEMENTS, STEP_S)
    assert choice.mode == "diloco"
    assert choice.bytes_per_step is not None
    assert each_step.bytes_per_step is not None
    assert each_step.bytes_per_step / choice.bytes_per_step >= 100


@pytest.mark.parametrize("mbit", [1e5, 1e4, 1e3, 1e2])
def test_what_is_chosen_keeps_the_chips_busy(mbit: float) -> None:
    choice = choose(TWO, Link(mbit * 1e6 / 8, 0.025), NUM_ELEMENTS, STEP_S)
    assert choice.utilisation is not None
    assert choice.utilisation >= TARGET_UTILISATION


def test_a_prediction_just_above_the_target_is_not_relied_on() -> None:
    wanted = GroupSettings(num_groups=2, mode="diloco", compression="int8", overlap_steps=0, sync_every=30)
    int8 = choose(wanted, THIN, 4_216_576, 0.42)
    assert int8.utilisation is not None
    assert TARGET_UTILISATION < int8.utilisation < TARGET_UTILISATION + 0.01
    assert choose(TWO, THIN, 4_216_576, 0.42).compression == "int4"


def test_a_goal_that_no_way_reaches_is_said() -> None:
    choice = choose(TWO, Link(1e3, 1.0), NUM_ELEMENTS, STEP_S)
    assert "misses the goal" in choice.reason


def test_a_thinner_link_never_takes_a_way_that_is_tried_earlier() -> None:
    found = [choose(TWO, Link(rate, 0.025), NUM_ELEMENTS, STEP_S) for rate in (1e12, 1e10, 1e9, 1e8, 1e7, 1e6)]
    tried = [(each.sync_every, each.overlap_steps > 0, each.compression == "int4") for each in found]
    assert tried == sorted(tried)
    assert len(set(tried)) > 3


def test_what_the_recipe_says_is_kept() -> None:
    wanted = GroupSettings(
        num_groups=2, mode="diloco", sync_every=60, fragments=2, overlap_steps=3, compression="int8", own_share=0.5
    )
    choice = choose(wanted, FAST, NUM_ELEMENTS, STEP_S)
    assert (choice.sync_every, choice.fragments, choice.overlap_steps, choice.compression) == (60, 2, 3, "int8")


@pytest.mark.parametrize("fragments", [1, 4, 7])
def test_an_interval_is_a_multiple_of_the_fragments(fragments: int) -> None:
    choice = choose(GroupSettings(num_groups=2, fragments=fragments, mode="diloco"), THIN, NUM_ELEMENTS, STEP_S)
    assert choice.sync_every % fragments == 0
    assert choice.overlap_steps < choice.sync_every // fragments


def test_nothing_is_assumed_of_an_unknown_link() -> None:
    choice = choose(TWO, None, NUM_ELEMENTS, STEP_S)
    assert choice.mode == "every-step"
    assert "nothing is known of the link" in choice.reason
    assert choice.utilisation is None


def test_predicted_bytes_are_those_of_the_exchange() -> None:
    wanted = GroupSettings(num_groups=3, mode="diloco", sync_every=30, compression="int4")
    choice = choose(wanted, THIN, NUM_ELEMENTS, STEP_S)
    assert choice.bytes_per_step == pytest.approx(2 * 2 / 3 * NUM_ELEMENTS * BYTES_PER_ELEMENT["int4"] / 30)


def test_a_link_from_the_recipe() -> None:
    assert link_from(LinkSettings()) is None
    link = link_from(LinkSettings(bandwidth_mbit_s=100.0, latency_ms=25.0))
    assert link == Link(12.5e6, 0.025)
    with pytest.raises(ValueError, match="latency_ms=3 stands without bandwidth_mbit_s"):
        LinkSettings(latency_ms=3.0)


def fit(latency_s: float, bandwidth_gb_s: float) -> dict[str, float]:
    return {"latency_s": latency_s, "bandwidth_gb_s": bandwidth_gb_s, "worst_misfit": 0.01}


@pytest.mark.parametrize(
    "document",
    [
        {
            "kind": "links",
            "pairs": [
                {"between": "ranks 0 and 1", "fit": fit(0.001, 0.5)},
                {"between": "ranks 0 and 2", "fit": fit(0.004, 0.2)},
                {"between": "ranks 1 and 2", "fit": None},
            ],
            "collectives": [{"between": "all_reduce", "fit": fit(1.0, 0.001)}],
        },
        {
            "exams": [
                {
                    "measurements": [
                        {"check": "pairs", "plot": "bandwidth", **fit(0.001, 0.5)},
                        {"check": "pairs", "plot": "bandwidth", **fit(0.004, 0.2)},
                        {"check": "collectives", "plot": "bandwidth", **fit(1.0, 0.001)},
                    ]
                }
            ]
        },
    ],
)
def test_a_link_from_a_report_is_its_slowest_pair(document: object, tmp_path: Path) -> None:
    path = tmp_path / "links.json"
    path.write_text(json.dumps(document))
    link = link_from(LinkSettings(report=str(path)))
    assert link is not None
    assert link.latency_s == pytest.approx(0.004)
    assert link.bandwidth_bytes_s == pytest.approx(0.2e9)
    with_own = link_from(LinkSettings(report=str(path), bandwidth_mbit_s=8.0))
    assert with_own is not None
    assert with_own.bandwidth_bytes_s == pytest.approx(1e6)


def test_a_report_without_pairs_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "links.json"
    path.write_text("{}")
    with pytest.raises(RecipeError, match="no pair of ranks"):
        link_from(LinkSettings(report=str(path)))


@pytest.mark.parametrize(
    "found",
    [
        {"bandwidth_gb_s": 0, "latency_s": 0.001},
        {"bandwidth_gb_s": 0.5},
        {"bandwidth_gb_s": float("nan"), "latency_s": 0.001},
        {"bandwidth_gb_s": "fast", "latency_s": 0.001},
        {"bandwidth_gb_s": 0.5, "latency_s": -1.0},
    ],
)
def test_a_report_with_a_pair_that_is_no_link_is_refused(found: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "links.json"
    for document in ({"check": "pairs", **found}, {"pairs": [{"fit": fit(0.001, 0.5)}, {"fit": found}]}):
        path.write_text(json.dumps(document))
        with pytest.raises(RecipeError, match=r"links\.json' holds a pair of ranks with bandwidth_gb_s="):
            link_from(LinkSettings(report=str(path)))


def test_an_impossible_combination_is_refused() -> None:
    for words in ({"min_groups": 3}, {"sync_every": 30, "fragments": 4}, {"sync_every": 8, "overlap_steps": 8},
                  {"overlap_steps": 2}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(words))):
            GroupSettings(num_groups=2, **words)  # type: ignore[arg-type]
