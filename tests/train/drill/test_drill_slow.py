"""How much slower the drill makes a rank."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from crosschip.train.drill.injection import _Disturber
from crosschip.train.drill.orders import Order, give_order


class _Clock:
    """Time that passes when it is told to, also while the rank sleeps."""

    def __init__(self) -> None:
        self.now, self.slept = 100.0, list[float]()

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)


@pytest.mark.parametrize(("usual_s", "num_passes"), [(0.25, 1), (2.0, 4)])
def test_a_slow_rank_takes_three_times_the_usual_step_whatever_the_last_one_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, usual_s: float, num_passes: int
) -> None:
    clock = _Clock()
    monkeypatch.setattr("crosschip.train.drill.injection.time.perf_counter", lambda: clock.now)
    monkeypatch.setattr("crosschip.train.drill.injection.time.sleep", clock.sleep)
    hooks: list[Any] = []
    job: Any = SimpleNamespace(
        position=SimpleNamespace(step=0),
        world=SimpleNamespace(rank=0),
        model=SimpleNamespace(norm=SimpleNamespace(register_forward_hook=hooks.append)),
    )
    disturber = _Disturber(job, tmp_path, 0)

    def step(seconds: float) -> None:
        disturber.on_batch(None)  # type: ignore[arg-type]
        for _ in range(num_passes):
            hooks[0](None, (), torch.zeros(1))
            clock.now += seconds / num_passes

    for _ in range(6):
        step(usual_s)
    step(10 * usual_s)  # a save
    give_order(tmp_path, 0, 0, Order(1, "slow"))
    for _ in range(40):
        step(usual_s)
    give_order(tmp_path, 0, 0, Order(2, "slow"))  # once more, while it is slow
    for _ in range(95):
        step(usual_s)
    assert clock.slept == [pytest.approx(2 * usual_s)] * (40 + 90)
