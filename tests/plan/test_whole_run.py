"""Every stage of a recipe on the calendar, on one cluster and on several; what the command line gives."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from crosschip.errors import RecipeError
from crosschip.plan.cluster import Cluster, parse_cluster
from crosschip.plan.counts import num_parameters
from crosschip.plan.document import plan_document
from crosschip.plan.failures import PlanError
from crosschip.plan.fall_backs import fall_backs
from crosschip.plan.page import plan_page
from crosschip.plan.serving import Load
from crosschip.plan.stages import StageChoices
from crosschip.plan.whole_run import Asked, Switch, WholeRun, plan_whole_run
from crosschip.recipe import Recipe, parse_recipe
from tests.plan.test_planning import CLUSTERS, FIRST, command_line

START = date.today() + timedelta(30)
WIDE: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 8192, "moe_intermediate_size": 1024, "num_hidden_layers": 16,
    "num_attention_heads": 16, "n_routed_experts": 16, "kv_lora_rank": 256, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "max_position_embeddings": 4096,
}  # fmt: skip
PLAIN: dict[str, Any] = {
    "name": "wide", "data": {"source": "arithmetic"}, "tokenizer": {"vocab_size": 32000}, "model": WIDE,
    "train": {"steps": 20_000_000, "batch_size": 256, "seq_len": 2048},
}  # fmt: skip
FULL = PLAIN | {
    "sft": {"steps": 2000, "batch_size": 16, "seq_len": 2048},
    "rl": {"steps": 3000, "prompts": 64, "samples": 8, "seq_len": 3072, "max_new_tokens": 2048},
    "then": [
        {"kind": "sft", "name": "polish", "steps": 500, "batch_size": 64},
        {"kind": "rl", "name": "more-rl", "steps": 500, "seq_len": 2048, "max_new_tokens": 1024},
    ],
}


def recipe(document: dict[str, Any] = FULL, **more: Any) -> Recipe:
    return parse_recipe(document | more, "test")


def cluster(chip: str = "H200", num_chips: int = 32, name: str = "here", **more: Any) -> Cluster:
    return parse_cluster({"name": name, "chip": chip, "num_chips": num_chips, **more}, "x.toml")


def planned(where: Cluster | None = None, of: Recipe | None = None, **asked: Any) -> WholeRun:
    return plan_whole_run(of or recipe(), where or cluster(), Asked(START, num_trials=60, **asked))


@pytest.fixture(scope="module")
def run() -> WholeRun:
    return planned()


def test_every_stage_of_the_recipe_is_dated_one_after_the_other(run: WholeRun) -> None:
    document = json.loads(json.dumps(plan_document(run), allow_nan=False))
    stages = document["dates"]["stages"]
    assert [each["name"] for each in stages] == ["pretrain", "sft", "rl", "polish", "more-rl"]
    assert [each["name"] for each in document["stages"]] == [each["name"] for each in stages]
    for before, after in pairwise(stages):
        assert after["begin_days"] == pytest.approx(before["end_days"])
        assert all(begin < end for begin, end in zip(after["begin_days"], after["end_days"], strict=True))
    assert document["ready"] == {key: document["dates"]["end"][key] for key in ("p50", "p90")}
    assert (document["chip"], document["role"], document["main_stage"]) == ("H200", "train", "pretrain")
    page = plan_page(document)
    for name in ("polish", "more-rl", "Rollouts of rl"):
        assert name in page


def test_a_stage_too_small_for_all_chips_uses_fewer_and_says_so(run: WholeRun) -> None:
    small = planned(cluster(num_chips=4096), recipe(train={**PLAIN["train"], "batch_size": 4096}))
    by_name = {each.name: each for each in small.stages}
    assert by_name["pretrain"].num_chips == 4096
    assert by_name["sft"].num_chips < 4096
    assert any("have nothing to do meanwhile" in note for note in by_name["sft"].notes)
    assert all(each.num_chips <= 32 for each in run.stages)


def test_answers_on_chips_of_their_own_are_made_beside_the_learning(run: WholeRun) -> None:
    other = cluster("H20", 64, "answers", price={"per_chip_hour": 1.0})
    apart = planned(cluster(price={"per_chip_hour": 3.0}), choices=StageChoices(rollouts_on=other))
    here, there = ({each.name: each for each in each.stages}["rl"] for each in (run, apart))
    assert here.reinforced is not None
    assert there.reinforced is not None
    assert not here.reinforced.rollouts.overlapped
    assert there.reinforced.rollouts.overlapped
    assert there.work_s < here.work_s
    assert there.beside == (("H20", there.reinforced.engines.num_chips),)
    assert there.num_chips == there.plan.num_chips + there.reinforced.engines.num_chips
    document = plan_document(apart)
    assert document["money"]["money"]["p50"] > 0
    assert document["other_clusters"]["answers"]["chip"] == "H20"
    longer = planned(choices=StageChoices(answer_tokens=2048.0))
    assert {each.name: each for each in longer.stages}["rl"].work_s > 1.2 * here.work_s


def test_a_model_that_no_engine_holds_is_told() -> None:
    large = WIDE | {
        "num_hidden_layers": 60,
        "n_routed_experts": 128,
        "hidden_size": 4096,
        "moe_intermediate_size": 2048,
    }
    tiny = cluster("A100 40 GB", 1, "tiny")
    with pytest.raises(PlanError, match="do not fit on 1 x A100 40 GB"):
        planned(cluster(num_chips=256), recipe(model=large), choices=StageChoices(rollouts_on=tiny))


def test_the_same_run_elsewhere_is_an_effect_and_a_fall_back_rule() -> None:
    slow, none = cluster("A100 80 GB", 32, "slow", price={"per_chip_hour": 1.0}), cluster("A100 40 GB", 11, "odd")
    base = planned(
        cluster(price={"per_chip_hour": 3.0}), recipe(PLAIN), compared=(slow, none), switch=Switch(3.0),
        by=START + timedelta(400),
    )  # fmt: skip
    document = plan_document(base)
    effect = next(each for each in document["sensitivity"] if each["change"] == "on slow")
    assert effect["days_p50"] > 0
    assert "later" in effect["words"]
    (rule,) = document["fall_backs"]
    assert (rule["from"], rule["to"]) == ("here", "slow")
    assert [each["share"] for each in rule["milestones"]] == sorted(each["share"] for each in rule["milestones"])
    assert all("pretrain, step " in each["words"] for each in rule["milestones"])
    assert rule["last_switch"] is not None
    assert any(note.startswith("on odd: ") for note in document["notes"])
    assert "When to fall back from here to slow" in plan_page(document)
    free = plan_document(planned(of=recipe(PLAIN), compared=(slow,)))
    assert free["fall_backs"] == []
    assert any("no fall-back rule to slow" in note for note in free["notes"])


def test_two_currencies_are_never_compared_as_one() -> None:
    here = cluster(price={"per_chip_hour": 2.0, "currency": "USD"})
    dear, same, free = (
        cluster("Ascend 910B", 32, "there", price=price)
        for price in ({"per_chip_hour": 14.0, "currency": "CNY"}, {"per_chip_hour": 2.0}, {"currency": "CNY"})
    )
    run = planned(here, recipe(PLAIN), compared=(dear,))
    (there,) = run.others.values()
    assert isinstance(there, WholeRun)
    rules, notes = fall_backs(run)
    assert rules == []
    assert any("the price of there is in CNY" in note and "[price] currency" in note for note in notes)
    for other in (same, free):
        rules, _ = fall_backs(replace(run, others={"there": replace(there, cluster=other)}))
        assert len(rules) == 1


def test_every_cluster_that_trains_or_answers_counts_in_the_fall_back_rule() -> None:
    price = {"price": {"per_chip_hour": 2.0}}
    run = planned(cluster(**price), recipe(PLAIN), compared=(cluster("A100 80 GB", 32, "there", **price),))
    (there,) = run.others.values()
    assert isinstance(there, WholeRun)
    free, priced, foreign = (
        cluster("Ascend 910B", 64, "beside", **more)
        for more in ({}, price, {"price": {"per_chip_hour": 14.0, "currency": "CNY"}})
    )

    def rule(here: StageChoices, on_the_other: StageChoices) -> tuple[float, list[str]]:
        other = replace(there, asked=replace(there.asked, choices=on_the_other))
        rules, notes = fall_backs(replace(run, asked=replace(run.asked, choices=here), others={"there": other}))
        return (rules[0]["milestones"][0]["share"] if rules else 0.0), notes

    none = StageChoices()
    alone, _ = rule(none, none)
    unpriced, notes = rule(StageChoices(joined_with=(free,)), none)
    assert unpriced == alone
    assert any("beside has no [price]" in note for note in notes)
    joined, _ = rule(StageChoices(joined_with=(priced,)), none)
    assert joined > alone, "staying costs more, so more must be done by the same day"
    answering = StageChoices(rollouts_on=priced)
    assert rule(answering, none)[0] == pytest.approx(joined)
    assert rule(none, answering)[0] < alone
    nothing, notes = rule(StageChoices(joined_with=(foreign,)), none)
    assert nothing == 0.0
    assert any("the price of beside is in CNY" in note for note in notes)


def test_fewer_stops_seen_never_end_the_run_later() -> None:
    """As far as a save's interval: where in it a stop falls is chance, and which one is best hangs on the rates."""
    ends = []
    for stops in range(5):
        run = planned(cluster(seen=[{"num_stops": stops, "days": 3.0, "num_chips": 32}]), recipe(PLAIN))
        ends.append([run.schedule.end_days(share) for share in (0.1, 0.5, 0.9)])
    recovery = run.recovery("pretrain")
    allowed = (recovery.interval_s + recovery.mean_stop_s) / 86400
    for few, many in pairwise(ends):
        assert all(before <= after + allowed for before, after in zip(few, many, strict=True))
    assert ends[-1][1] > ends[0][1]


