"""What is under way when a run stops, and what became too old meanwhile."""

from __future__ import annotations

import json
import time
from pathlib import Path

from tests.train.rl.rollouts.rollout_parts import (
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


def test_a_resumed_run_goes_on_with_the_same_batches(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    with served(engine) as urls:
        with rollouts_of(settings_of(), urls, tmp_path / "a") as rollouts:
            take_all(rollouts, 2)
            state = json.loads(json.dumps(rollouts.state()))
            expected = [bits_of(batch) for batch in take_all(rollouts, 2, first=2)]
        with rollouts_of(settings_of(), urls, tmp_path / "b") as rollouts:
            rollouts.restore(state)
            assert [bits_of(batch) for batch in take_all(rollouts, 2, first=2)] == expected
            rollouts.restore(state)  # training was rolled back
            assert [bits_of(batch) for batch in take_all(rollouts, 2, first=2)] == expected
    assert (state["finished"], state["ask_again"]) == ([], [])


def test_finished_groups_and_those_under_way_go_over_to_the_resumed_run(tmp_path: Path) -> None:
    engine = ScriptedEngine(play=lambda number: 0.0 if number < 6 else "hang")
    settings = settings_of(1, drop_without_signal=False)
    with served(engine) as urls:
        with rollouts_of(settings, urls, tmp_path / "a") as rollouts:
            (first,) = take_all(rollouts, 1)
            wait_until(lambda: len(rollouts.state()["finished"]) == 2, "two more are there")
            state = json.loads(json.dumps(rollouts.state()))
        assert state["version"] == 0
        assert len(state["ask_again"]) == 2
        engine.play = lambda number: "good"
        with rollouts_of(settings, urls, tmp_path / "b") as rollouts:
            rollouts.restore(state)
            (second,) = take_all(rollouts, 1, first=1)
    assert not set(numbers_of(first)) & set(numbers_of(second))
    assert {group["problem"]["number"] for group in state["finished"]} <= set(numbers_of(second))
    assert versions_of(second) == {0, 1}


def test_what_is_too_old_is_dropped_and_counted(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    with served(engine) as urls, rollouts_of(settings_of(1), urls, tmp_path) as rollouts:
        take_all(rollouts, 1)
        wait_until(lambda: len(rollouts.state()["finished"]) == 4, "the next batch is there")
        rollouts.publish(3, write_nothing)  # the trainer went on without them
        batch = rollouts.take(3)
    assert versions_of(batch) <= {3}
    assert batch.num_stale >= 4


def test_problems_that_are_begun_again_count_for_what_an_engine_can_hold(tmp_path: Path) -> None:
    hanging, good = ScriptedEngine(play=lambda number: "hang"), ScriptedEngine()
    with (
        served(hanging, good) as urls,
        rollouts_of(settings_of(1, rollouts_timeout_s=60.0), urls, tmp_path) as rollouts,
    ):
        driver, held = rollouts._driver, []
        member = driver._fleet.upkeep.members[0]
        for version in range(8):  # each second batch leaves what the first engine has behind as too old
            rollouts.publish(version, write_nothing)
            rollouts.take(version)
            for _ in range(5):
                rollouts.state()  # of the event loop, which has time to begin more
                held.append(len(member.requests))
                time.sleep(0.02)
            wait_until(lambda: sorted(driver._groups) == driver._ledger.under_way, "each has a task that answers it")
            assert len(member.groups) == len(member.requests)
    assert max(held) <= 3
