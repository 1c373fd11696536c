"""What a drill makes of what it saw: pure, on made-up logs."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest

from crosschip.errors import RecipeError
from crosschip.train.drill.catalogue import FAULTS, Layout, chosen
from crosschip.train.drill.logs import FollowedFile, SeenEvent, SeenStep, average_each_step
from crosschip.train.drill.orders import Order, give_order, note_taken, take_order, taken, withdraw
from crosschip.train.drill.schedule import strikes
from crosschip.train.drill.score import Planted, goodput, score


def planted(name: str, at: float, group: int = 0) -> Planted:
    return Planted(FAULTS[name], group, 0, at, 10)


def event(kind: str, at: float, group: int = 0) -> SeenEvent:
    return SeenEvent(at, group, 10, kind, "detail", "action")


def step(number: int, at: float, loss: float, group: int = 0, num_groups: int = 1) -> SeenStep:
    return SeenStep(at, group, number, loss, 1.0, 0.5, False, num_groups)


def test_a_fault_that_is_noticed_has_its_latency() -> None:
    (found,), false = score([planted("kill", 100.0)], [event("killed", 102.5)], [], 200.0)
    assert found.latency_s == pytest.approx(2.5)
    assert not false


def test_an_event_of_another_kind_or_group_or_before_does_not_count() -> None:
    events = [event("hang", 102.0), event("killed", 103.0, group=1), event("killed", 99.0)]
    (found,), false = score([planted("kill", 100.0)], events, [], 200.0)
    assert found.event is None
    assert [each.at for each in false] == [99.0]  # an alarm before any fault


def test_alarms_without_a_fault_are_false() -> None:
    _, false = score([], [event("loss-spike", 5.0), event("resumed", 6.0)], [], 10.0)
    assert [each.event for each in false] == ["loss-spike"]


def test_a_fault_explains_no_alarm_after_its_time() -> None:
    faults = [planted("kill", 100.0)]
    events = [event("killed", 101.0), event("checkpoint-wrong", 150.0)]  # the second may follow from the fault
    assert not score(faults, events, [], 500.0)[1]
    for kind in ("checkpoint-wrong", "killed"):
        _, false = score(faults, [event("killed", 101.0), event(kind, 100.0 + FAULTS["kill"].within_s)], [], 500.0)
        assert [each.event for each in false] == [kind]
    (found,), _ = score(faults, [event("killed", 300.0)], [], 500.0)
    assert found.event is None, "too late to have noticed it"


def test_a_late_event_of_the_fault_before_is_not_the_next_ones() -> None:
    faults = [planted("stop", 100.0), planted("kill", 105.0)]
    scores, false = score(faults, [event("hang", 108.0), event("killed", 109.0)], [], 200.0)
    assert [each.latency_s for each in scores] == [8.0, 4.0]
    assert not false


def test_repeated_steps_are_counted_and_compared_to_the_last_bit() -> None:
    before = [step(number, 90.0 + number, 3.0 - number / 10) for number in range(8)]
    again = [step(number, 110.0 + number, 3.0 - number / 10) for number in range(5, 8)]
    (found,), _ = score([planted("kill", 100.0)], [], before + again, 200.0)
    assert (found.steps_lost, found.bit_exact) == (3, True)
    other = [step(7, 120.0, 2.3000001)]
    (found,), _ = score([planted("kill", 100.0)], [], before + other, 200.0)
    assert (found.steps_lost, found.bit_exact) == (1, False)
    with_another = [step(7, 120.0, 2.3000001, num_groups=2)]
    (found,), _ = score([planted("kill", 100.0)], [], before + with_another, 200.0)
    assert (found.steps_lost, found.bit_exact) == (1, None)
    # Alone for a step, and with the other again: the weights are others by then.
    alone = [step(5, 110.0, 2.4), step(6, 111.0, 2.3, num_groups=2), step(7, 112.0, 2.2)]
    together = [step(number, 90.0 + number, 3.0 - number / 10, num_groups=1 + (number != 5)) for number in range(8)]
    (found,), _ = score([planted("kill", 100.0)], [], together + alone, 200.0)
    assert (found.steps_lost, found.bit_exact) == (3, False)
    (found,), _ = score([planted("kill", 100.0)], [], [*before, step(5, 110.0, 2.5, num_groups=2), *alone[1:]], 200.0)
    assert (found.steps_lost, found.bit_exact) == (3, None)


def test_goodput_counts_what_was_computed_again() -> None:
    steps = [step(number, float(number), 1.0) for number in (1, 2, 3, 4, 3, 4, 5, 6, 7, 8)]
    found = goodput(steps, [event("step-not-committed", 1.0)] * 2, [], 0.5, 8.0)
    assert found["committed"] == pytest.approx(8 / 12)
    assert found["of_time"] == pytest.approx(8 * 0.5 / 8.0)


@pytest.mark.parametrize(
    ("action", "lost", "committed"),
    [("took over step 20; outer steps come every 4 steps", 2, 8 / 10), ("took over step 20", 0, 1.0)],
)
def test_steps_since_the_last_outer_step_die_with_a_group(action: str, lost: int, committed: float) -> None:
    """Where groups average each step they do not: the others have them."""
    steps = [step(number, 80.0 + number, 1.0) for number in range(1, 11)]
    healed = SeenEvent(110.0, 0, 20, "healed", "this group was at step 5", action)
    scores, _ = score([planted("kill", 100.0)], [healed], steps, 200.0)
    assert (scores[0].steps_lost, scores[0].bit_exact) == (lost, None)
    assert goodput(steps, [], scores, 0.5, 8.0)["committed"] == pytest.approx(committed)


def test_every_fault_strikes_once_before_any_strikes_again() -> None:
    faults, _ = chosen(None, Layout(2, averages_each_step=True))
    found = list(itertools.islice(strikes(faults, 2, 1, 60.0, seed=3), 2 * len(faults)))
    assert {each.fault.name for each in found[: len(faults)]} == set(FAULTS)
    assert {each.group for each in found} == {0, 1}
    assert found == list(itertools.islice(strikes(faults, 2, 1, 60.0, seed=3), 2 * len(faults)))


def test_times_between_strikes_are_exponential() -> None:
    faults, _ = chosen(None, Layout(1, averages_each_step=None))
    times = [each.after_s for each in itertools.islice(strikes(faults, 1, 1, 60.0, seed=0), 4000)]
    mean = sum(times) / len(times)
    deviation = (sum((each - mean) ** 2 for each in times) / len(times)) ** 0.5
    # Both are 60; their standard errors are 0.95 and 1.3 with 4,000 draws.
    assert mean == pytest.approx(60.0, abs=4.0)
    assert deviation == pytest.approx(60.0, abs=6.0)


NEED_AVERAGING = {"slow", "link-cut", "slow-link", "lossy-link"}
NEED_GROUPS = {"collective-hang", "lighthouse"}


@pytest.mark.parametrize(
    ("layout", "lacking"),
    [
        (Layout(1, None), NEED_AVERAGING | NEED_GROUPS),
        (Layout(2, averages_each_step=False), NEED_AVERAGING),
        (Layout(2, averages_each_step=True), set()),
        (Layout(2, None), set()),
    ],
)
def test_what_could_not_be_noticed_is_left_out_by_name_and_refused_when_it_is_named(
    layout: Layout, lacking: set[str]
) -> None:
    found, left_out = chosen(None, layout)
    assert {each.name for each in found} == FAULTS.keys() - lacking
    assert {name for names in left_out.values() for name in names} == lacking
    for name in FAULTS:
        if name in lacking:
            with pytest.raises(RecipeError, match=f"--faults '{name}' could not be noticed: .*group"):
                chosen(["kill", name], layout)
        else:
            assert [each.name for each in chosen([name], layout)[0]] == [name]


def test_a_name_that_is_no_faults_is_refused() -> None:
    with pytest.raises(KeyError):
        chosen(["earthquake"], Layout(1, None))


@pytest.mark.parametrize("averages", [True, False])
def test_groups_that_average_each_step_are_known_by_their_losses(averages: bool) -> None:
    alone = [step(1, 90.0, 4.0)]
    both = [
        step(number, 100.0 + number, 3.0 - 0.01 * group * (not averages), group)
        for number in (2, 3)
        for group in (0, 1)
    ]
    assert average_each_step(alone + both) is averages
    assert not average_each_step(alone)


def test_a_log_is_followed_over_a_cut_and_a_replacement(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    followed = FollowedFile(path)
    assert list(followed.new_lines()) == []

    def lines(first: int, last: int) -> str:
        return "".join(json.dumps({"step": number}) + "\n" for number in range(first, last + 1))

    path.write_text(lines(1, 5) + '{"step": 6')
    assert [each["step"] for each in followed.new_lines()] == [1, 2, 3, 4, 5]
    shorter = tmp_path / "new"
    shorter.write_text(lines(1, 3))
    os.replace(shorter, path)
    assert list(followed.new_lines()) == []
    with path.open("a") as file:
        file.write(lines(4, 6))
    assert [each["step"] for each in followed.new_lines()] == [4, 5, 6]


def test_an_order_is_taken_once(tmp_path: Path) -> None:
    give_order(tmp_path, 0, 1, Order(7, "kill"))
    assert take_order(tmp_path, 0, 0) is None
    order = take_order(tmp_path, 0, 1)
    assert order == Order(7, "kill")
    assert take_order(tmp_path, 0, 1) is None
    assert taken(tmp_path, 7) is None
    assert note_taken(tmp_path, order, 42)
    found = taken(tmp_path, 7)
    assert found is not None
    assert found.step == 42
    give_order(tmp_path, 0, 1, Order(8, "stop"))
    assert withdraw(tmp_path, 0, 1, 8)
    assert take_order(tmp_path, 0, 1) is None
    assert not withdraw(tmp_path, 0, 1, 7), "the rank was faster"


def test_an_order_that_a_rank_has_read_can_still_be_withdrawn(tmp_path: Path) -> None:
    give_order(tmp_path, 0, 0, Order(7, "save-hang"))
    order = take_order(tmp_path, 0, 0)
    assert order is not None
    assert withdraw(tmp_path, 0, 0, 7)
    assert not note_taken(tmp_path, order, 42), "the rank must not strike any more"
    assert taken(tmp_path, 7) is None