def test_what_is_known_of_the_calendar_counts() -> None:
    of = recipe(PLAIN)
    plain = planned(of=of).schedule.end_days()
    first = START + timedelta(2)
    schedule = {
        "ramp": [[0, 0.5], [4, 1.0]], "blackouts": [{"first": first, "last": first + timedelta(4)}],
        "pauses": [{"after": "pretrain", "days": 3, "why": "review"}],
    }  # fmt: skip
    full = planned(cluster(schedule=schedule), of)
    assert full.schedule.end_days() == pytest.approx(plain + 2 + 5 + 3, rel=0.02)
    assert [each.stage.name for each in full.schedule.stages] == ["pretrain", "review"]
    with pytest.raises(RecipeError, match="there is no stage 'rest'"):
        planned(cluster(schedule={"pauses": [{"after": "rest", "days": 1}]}), of)


def test_pauses_of_one_reason_are_told_apart_by_the_stage_before_them() -> None:
    of = recipe(PLAIN, sft={"steps": 2000, "batch_size": 16})

    def names(*pauses: dict[str, Any]) -> list[str]:
        return [each.stage.name for each in planned(cluster(schedule={"pauses": pauses}), of).schedule.stages]

    first, second = {"after": "pretrain", "days": 3}, {"after": "sft", "days": 2}
    assert names(first, second) == ["pretrain", "pause", "sft", "pause after sft"]
    assert names(first | {"why": "sft"}) == ["pretrain", "sft after pretrain", "sft"]
    assert names(second, second, second)[2:] == ["pause", "pause after sft", "pause after sft (2)"]


