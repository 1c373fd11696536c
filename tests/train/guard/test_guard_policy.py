"""What is decided about a step, and that every remedy ends."""

from __future__ import annotations

import json
import math
import random
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from crosschip.recipe import GuardSettings
from crosschip.train.guard.hook import GuardError, ReplayStep, RollBack, StepGuard
from crosschip.train.guard.observed import Event, StepNumbers
from crosschip.train.guard.policy import GuardPolicy
from crosschip.train.guard.replicas import find_disagreement

NAN = StepNumbers(math.nan, math.nan)


def good(step: int) -> StepNumbers:
    drawn = random.Random(step)
    return StepNumbers(2.0 * math.exp(drawn.gauss(0.0, 0.02)), math.exp(drawn.gauss(0.0, 0.2)))


def policy(warmup_steps: int = 0, chip: str = "chip0", **settings: object) -> GuardPolicy:
    return GuardPolicy(GuardSettings.model_validate(settings), warmup_steps, chip, "the last good checkpoint")


def learned(steps: int = 100, **settings: object) -> GuardPolicy:
    made = policy(**settings)
    for step in range(1, steps + 1):
        assert made.judge(step, good(step)).action == ("replay" if is_audit(step, settings) else "update")
        if is_audit(step, settings):
            assert made.judge(step, good(step)).action == "update"
    return made


def is_audit(step: int, settings: dict[str, object]) -> bool:
    return bool(settings.get("audit_every")) and step % int(str(settings["audit_every"])) == 0


def decide(made: GuardPolicy, step: int, *runs: StepNumbers) -> tuple[str, Event | None]:
    """Hand in the computations of a step; all but the last must ask for a replay."""
    for numbers in runs[:-1]:
        assert made.judge(step, numbers).action == "replay"
    decision = made.judge(step, runs[-1])
    return decision.action, decision.event


def told(decision: tuple[str, Event | None]) -> Event:
    assert decision[1] is not None
    return decision[1]


def test_a_good_step_is_an_update_without_a_word() -> None:
    assert decide(learned(), 101, good(101)) == ("update", None)


def test_what_is_gone_in_the_replay_was_a_passing_fault_of_the_chip() -> None:
    action, event = decide(learned(), 101, NAN, good(101))
    assert action == "update"
    assert event is not None
    assert (event.step, event.event) == (101, "transient-fault")
    assert event.detail.startswith("chip0: loss nan, gradient norm nan; computed again: loss ")
    assert event.action == "went on with the replay (1 of 3)"


def test_too_many_passing_faults_end_the_run_and_old_ones_are_forgotten() -> None:
    made = learned(max_transient_faults=2)
    assert decide(made, 101, NAN, good(101))[0] == "update"
    assert decide(made, 102, NAN, good(102))[0] == "update"
    assert decide(made, 1102, NAN, good(1102))[0] == "update", "the first two are long ago"
    assert decide(made, 1103, NAN, good(1103))[0] == "update"
    action, event = decide(made, 1104, NAN, good(1104))
    assert action == "stop"
    assert event is not None
    assert "that was fault 3 within 1000 steps" in event.detail


@pytest.mark.parametrize(("chip", "action"), [("chip0", "stop"), ("chip1", "update"), ("chip01", "update")])
def test_faults_of_another_chip_are_not_this_ones(chip: str, action: str) -> None:
    events = [asdict(told(decide(learned(), step, NAN, good(step)))) for step in (101, 102, 103)]
    elsewhere = policy(chip=chip)
    elsewhere.remember([], events, 103)
    assert decide(elsewhere, 104, NAN, good(104))[0] == action


@pytest.mark.parametrize(("later", "action"), [(899, "stop"), (999, "roll-back")])
def test_a_roll_back_long_ago_is_forgotten(later: int, action: str) -> None:
    made = learned(max_skips=0, max_roll_backs=1)
    assert decide(made, 101, NAN, NAN)[0] == "roll-back"
    for step in range(81, 102 + later):
        assert made.judge(step, good(step)).action == "update"
    assert decide(made, 102 + later, NAN, NAN)[0] == action


def test_who_goes_on_after_a_stop_has_new_roll_backs() -> None:
    made = learned(max_skips=0, max_roll_backs=1)
    events = [asdict(told(decide(made, step, NAN, NAN))) for step in (101, 102)]
    interrupted, stopped = (policy(max_skips=0, max_roll_backs=1) for _ in range(2))
    interrupted.remember([], events[:1], 100)
    stopped.remember([], events, 100)
    assert decide(interrupted, 101, NAN, NAN)[0] == "stop", "a restart by the supervisor has none"
    assert decide(stopped, 101, NAN, NAN)[0] == "roll-back"
    assert decide(stopped, 102, NAN, NAN)[0] == "stop", "and this ends, too"


