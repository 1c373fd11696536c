"""Rollouts from real HTTP servers that misbehave: everything is told, nothing is lost, bad engines are dropped."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from crosschip.train.rl.advantages import has_signal
from crosschip.train.rl.rollouts import RolloutError
from crosschip.train.rl.rollouts.engine import KEY_VARIABLE, HttpEngine
from crosschip.train.rl.rollouts.errors import BadAnswer
from crosschip.train.rl.rollouts.member import Member
from crosschip.train.rl.rollouts.upkeep import Upkeep
from tests.train.rl.rollouts.rollout_parts import (
    FirstIsEven,
    Told,
    bits_of,
    numbers_of,
    rollouts_of,
    settings_of,
    take_all,
    versions_of,
    wait_until,
    write_nothing,
)
from tests.train.rl.rollouts.scripted_engine import ScriptedEngine, served


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second of silence is too much, and engines are looked at all the time."""
    monkeypatch.setattr("crosschip.train.rl.rollouts.upkeep.MOST_SILENCE_S", 0.5)
    monkeypatch.setattr("crosschip.train.rl.rollouts.upkeep._LOOK_EVERY_S", 0.1)


def test_on_policy_batches_are_of_the_published_weights_and_repeat_bit_for_bit(tmp_path: Path) -> None:
    def run(name: str, delays: float) -> list[Any]:
        engine = ScriptedEngine(play=lambda number: delays * (number * 7 % 3))
        with served(engine) as urls, rollouts_of(settings_of(), urls, tmp_path / name) as rollouts:
            taken = take_all(rollouts, 3)
        for version, batch in enumerate(taken):
            assert batch.is_full
            assert versions_of(batch) == {version}
            assert len(batch.groups) == 4
            assert all(has_signal(group, settings_of()) for group in batch.groups)
            assert batch.num_asked == 4 + batch.num_without_signal
            assert (batch.num_garbage, batch.num_stale, batch.num_errors) == (0, 0, 0)
        return [bits_of(batch) for batch in taken]

    assert run("first", 0.0) == run("second", 0.03)


def test_samples_are_judged_on_their_text_without_the_stop_token(tmp_path: Path) -> None:
    rewarder = FirstIsEven()
    with served(ScriptedEngine()) as urls, rollouts_of(settings_of(), urls, tmp_path, rewarder) as rollouts:
        (batch,) = take_all(rollouts, 1)
    sample = batch.groups[0].samples[0]
    assert sample.text == f"{sample.token_ids[0]} {sample.token_ids[1]}"
    assert sample.reward == float(sample.token_ids[0] % 2 == 0)
    assert (sample.engine, sample.chip, sample.parts) == ("engine-0", "scripted", {"first_is_even": sample.reward})
    assert rewarder.seen[0].num_tokens == 3
    assert rewarder.closed
    assert batch.tokens_by_engine == {"engine-0": 3 * 4 * batch.num_asked}
    assert batch.mean_answer_tokens == 3.0
    assert 0.0 < batch.shares.waited_s <= batch.shares.wall_s


def test_with_staleness_the_next_batch_is_made_while_the_trainer_works(tmp_path: Path) -> None:
    engine = ScriptedEngine(play=lambda number: 0.05, max_batch_size=16)
    with served(engine) as urls, rollouts_of(settings_of(1), urls, tmp_path) as rollouts:
        taken = []
        for version in range(5):
            rollouts.publish(version, write_nothing)
            taken.append(rollouts.take(version))
            time.sleep(0.4)  # the trainer works
    for version, batch in enumerate(taken):
        assert batch.is_full
        assert versions_of(batch) <= {version - 1, version}
        assert batch.num_stale == 0
    assert taken[3].shares.waited_s < taken[3].shares.wall_s / 2
    assert taken[3].shares.both_s > 0.0
    used = [number for batch in taken for number in numbers_of(batch)]
    assert len(set(used)) == len(used)


@pytest.mark.parametrize("play", ["length", "nan", "vocabulary", "no json", "500"])
def test_garbage_is_counted_told_and_asked_again(tmp_path: Path, play: str) -> None:
    told = Told()
    engine = ScriptedEngine(play=lambda number: play if number % 3 == 1 else "good")
    with served(engine) as urls, rollouts_of(settings_of(), urls, tmp_path, told=told) as rollouts:
        (batch,) = take_all(rollouts, 1)
    assert len(batch.groups) == 4
    assert batch.num_retried > 0
    assert batch.num_garbage == (0 if play == "500" else batch.num_retried)
    lines = told.of("bad answer")
    assert lines
    assert all("engine-0" in line for line in lines)
    assert not told.of("ENGINE DROPPED")
    assert told.threads == {threading.get_ident()}