def test_recovery_beyond_all_measure_is_refused_with_its_key() -> None:
    for key, value in (("repair_s", 1e12), ("restart_s", 1e12), ("num_spares", 5)):
        with pytest.raises(RecipeError, match=rf"recovery\.{key}"):
            cluster(num_chips=32, recovery={key: value})
    assert cluster(num_chips=32, recovery={"num_spares": 4}).recovery.num_spares == 4


def test_what_was_seen_here_and_a_slow_store_count() -> None:
    of = recipe(PLAIN)
    often = cluster(seen=[{"num_stops": 400, "days": 10.0, "num_chips": 32}])
    slow = cluster(recovery={"store_gb_s": 0.5, "blocking_save": True, "num_spares": 3})
    plain, stopping, saving = (planned(where, of) for where in (cluster(), often, slow))
    assert stopping.schedule.end_days() > 1.1 * plain.schedule.end_days()
    assert saving.recovery("pretrain").save_blocking_s == pytest.approx(
        12 * num_parameters(saving.architecture) / 0.5e9
    )
    assert saving.recovery("pretrain").num_spares == 3


def test_groups_on_two_vendors_joined_by_a_thin_link() -> None:
    of = recipe(
        PLAIN, groups={"num_groups": 2, "sync_every": 50, "mode": "diloco"}, links={"bandwidth_mbit_s": 10_000.0}
    )
    there = cluster("Ascend 910B", 64, "there")
    joined = planned(of=of, choices=StageChoices(joined_with=(there,)))
    (stage,) = joined.stages
    assert stage.joined is not None
    assert stage.beside == (("Ascend 910B", 64),)
    assert stage.num_chips == 96
    assert 0 < stage.joined.joined.utilisation <= 1
    assert joined.recovery("pretrain").num_groups == 2
    alone = planned(of=recipe(PLAIN, train={**PLAIN["train"], "batch_size": 128}))
    assert stage.work_s < 2 * alone.stages[0].work_s
    assert "Groups of pretrain" in plan_page(plan_document(joined))
    with pytest.raises(RecipeError, match=r"groups\.num_groups = 1, and 2 clusters are joined"):
        planned(of=recipe(PLAIN), choices=StageChoices(joined_with=(there,)))


