"""Detectors on made curves: what they must see, and what they must not."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from crosschip.train.guard.detectors import LEAST_WINDOW, STUCK_AFTER, SpikeWatch, StuckLossWatch, suspect_at_once
from crosschip.train.guard.observed import StepNumbers, is_close, is_same

CURVES = sorted((Path(__file__).parent / "curves").glob("*.json"))


def loss_watch() -> SpikeWatch:
    return SpikeWatch("loss-spike", "the loss", 10.0, 1.1)


def alarms(watch: SpikeWatch, values: list[float]) -> list[int]:
    """The places at which it alarms when all is accepted, as with a run that goes on."""
    found = []
    for place, value in enumerate(values):
        if watch.look(value) is not None:
            found.append(place)
        watch.accept(value)
    return found


def learning(steps: int, noise: float, seed: int) -> list[float]:
    """A power law with the noise of batches on its logarithm, as language models' losses have it."""
    drawn = random.Random(seed)
    return [(1.7 + 8.0 * (step + 3) ** -0.5) * math.exp(drawn.gauss(0.0, noise)) for step in range(steps)]


@pytest.mark.parametrize(
    ("numbers", "kind"),
    [
        (StepNumbers(math.nan, 1.0), "non-finite"),
        (StepNumbers(2.0, math.inf), "non-finite"),
        (StepNumbers(2.0, 1.0, mtp_loss=math.nan), "non-finite"),
        (StepNumbers(0.0, 1.0), "zero-loss"),
        (StepNumbers(2.0, 0.0), "zero-gradient"),
    ],
)
def test_one_step_alone(numbers: StepNumbers, kind: str) -> None:
    found = suspect_at_once(numbers)
    assert found is not None
    assert found.kind == kind


@pytest.mark.parametrize(
    "numbers",
    [
        StepNumbers(2.0, 1.0),
        StepNumbers(1e-9, 1e-12, mtp_loss=0.0),
        StepNumbers(2.0, 1e30),
    ],
)
def test_an_honest_step_alone(numbers: StepNumbers) -> None:
    assert suspect_at_once(numbers) is None


def test_a_stuck_loss_is_seen_at_the_fifth_time_and_not_before() -> None:
    watch, seen = StuckLossWatch(), []
    for _ in range(10):
        seen.append(watch.look(2.5) is not None)
        watch.accept(2.5)
    assert seen == [step + 1 >= STUCK_AFTER for step in range(10)]
    assert watch.look(math.nextafter(2.5, 3.0)) is None, "another last bit is another loss"


def test_looking_changes_nothing() -> None:
    watch, stuck = loss_watch(), StuckLossWatch()
    for value in learning(100, 0.05, 1):
        watch.accept(value)
        stuck.accept(value)
    for _ in range(50):
        assert watch.look(50.0) is not None
        assert stuck.look(1.0) is None


@pytest.mark.parametrize("noise", [0.003, 0.05, 0.2])
def test_no_false_alarm_on_noisy_learning(noise: float) -> None:
    for seed in range(3):
        assert alarms(loss_watch(), learning(2000, noise, seed)) == []


def test_no_false_alarm_on_heavy_tails() -> None:
    """Gradient norms have a heavy upper tail: the exponential of an exponential's."""
    drawn = random.Random(3)
    norms = [0.5 * math.exp(drawn.gauss(0.0, 0.25) + drawn.expovariate(4.0)) for _ in range(5000)]
    assert alarms(SpikeWatch("gradient-spike", "the gradient norm", 10.0, 4.0), norms) == []


@pytest.mark.parametrize("per_step", [1e-4, 1e-3, 1e-2])
def test_no_false_alarm_on_a_slow_drift_upwards(per_step: float) -> None:
    drawn = random.Random(4)
    drifting = [2.0 * math.exp(per_step * step + drawn.gauss(0.0, 0.02)) for step in range(1500)]
    assert alarms(loss_watch(), drifting) == []


def test_a_fall_is_no_spike() -> None:
    assert alarms(loss_watch(), [*learning(200, 0.02, 5), *[0.01] * 200]) == []


@pytest.mark.parametrize("factor", [1.5, 3.0, 100.0])
def test_a_spike_is_seen_when_it_comes(factor: float) -> None:
    values = learning(400, 0.02, 6)
    values[300] *= factor
    assert alarms(loss_watch(), values) == [300]


def test_several_spikes_in_a_row_are_seen_when_those_before_were_not_accepted() -> None:
    watch, found = loss_watch(), []
    for place, value in enumerate(learning(400, 0.02, 7)):
        value = value * 2.0 if 300 <= place < 310 else value
        if watch.look(value) is None:
            watch.accept(value)
        else:
            found.append(place)
    assert found == list(range(300, 310))


def test_nothing_is_judged_before_the_window_is_long_enough() -> None:
    assert alarms(loss_watch(), [2.0, 2.1] * (LEAST_WINDOW // 2 - 1) + [200.0]) == []
    assert alarms(loss_watch(), [2.0, 2.1] * (LEAST_WINDOW // 2) + [200.0]) == [LEAST_WINDOW]


def test_a_loss_below_zero_is_not_judged() -> None:
    assert alarms(loss_watch(), [-1.0, 2.0] * 100) == []


@pytest.mark.parametrize("path", CURVES, ids=lambda path: path.stem)
def test_no_false_alarm_on_measured_curves(path: Path) -> None:
    """Losses and gradient norms of trainings that ended well; the norm's warm-up is not judged (see the policy)."""
    curve = json.loads(path.read_text())
    norm_watch = SpikeWatch("gradient-spike", "the gradient norm", 10.0, 4.0)
    assert alarms(loss_watch(), curve["loss"]) == []
    assert [at for at in alarms(norm_watch, curve["gradient_norm"]) if at + 1 > curve["warmup_steps"]] == []
    assert len(curve["loss"]) >= 200


@pytest.mark.parametrize("path", CURVES, ids=lambda path: path.stem)
def test_a_spike_planted_into_a_measured_curve_is_seen(path: Path) -> None:
    curve = json.loads(path.read_text())
    last = len(curve["loss"]) - 1
    assert alarms(loss_watch(), [*curve["loss"][:-1], 3.0 + 2.0 * max(curve["loss"][-128:])]) == [last]
    norms = [*curve["gradient_norm"][:-1], 100.0 * max(curve["gradient_norm"][-128:])]
    assert last in alarms(SpikeWatch("gradient-spike", "the gradient norm", 10.0, 4.0), norms)


def test_there_are_measured_curves() -> None:
    assert sum(len(json.loads(path.read_text())["loss"]) for path in CURVES) >= 1000


def test_equal_and_close() -> None:
    assert is_same(math.nan, -math.nan)
    assert not is_same(0.0, -0.0)
    assert not is_same(1.0, math.nextafter(1.0, 2.0))
    assert is_close(1.0, 1.009)
    assert not is_close(1.0, 1.02)
    assert not is_close(1.0, math.nan)
    assert not is_close(1.0, math.inf)
    assert is_close(math.inf, math.inf)
