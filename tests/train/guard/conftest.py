"""A supervised training of real processes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from crosschip.recipe import GuardSettings
from crosschip.train.guard.attempt import Launch
from crosschip.train.guard.supervisor import SupervisedRun, supervise
from tests.train.guard.supervised_runs import ENVIRONMENT, HERE, Supervised, committed_steps


@pytest.fixture
def supervised(tmp_path: Path) -> Callable[..., Supervised]:
    """`supervised("--fault", "kill@7", max_restarts=3)`: train `worker.py` under supervision by this process."""
    state = tmp_path / "state"
    state.mkdir()
    made = Supervised(state)

    def run(*arguments: str, launcher: tuple[str, ...] = (), num_ranks: int = 1, max_restarts: int = 3) -> Supervised:
        argv = [sys.executable, *launcher, str(HERE / "worker.py"), "--state", str(state), *arguments]
        settings = GuardSettings(max_restarts=max_restarts, start_allowance_s=30.0)
        made.exit_code = supervise(
            SupervisedRun(
                launch=lambda attempt: Launch(argv, ENVIRONMENT, num_ranks),
                heartbeats=tmp_path / "heartbeats",
                committed=lambda: committed_steps(state),
                tell=lambda stage, event: made.events.append((stage, event)),
                settings=settings,
            )
        )
        return made

    run.made = made  # type: ignore[attr-defined]
    return run