def test_what_is_still_there_is_skipped_then_rolled_back_then_stopped() -> None:
    made = learned(max_skips=2, max_roll_backs=2)
    actions = [decide(made, step, NAN, NAN)[0] for step in range(101, 110)]
    assert actions == ["skip", "skip", "roll-back", "skip", "skip", "roll-back", "skip", "skip", "stop"]


def test_the_end_says_what_was_tried() -> None:
    made = learned(max_skips=1, max_roll_backs=1)
    for step in range(101, 104):
        decide(made, step, NAN, NAN)
    action, event = decide(made, 104, NAN, NAN)
    assert action == "stop"
    assert event is not None
    assert event.detail.endswith("the replay gave the same; tried before: 1 skipped batches lately, 1 roll-backs")


def test_skips_far_apart_are_each_their_own_trouble() -> None:
    made = learned(max_skips=1)
    for step in (101, 160, 220, 280):
        assert decide(made, step, NAN, NAN)[0] == "skip"


def test_a_roll_back_goes_past_the_data() -> None:
    made = learned(max_skips=0)
    assert made.judge(101, NAN).action == "replay"
    decision = made.judge(101, NAN)
    assert (decision.action, decision.past_the_data) == ("roll-back", True)
    assert decision.event is not None
    assert decision.event.action == "rolled back to the last good checkpoint, and on past this data (1 of 2)"


SPIKE = StepNumbers(8.0, 1.0)


@pytest.mark.parametrize(("on_spike", "action"), [("skip", "skip"), ("roll-back", "roll-back"), ("warn", "update")])
def test_a_spike_is_treated_as_the_recipe_says(on_spike: str, action: str) -> None:
    found, event = decide(learned(on_spike=on_spike), 101, SPIKE, SPIKE)
    assert found == action
    assert event is not None
    assert event.event == "loss-spike"
    assert event.detail.startswith("the loss 8 stands ")


def test_a_gradient_spike_is_one_only_after_the_warm_up() -> None:
    spike = StepNumbers(2.0, 1000.0)
    for warmup_steps, actions in ((0, ("replay", "skip")), (200, ("update",))):
        made = policy(warmup_steps=warmup_steps)
        for step in range(1, 101):
            assert made.judge(step, good(step)).action == "update"
        assert tuple(made.judge(101, spike).action for _ in actions) == actions


def test_what_is_not_finite_is_never_waved_through() -> None:
    assert decide(learned(on_spike="warn"), 101, NAN, NAN)[0] == "skip"
    assert decide(policy(warmup_steps=50), 1, NAN, NAN)[0] == "skip"


def test_a_stuck_loss_goes_back_at_once_as_other_data_does_not_help() -> None:
    made = learned()
    for step in range(101, 105):
        assert made.judge(step, StepNumbers(2.0, 1.0)).action == "update"
    assert decide(made, 105, StepNumbers(2.0, 1.0), StepNumbers(2.0, 1.0))[0] == "roll-back"


def test_a_number_at_the_border_of_the_limit_is_no_fault() -> None:
    made = learned(max_transient_faults=0)
    made._loss.look = lambda value: None if value < 2.5 else SpikeFound  # type: ignore[method-assign,assignment,return-value]
    action, event = decide(made, 101, StepNumbers(2.5001, 1.0), StepNumbers(2.4999, 1.0))
    assert action == "update"
    assert event is not None
    assert (event.event, event.action) == ("loss-spike", "went on")


class SpikeFound:
    kind, detail = "loss-spike", "just above"


def test_audits_replay_good_steps_and_see_a_silent_error() -> None:
    made = learned(audit_every=10)
    right, wrong = good(110), StepNumbers(math.nextafter(good(110).loss, 9.0), good(110).gradient_norm)
    for step in range(101, 110):
        made.judge(step, good(step))
    for runs in ((right, wrong, right), (wrong, right, right)):
        action, event = decide(made, 110, *runs)
        assert action == "update"
        assert event is not None
        assert (event.event, wrong.loss.__repr__() in event.detail) == ("transient-fault", True)


def test_a_chip_that_never_repeats_itself_is_not_accused() -> None:
    made = policy(audit_every=1)
    drawn = random.Random(1)

    def noisy() -> StepNumbers:
        return StepNumbers(2.0 * (1 + 1e-4 * drawn.random()), 1.0 * (1 + 1e-4 * drawn.random()))

    assert made.judge(1, noisy()).action == "replay"
    assert made.judge(1, noisy()).action == "replay"
    decision = made.judge(1, noisy())
    assert decision.action == "update"
    assert decision.event is not None
    assert decision.event.event == "not-repeatable"
    for step in range(2, 500):
        assert decide(made, step, noisy(), noisy()) == ("update", None)
    action, event = decide(made, 500, noisy(), StepNumbers(2.2, 1.0), noisy())
    assert action == "update"
    assert event is not None
    assert event.event == "transient-fault", "an error beyond rounding is still seen"