def test_training_on_one_and_serving_on_another(run: WholeRun) -> None:
    there = cluster("Ascend 910B", 8, "there", price={"per_chip_hour": 1.0})
    document = plan_document(replace(run, asked=replace(run.asked, load=Load(50, 1000, 500), serve_on=there)))
    serving = document["serving"]
    assert serving["chips"] == (
        serving["prefill"]["instances"] * serving["prefill"]["chips_per_instance"]
        + serving["decode"]["instances"] * serving["decode"]["chips_per_instance"]
    )
    assert serving["cost"]["per_day"] == 24 * serving["chips"]
    assert any("what crosses is a handoff" in note for note in document["notes"])
    assert "requests/s" in plan_page(document)


def test_serving_tells_where_chips_lack_and_pays_for_energy(run: WholeRun) -> None:
    def served(num_chips: int, **price: float) -> dict[str, Any]:
        there = cluster("H20", num_chips, "there", price=price)
        return plan_document(replace(run, asked=replace(run.asked, load=Load(50, 1000, 500), serve_on=there)))

    few, enough = served(1), served(512, per_chip_hour=1.0, chip_kw=0.5, per_kwh=0.2)
    chips = few["serving"]["chips"]
    assert any(f"serving takes {chips} x H20, and there has 1: too few" in note for note in few["notes"])
    assert not any("too few for this load" in note for note in enough["notes"])
    assert few["serving"]["cost"] is None
    assert enough["serving"]["cost"]["per_day"] == pytest.approx(24 * chips * 1.1)
    assert served(512, chip_kw=0.5, per_kwh=0.2)["serving"]["cost"]["per_day"] == pytest.approx(24 * chips * 0.1)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(command_line(), ["plan", *arguments])


def test_the_command_line_gives_all_of_it(tmp_path: Path) -> None:
    source = tmp_path / "r.toml"
    source.write_text(
        'name = "r"\n[data]\nsource = "arithmetic"\n[train]\nsteps = 100\n[rl]\nsteps = 8\nprompts = 4\nsamples = 4\n'
    )
    other = tmp_path / "other.toml"
    other.write_text('name = "other"\nchip = "Ascend 910C"\nnum_chips = 8\n')
    ended = invoke(
        str(source), "--cluster", str(CLUSTERS / "h200x8.toml"), "--start", str(START), "--by", str(START),
        "--compare-cluster", str(other),
        "--rollout-cluster", str(CLUSTERS / "h20x1024.toml"), "--blackout", f"{START}:{START}:holiday",
        "--ramp", "0:0.5", "--ramp", "1:1", "--rollout-tokens", "100",
        "--requests-per-s", "5", "--serve-cluster", str(CLUSTERS / "ascend910b-x8192.toml"),
        "--delay-cost-per-day", "1000", "--json", str(tmp_path / "p.json"), "--page", str(tmp_path / "p.html"),
    )  # fmt: skip
    assert ended.exit_code == 0, ended.output
    document = json.loads((tmp_path / "p.json").read_text())
    assert document["dates"]["blackouts"][0]["why"] == "holiday"
    assert document["serving"]["cluster"] == "Ascend 910B x 8192"
    assert [each["name"] for each in document["dates"]["stages"]] == ["pretrain", "rl"]
    for words in ("serves", "on other", "fall-back from", "by "):
        assert words in ended.output


REFUSED = [
    (["--blackout", "2027-02-03:2027-02-01"], "ends before it begins"),
    (["--blackout", "soon"], "is no date"),
    (["--ramp", "half"], "no pair of numbers"),
    (["--ramp", "3:1"], "begin at day 0"),
    (["--serve-cluster", str(CLUSTERS / "h20x1024.toml")], "means nothing without --requests-per-s"),
    (["--token-s", "0.05"], "means nothing without --requests-per-s"),
    *(
        ([option, *value], f"{option} means nothing without --compare-cluster")
        for option, *value in (["--switch-days", "nan"], ["--switch-cost", "1"], ["--start-anew"])
    ),
    (["--delay-cost-per-day", "0"], "means nothing without --compare-cluster"),
    (["--rollout-tokens", "nan"], "--rollout-tokens is nan"),
    (["--requests-per-s", "-1"], "requests_per_s is -1"),
    (["--requests-per-s", "1e12"], "1e+12 requests a second"),
    (["--start", "2020-01-01"], "before today"),
    (["--join-cluster", str(CLUSTERS / "h20x1024.toml")], "2 clusters are joined"),
]


@pytest.mark.parametrize(("more", "words"), REFUSED)
def test_what_makes_no_sense_is_refused(more: list[str], words: str) -> None:
    ended = invoke(str(FIRST), "--cluster", str(CLUSTERS / "h200x8.toml"), *more)
    assert ended.exit_code == 2
    assert words in " ".join(ended.output.split())
    assert "what to do" in ended.output