def test_an_engine_of_garbage_is_dropped_loudly_and_the_other_one_goes_on(tmp_path: Path) -> None:
    told = Told()
    bad, good = ScriptedEngine(play=lambda number: "nan"), ScriptedEngine()
    with served(bad, good) as urls, rollouts_of(settings_of(), urls, tmp_path, told=told) as rollouts:
        taken = take_all(rollouts, 1)
        while not told.of("ENGINE DROPPED") and len(taken) < 50:  # the other one may be quick enough for a few batches
            taken += take_all(rollouts, 1, len(taken))
        num_loads = len(bad.loads)
        taken += take_all(rollouts, 2, len(taken))
        assert len(bad.loads) == num_loads  # it gets no more weights
    assert all(len(batch.groups) == 4 for batch in taken)
    assert {sample.engine for batch in taken for group in batch.groups for sample in group.samples} == {"engine-1"}
    (line,) = told.of("ENGINE DROPPED")
    assert "engine-0" in line
    assert "nan" in line
    assert sum(batch.num_garbage for batch in taken) >= 3


def test_with_no_engine_left_the_error_says_what_each_said(tmp_path: Path) -> None:
    garbage, failing = ScriptedEngine(play=lambda number: "length"), ScriptedEngine(refuse_weights=True)
    with served(garbage, failing) as urls, rollouts_of(settings_of(), urls, tmp_path) as rollouts:
        rollouts.publish(0, write_nothing)
        with pytest.raises(RolloutError) as raised:
            rollouts.take(0)
    assert "engine-0: too many bad answers in a row" in raised.value.problem
    assert "engine-1: weights of version 0" in raised.value.problem
    assert "these weights have a NaN" in raised.value.problem


def test_an_engine_that_is_not_there_is_told_at_the_first_publication(tmp_path: Path) -> None:
    with (
        rollouts_of(settings_of(), ["http://127.0.0.1:9"], tmp_path) as rollouts,
        pytest.raises(RolloutError, match="ConnectError"),
    ):
        rollouts.publish(0, write_nothing)


def test_wrong_weights_are_loaded_again_and_then_the_engine_is_dropped(tmp_path: Path) -> None:
    told = Told()
    once = ScriptedEngine(play=lambda number: "wrong version" if number == 0 else "good")
    with served(once) as urls, rollouts_of(settings_of(), urls, tmp_path / "a", told=told) as rollouts:
        (batch,) = take_all(rollouts, 1)
    assert len(once.loads) == 2
    assert batch.num_garbage == 1
    assert not told.of("ENGINE DROPPED")
    always, good = ScriptedEngine(play=lambda number: "wrong version"), ScriptedEngine()
    with served(always, good) as urls, rollouts_of(settings_of(), urls, tmp_path / "b", told=told) as rollouts:
        batches = take_all(rollouts, 1)
        while (
            not told.of("ENGINE DROPPED") and len(batches) < 50
        ):  # the other one may be quick enough for a few batches
            batches += take_all(rollouts, 1, len(batches))
    assert len(always.loads) >= 2
    assert "-000000000000" in told.of("ENGINE DROPPED")[0]
    assert [versions_of(batch) for batch in batches] == [{version} for version in range(len(batches))]


def test_wrong_answers_that_come_together_are_one_reason_to_load_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring_up = Upkeep._bring_up

    async def bring_up_late(self: Upkeep, member: Member) -> None:
        if member.offered:  # the weights are loaded again: all answers that were under way come before that
            await asyncio.sleep(0.3)
        await bring_up(self, member)

    monkeypatch.setattr(Upkeep, "_bring_up", bring_up_late)
    told = Told()
    engine = ScriptedEngine(play=lambda number: "wrong version" if number < 3 else "good")
    with served(engine) as urls, rollouts_of(settings_of(), urls, tmp_path, told=told) as rollouts:
        (batch,) = take_all(rollouts, 1)
    assert not told.of("ENGINE DROPPED")
    assert len(engine.loads) == 2
    assert batch.num_garbage == 3