def test_no_series_of_bad_steps_goes_on_for_ever() -> None:
    for seed in range(20):
        drawn, made = random.Random(seed), policy(audit_every=3)
        for step in range(1, 400):
            decision = made.judge(step, NAN if drawn.random() < 0.5 else good(step))
            for _ in range(2):
                if decision.action == "replay":
                    decision = made.judge(step, NAN if drawn.random() < 0.5 else good(step))
            assert decision.action != "replay", "three computations at most"
            if decision.action == "stop":
                break
        else:
            pytest.fail("half of all steps are bad, and it never stops")


def test_replicas_that_differ_go_back_and_then_it_ends() -> None:
    made = learned(max_roll_backs=1)
    found = find_disagreement({"group 0": 1, "group 1": 1, "group 2": 7})
    assert found is not None
    first, second = made.judge_replicas(120, found), made.judge_replicas(140, found)
    assert (first.action, first.past_the_data, second.action) == ("roll-back", False, "stop")
    assert first.event is not None
    assert first.event.detail.startswith("the weights of group 2 differ from those of the majority")


def write_logs(directory: Path, guard_of: Callable[[Callable[[Event], None]], StepGuard], steps: int) -> list[str]:
    """Run a guard over steps of which some are bad, with logs as the loop writes them."""
    told: list[Event] = []
    guard = guard_of(told.append)
    done = []
    with (directory / "metrics.jsonl").open("w") as metrics:
        for step in range(1, steps + 1):
            numbers = SPIKE if step in (90, 91, 95) else good(step)
            action = outcome(guard, step, numbers)
            done.append(action)
            if action == "update":
                record = {"step": step, "loss": numbers.loss, "gradient_norm": numbers.gradient_norm}
                metrics.write(json.dumps(record) + "\n")
    lines = [json.dumps(event.__dict__) for event in told]
    (directory / "events.jsonl").write_text("\n".join(lines) + "\n" + '{"step": 3, "torn')
    return done


def outcome(guard: StepGuard, step: int, numbers: StepNumbers) -> str:
    try:
        try:
            return guard.judge(step, numbers)
        except ReplayStep:
            return guard.judge(step, numbers)
    except RollBack:
        return "roll-back"
    except GuardError:
        return "stop"


def test_a_resumed_guard_decides_as_one_that_was_never_interrupted(tmp_path: Path) -> None:
    settings = GuardSettings(max_skips=3, max_roll_backs=1)

    def guard_of(tell: Callable[[Event], None]) -> StepGuard:
        return StepGuard(settings, 10, "chip0", tell, "a checkpoint")

    resumed, whole = guard_of(lambda event: None), guard_of(lambda event: None)
    done = write_logs(tmp_path, guard_of, 100)
    assert [done[at - 1] for at in (90, 91, 95)] == ["skip"] * 3
    with (tmp_path / "metrics.jsonl").open("a") as metrics:  # steps that a crash has cost, and a skipped one
        metrics.write('{"step": 95, "loss": null, "gradient_norm": null, "skipped": true}\n')
        metrics.write('{"step": 101, "loss": 99.0, "gradient_norm": 99.0}\n')
    for step in range(1, 101):
        outcome(whole, step, SPIKE if step in (90, 91, 95) else good(step))
    resumed.remember(tmp_path, 100)
    for step, numbers in ((101, SPIKE), (102, good(102)), (103, SPIKE), (104, NAN), (105, NAN), (106, NAN), (107, NAN)):
        assert outcome(resumed, step, numbers) == outcome(whole, step, numbers)
    fresh = guard_of(lambda event: None)
    assert outcome(fresh, 101, SPIKE) == "update", "the negative control: without a memory nothing is a spike"


def test_the_log_of_a_long_training_is_not_held_in_memory(tmp_path: Path) -> None:
    with (tmp_path / "metrics.jsonl").open("w") as metrics:
        for step in range(1, 20_001):
            metrics.write(json.dumps({"step": step, "loss": 2.0, "gradient_norm": 1.0, "note": "x" * 100}) + "\n")
    guard = StepGuard(GuardSettings(), 10, "chip0", lambda event: None, "a checkpoint")
    tracemalloc.start()
    try:
        guard.remember(tmp_path, 20_000)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < (tmp_path / "metrics.jsonl").stat().st_size / 4


def test_an_error_says_what_to_do() -> None:
    guard = StepGuard(GuardSettings(max_skips=0, max_roll_backs=0), 0, "chip0", lambda event: None, "a checkpoint")
    with pytest.raises(ReplayStep):
        guard.judge(1, NAN)
    with pytest.raises(GuardError, match=r"step 1: non-finite: loss nan.*\n.*what to do: look at the data") as raised:
        guard.judge(1, NAN)
    assert raised.value.exit_code == 1
