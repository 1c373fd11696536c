"""Two ranks that train on the answers of one engine, which stands still for longer than any step takes."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from tests.train.conftest import TINY
from tests.train.launched import settings
from tests.train.rl.test_reinforcement import RL, processes_with

_STANDS_STILL_S = 15.0  # more than a rank may be silent, less than makes an engine of ours be started again


@pytest.mark.slow
def test_ranks_wait_for_an_engine_that_stands_still(start, tmp_path: Path) -> None:
    recipe = tmp_path / "rl.toml"
    recipe.write_text(TINY.replace("[evaluate]", RL + "[evaluate]"))
    more = settings("train.gradient_accumulation=1", "rl.steps=8", "rl.validate_every=8", "rl.checkpoint_every=8")
    training = start(recipe, "run", 2, *more)
    training.wait_until(lambda: len(training.metrics("rl")) >= 3)
    keys = str(training.out / "train/rl/engines")
    group = os.getpgid(max(processes_with(keys)))
    os.killpg(group, signal.SIGSTOP)
    time.sleep(_STANDS_STILL_S)
    with contextlib.suppress(ProcessLookupError):  # it was ended with the training
        os.killpg(group, signal.SIGCONT)
    code, said = training.end()
    assert code == 0, said
    assert [line["step"] for line in training.metrics("rl")] == list(range(1, 9)), said
    assert "resumed" not in training.events("rl"), said
    assert "hang" not in training.events("rl"), said