def test_an_engine_that_hangs_is_passed_over(tmp_path: Path) -> None:
    told = Told()
    hanging, good = ScriptedEngine(play=lambda number: "hang"), ScriptedEngine()
    settings = settings_of(rollouts_timeout_s=0.5)
    with served(hanging, good) as urls, rollouts_of(settings, urls, tmp_path, told=told) as rollouts:
        (batch,) = take_all(rollouts, 1)
        assert len(batch.groups) == 4
        assert batch.num_retried >= 1
        wait_until(lambda: hanging.at_once == 0, "its requests were cancelled")
    assert "no answer within 0.5 s" in told.of("bad answer")[0]


@pytest.mark.usefixtures("impatient")
def test_an_engine_that_falls_silent_is_not_waited_for_until_its_answer_is_due(tmp_path: Path) -> None:
    told = Told()
    silent, good = ScriptedEngine(play=lambda number: "hang"), ScriptedEngine()
    settings = settings_of(rollouts_timeout_s=600.0)
    with served(silent, good) as urls, rollouts_of(settings, urls, tmp_path, told=told) as rollouts:
        rollouts.publish(0, write_nothing)
        silent.is_well = False
        batch = rollouts.take(0)
    assert len(batch.groups) == 4
    assert "engine-0: unreachable: silent for 0.5 s" in told.of("bad answer")[0]


@pytest.mark.usefixtures("impatient")
def test_an_engine_that_takes_long_and_says_that_it_is_well_is_waited_for(tmp_path: Path) -> None:
    told = Told()
    with (
        served(ScriptedEngine(play=lambda number: 2.0)) as urls,
        rollouts_of(settings_of(rollouts_timeout_s=60.0), urls, tmp_path, told=told) as rollouts,
    ):
        (batch,) = take_all(rollouts, 1)
    assert len(batch.groups) == 4
    assert not told.lines


def test_connections_that_break_are_asked_again(tmp_path: Path) -> None:
    engine = ScriptedEngine(play=lambda number: "close" if number in (0, 3) else "good")
    with served(engine) as urls, rollouts_of(settings_of(), urls, tmp_path) as rollouts:
        (batch,) = take_all(rollouts, 1)
    assert len(batch.groups) == 4
    assert batch.num_retried >= 2


def test_an_engine_that_has_too_much_to_do_is_asked_later(tmp_path: Path) -> None:
    told = Told()
    engine = ScriptedEngine(play=lambda number: "429" if number < 5 else "good")
    with served(engine) as urls, rollouts_of(settings_of(), urls, tmp_path, told=told) as rollouts:
        (batch,) = take_all(rollouts, 1)
    assert len(batch.groups) == 4
    ((event, detail, action),) = told.lines  # once, however often it says so
    assert (event, "too many" in detail) == ("engine busy", True)
    assert "given up" in action


def test_an_engine_that_says_nothing_but_that_it_is_busy_is_given_up(tmp_path: Path) -> None:
    told = Told()
    busy = ScriptedEngine(play=lambda number: "429")
    settings = settings_of(rollouts_timeout_s=0.5)
    with served(busy) as urls, rollouts_of(settings, urls, tmp_path / "a", told=told) as rollouts:
        rollouts.publish(0, write_nothing)
        with pytest.raises(RolloutError, match=r"nothing but busy: .*too many for 0\.5 s"):
            rollouts.take(0)
    assert "nothing but busy" in told.of("ENGINE DROPPED")[0]


def test_an_engine_that_refuses_what_another_one_answers_is_dropped(tmp_path: Path) -> None:
    told = Told()
    refusing, good = ScriptedEngine(play=lambda number: "400"), ScriptedEngine()
    with served(refusing, good) as urls, rollouts_of(settings_of(), urls, tmp_path, told=told) as rollouts:
        batches = take_all(rollouts, 1)
        while not told.of("ENGINE DROPPED") and len(batches) < 50:
            batches += take_all(rollouts, 1, len(batches))
        num_asked = len(refusing.bodies)
        batches += take_all(rollouts, 1, len(batches))
    assert len(refusing.bodies) == num_asked
    assert "it refused 3 problems in a row that others answered" in told.of("ENGINE DROPPED")[0]
    assert all(len(batch.groups) == 4 for batch in batches)


@pytest.mark.parametrize("address", ["http://[::1", "http://127.0.0.1:99999"])
def test_an_address_that_is_none_is_refused_and_the_others_go_on(tmp_path: Path, address: str) -> None:
    told = Told()
    with served(ScriptedEngine()) as urls, rollouts_of(settings_of(), [address, *urls], tmp_path, told=told) as made:
        (batch,) = take_all(made, 1)
    assert len(batch.groups) == 4
    assert "is no address" in told.of("ENGINE DROPPED")[0]


def test_a_defect_ends_the_wait_for_new_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: Any) -> None:
        raise ZeroDivisionError("a defect of ours")

    monkeypatch.setattr("crosschip.train.rl.rollouts.engine.HttpEngine.load", fail)
    with (
        served(ScriptedEngine()) as urls,
        rollouts_of(settings_of(), urls, tmp_path) as rollouts,
        pytest.raises(ZeroDivisionError, match="a defect of ours"),
    ):
        rollouts.publish(0, write_nothing)


@pytest.mark.parametrize("spoilt", [{"crosschip": None}, {"owned_by": ["crosschip"]}, {"crosschip": {"x": 1}, "id": 3}])
def test_a_list_of_models_of_another_form_is_no_defect(tmp_path: Path, spoilt: dict[str, Any]) -> None:
    odd, good = ScriptedEngine(card=spoilt), ScriptedEngine()
    with served(odd, good) as urls, rollouts_of(settings_of(), urls, tmp_path) as rollouts:
        (batch,) = take_all(rollouts, 1)
    assert len(batch.groups) == 4


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"choices": [' + b"9" * 5_000 + b"]}"])
def test_json_that_python_does_not_read_is_garbage(tmp_path: Path, body: bytes) -> None:
    told = Told()
    engine = ScriptedEngine(play=lambda number: body if number == 0 else "good")
    with served(engine) as urls, rollouts_of(settings_of(), urls, tmp_path, told=told) as rollouts:
        (batch,) = take_all(rollouts, 1)
    assert (len(batch.groups), batch.num_garbage) == (4, 1)
    assert "no JSON that can be read" in told.of("bad answer")[0]


def test_an_answer_without_end_is_garbage_before_it_fills_the_memory(tmp_path: Path) -> None:
    told = Told()
    engine = ScriptedEngine(play=lambda number: "good" if number else "endless")
    with served(engine) as urls, rollouts_of(settings_of(), urls, tmp_path, told=told) as rollouts:
        (batch,) = take_all(rollouts, 1)
    assert (len(batch.groups), batch.num_garbage) == (4, 1)
    assert "an answer of more than 2 MiB" in told.of("bad answer")[0]
    assert engine.num_parts * 2**16 < 64 * 2**20  # the cap, and what waits between the two


def test_a_list_of_models_without_end_is_garbage() -> None:
    async def identify(url: str) -> None:
        client = HttpEngine(url, None, timeout_s=30.0, wants_routes=False)
        try:
            with pytest.raises(BadAnswer, match="garbage: /v1/models: an answer of more than 1 MiB"):
                await client.identify()
            assert not await client.is_well()
        finally:
            await client.close()

    with served(ScriptedEngine(endless_models=True)) as (url,):
        asyncio.run(identify(url))


def test_words_of_an_engine_can_be_written_down(tmp_path: Path) -> None:
    told = Told()
    engine = ScriptedEngine(play=lambda number: "400" if number else "500", fails_with="\ud800 is no letter")
    with served(engine) as urls, rollouts_of(settings_of(), urls, tmp_path, told=told) as rollouts:
        rollouts.publish(0, write_nothing)
        with pytest.raises(RolloutError) as raised:
            rollouts.take(0)
    assert str(raised.value).encode()
    assert all(" ".join(line).encode() for line in told.lines)


def test_an_engine_that_is_slow_to_say_who_it_is_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crosschip.train.rl.rollouts.engine._ASK_WHO_S", 0.2)
    monkeypatch.setattr("crosschip.train.rl.rollouts.upkeep._PROBE_EVERY_S", 0.1)
    told = Told()
    engine = ScriptedEngine(slow_answers=2)
    with served(engine) as urls, rollouts_of(settings_of(), urls, tmp_path, told=told) as rollouts:
        (batch,) = take_all(rollouts, 1)
    assert len(batch.groups) == 4
    assert not told.lines


def test_an_engine_that_was_slow_to_say_who_it_is_may_return(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crosschip.train.rl.rollouts.upkeep.MOST_SILENCE_S", 0.0)
    monkeypatch.setattr("crosschip.train.rl.rollouts.engine._ASK_WHO_S", 0.5)
    told = Told()
    slow, good = ScriptedEngine(slow_answers=1, slow_s=1.0), ScriptedEngine()
    with served(slow, good) as urls, rollouts_of(settings_of(), urls, tmp_path, told=told) as rollouts:
        take_all(rollouts, 1)
        assert "no answer within" in told.of("ENGINE DROPPED")[0]
        take_all(rollouts, 1, first=1)
        wait_until(lambda: bool(rollouts.state()) and bool(told.of("engine back")), "it is back")


def test_an_engine_whose_answers_were_slow_for_a_while_may_return(tmp_path: Path) -> None:
    told = Told()
    slow, good = ScriptedEngine(play=lambda number: "hang" if number < 12 else "good"), ScriptedEngine()
    settings = settings_of(rollouts_timeout_s=0.3)
    with served(slow, good) as urls, rollouts_of(settings, urls, tmp_path, told=told) as rollouts:
        first = 0
        while not told.of("ENGINE DROPPED") and first < 20:
            take_all(rollouts, 1, first=first)
            first += 1
        assert "slow" in told.of("ENGINE DROPPED")[0]
        slow.play = lambda number: "good"
        take_all(rollouts, 1, first=first)
        wait_until(lambda: bool(rollouts.state()) and bool(told.of("engine back")), "it is back")


def test_a_request_that_all_refuse_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    engines = ScriptedEngine(play=lambda number: "400"), ScriptedEngine(play=lambda number: "400")
    with served(*engines) as urls, rollouts_of(settings_of(), urls, tmp_path) as rollouts:
        rollouts.publish(0, write_nothing)
        with pytest.raises(RolloutError, match="the prompt is too long"):
            rollouts.take(0)


def test_a_slow_engine_takes_less_and_none_more_than_it_can_hold(tmp_path: Path) -> None:
    slow, fast = ScriptedEngine(play=lambda number: 0.4), ScriptedEngine(play=lambda number: 0.02)
    settings = settings_of(1, prompts=12)
    with served(slow, fast) as urls, rollouts_of(settings, urls, tmp_path) as rollouts:
        taken = take_all(rollouts, 2)
    tokens = {name: sum(batch.tokens_by_engine.get(name, 0) for batch in taken) for name in ("engine-0", "engine-1")}
    assert tokens["engine-1"] > 2 * tokens["engine-0"] > 0
    assert max(slow.most_at_once, fast.most_at_once) <= 3  # two groups of four fill a batch of eight, and one waits


def test_engines_load_at_the_same_time(tmp_path: Path) -> None:
    engines = [ScriptedEngine(load_s=2.0) for _ in range(3)]
    with served(*engines) as urls, rollouts_of(settings_of(), urls, tmp_path) as rollouts:
        rollouts.publish(0, write_nothing)
        times = [engine.load_times[0] for engine in engines]  # all have loaded when it returns
    assert max(begun for begun, _ in times) < min(ended for _, ended in times)
    body = engines[0].loads[0]
    assert body["path"] == str(tmp_path / "version-00000000")
    assert body["in_flight"] == "finish"


def test_with_staleness_publishing_does_not_wait_for_a_slow_load(tmp_path: Path) -> None:
    slow, good = ScriptedEngine(), ScriptedEngine()
    with served(slow, good) as urls, rollouts_of(settings_of(1), urls, tmp_path) as rollouts:
        take_all(rollouts, 1)
        slow.may_load.clear()
        for version in range(1, 5):
            rollouts.publish(version, write_nothing)
            batch = rollouts.take(version)
            assert versions_of(batch) <= {version - 1, version}
        slow.may_load.set()
        wait_until(lambda: slow.names[-1].startswith("4-"), "the newest is loaded, and those between are skipped")
        assert len(slow.loads) == 3


def test_groups_without_signal_are_dropped_until_too_many_were_tried(tmp_path: Path) -> None:
    told = Told()
    with (
        served(ScriptedEngine(never_signal=True)) as urls,
        rollouts_of(settings_of(max_groups_tried=3), urls, tmp_path, told=told) as rollouts,
    ):
        (batch,) = take_all(rollouts, 1)
    assert numbers_of(batch) == [0, 1, 2, 3]
    assert not batch.is_full
    assert (batch.num_asked, batch.num_without_signal) == (12, 12)
    assert "0 of 4 groups have a signal" in told.of("batch without signal")[0]


def test_rewards_that_fail_are_counted_and_too_many_end_the_run(tmp_path: Path) -> None:
    told, few = Told(), FirstIsEven(fails=lambda attempt: attempt.question == "question 1")
    with served(ScriptedEngine()) as urls:
        settings = settings_of(max_error_share=0.6, drop_without_signal=False)
        with rollouts_of(settings, urls, tmp_path / "a", few, told) as rollouts:
            (batch,) = take_all(rollouts, 1)
        assert batch.num_errors == 4
        failed = batch.groups[1].samples[0]
        assert failed.reward is None
        assert failed.error is not None
        assert "first_is_even" in told.of("rewards failed")[0]
        with rollouts_of(settings_of(), urls, tmp_path / "b", FirstIsEven(fails=lambda _: True)) as rollouts:
            rollouts.publish(0, write_nothing)
            with pytest.raises(RolloutError, match="first_is_even") as raised:
                rollouts.take(0)
    assert raised.value.problem.count("first_is_even") == 3
    (line,) = told.of("reward failed")
    assert line.startswith("problem 1: checker 'first_is_even' failed")


def test_rewards_that_fail_are_told_at_once_and_end_the_run_before_the_batch_is_full(tmp_path: Path) -> None:
    told, failing = Told(), FirstIsEven(fails=lambda _: True)
    engine = ScriptedEngine(play=lambda number: 0.0 if number < 5 else "hang")
    settings = settings_of(prompts=32)
    with served(engine) as urls, rollouts_of(settings, urls, tmp_path, failing, told) as rollouts:
        rollouts.publish(0, write_nothing)
        with pytest.raises(RolloutError, match="of 16 rewards failed"):
            rollouts.take(0)
    assert "checker 'first_is_even' failed" in told.of("reward failed")[0]


def test_one_problem_whose_rewards_fail_is_no_reason_to_end_early(tmp_path: Path) -> None:
    failing = FirstIsEven(fails=lambda attempt: attempt.question == "question 0")
    settings = settings_of(samples=16, prompts=8, drop_without_signal=False)
    with served(ScriptedEngine()) as urls, rollouts_of(settings, urls, tmp_path, failing) as rollouts:
        (batch,) = take_all(rollouts, 1)
    assert (batch.num_errors, len(batch.groups)) == (16, 8)


def test_a_group_has_a_signal_where_its_advantages_do(tmp_path: Path) -> None:
    """Rewards that differ are not enough: with a penalty for length equal rewards teach, and cut-off answers do not."""
    cut_off = ScriptedEngine(cuts_off=True)
    settings = settings_of(over_long="leave out", max_groups_tried=2)
    told = Told()
    with served(cut_off) as urls, rollouts_of(settings, urls, tmp_path, told=told) as rollouts:
        (batch,) = take_all(rollouts, 1)
    assert (batch.is_full, batch.num_without_signal) == (False, 8)
    assert "0 of 4 groups have a signal" in told.of("batch without signal")[0]


def test_a_checker_that_breaks_the_contract_is_a_defect_and_no_hang(tmp_path: Path) -> None:
    class Broken(FirstIsEven):
        def judge(self, attempts: Any, /) -> Any:
            return []

    with served(ScriptedEngine()) as urls, rollouts_of(settings_of(), urls, tmp_path, Broken()) as rollouts:
        rollouts.publish(0, write_nothing)
        with pytest.raises(RuntimeError):
            rollouts.take(0)


def test_problems_that_cannot_be_made_end_the_run(tmp_path: Path) -> None:
    def fail(number: int) -> Any:
        raise ValueError(f"no problem {number}")

    with served(ScriptedEngine()) as urls, rollouts_of(settings_of(), urls, tmp_path, problems=fail) as rollouts:
        rollouts.publish(0, write_nothing)
        with pytest.raises(ValueError, match="no problem 0"):
            rollouts.take(0)


def test_a_dropped_engine_gets_nothing_and_its_answers_are_not_used(tmp_path: Path) -> None:
    engines = ScriptedEngine(play=lambda number: 0.02), ScriptedEngine(play=lambda number: 0.02)
    with served(*engines) as urls, rollouts_of(settings_of(1), urls, tmp_path) as rollouts:
        take_all(rollouts, 1)
        rollouts.drop_engine("engine-0", "its log-probs are not those of the trainer")
        taken = take_all(rollouts, 1, first=1)  # meanwhile what was under way to it has arrived
        num_asked = len(engines[0].bodies)
        taken += take_all(rollouts, 2, first=2)
        assert len(engines[0].bodies) == num_asked
    for batch in taken:
        assert {sample.engine for group in batch.groups for sample in group.samples} == {"engine-1"}


def test_an_engine_of_an_earlier_run_can_be_dropped_and_its_answers_are_not_used(tmp_path: Path) -> None:
    with served(ScriptedEngine()) as urls:
        with rollouts_of(settings_of(1), urls, tmp_path / "a") as rollouts:
            take_all(rollouts, 1)
            wait_until(lambda: len(rollouts.state()["finished"]) == 4, "the next batch is there")
            state = rollouts.state()
        for group in state["finished"]:
            for sample in group["samples"]:
                sample["engine"] = "engine-of-then"
        with rollouts_of(settings_of(1), urls, tmp_path / "b") as rollouts:
            rollouts.restore(state)
            rollouts.drop_engine("engine-of-then", "its log-probs are not those of the trainer")
            (batch,) = take_all(rollouts, 1, first=1)
    assert len(batch.groups) == 4
    assert {sample.engine for group in batch.groups for sample in group.samples} == {"engine-0"}


def test_the_problems_of_a_batch_that_is_given_back_are_asked_again_and_counted(tmp_path: Path) -> None:
    with served(ScriptedEngine()) as urls, rollouts_of(settings_of(), urls, tmp_path) as rollouts:
        (before,) = take_all(rollouts, 1)
        assert rollouts.give_back() == len(before.groups) == 4
        assert set(numbers_of(before)) <= set(rollouts.state()["ask_again"])
        (after,) = take_all(rollouts, 1, first=1)
    assert (before.num_given_back, after.num_given_back) == (0, 4)


def test_an_engine_that_comes_back_is_taken_back_at_the_next_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crosschip.train.rl.rollouts.upkeep.MOST_SILENCE_S", 0.5)
    told = Told()
    away, good = ScriptedEngine(play=lambda number: "hang"), ScriptedEngine()
    settings = settings_of(rollouts_timeout_s=0.5)
    with served(away, good) as urls, rollouts_of(settings, urls, tmp_path, told=told) as rollouts:
        rollouts.publish(0, write_nothing)
        away.is_well = False
        rollouts.take(0)
        wait_until(lambda: bool(rollouts.state()) and bool(told.of("ENGINE DROPPED")), "it was dropped")
        away.is_well, away.play = True, lambda number: "good"
        take_all(rollouts, 1, first=1)
        wait_until(lambda: bool(rollouts.state()) and bool(told.of("engine back")), "it is back")
        batch = take_all(rollouts, 1, first=2)[0]
    assert "engine-0" in batch.tokens_by_engine


def test_the_key_of_the_environment_goes_with_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "csk-secret")
    engine = ScriptedEngine()
    with served(engine) as urls, rollouts_of(settings_of(), urls, tmp_path) as rollouts:
        rollouts.publish(0, write_nothing)
    assert engine.keys == {"Bearer csk-secret"}


def test_other_servers_are_refused_by_name(tmp_path: Path) -> None:
    with (
        served(ScriptedEngine(kind="llamacpp")) as urls,
        rollouts_of(settings_of(), urls, tmp_path) as rollouts,
        pytest.raises(RolloutError, match="owned_by='llamacpp'"),
    ):
        rollouts.publish(0, write_nothing)


def test_closing_ends_what_waits_and_can_be_done_twice(tmp_path: Path) -> None:
    engine = ScriptedEngine(play=lambda number: "hang")
    errors: list[BaseException] = []
    with served(engine) as urls, rollouts_of(settings_of(), urls, tmp_path) as rollouts:
        rollouts.publish(0, write_nothing)

        def wait() -> None:
            try:
                rollouts.take(0)
            except BaseException as error:
                errors.append(error)

        waiting = threading.Thread(target=wait)
        waiting.start()
        wait_until(lambda: engine.at_once == 3, "requests are under way")
        rollouts.close()
        waiting.join(10)
        assert not waiting.is_alive()
        rollouts.close()
        wait_until(lambda: engine.at_once == 0, "its requests were cancelled")
    assert isinstance(errors[0], RolloutError)
