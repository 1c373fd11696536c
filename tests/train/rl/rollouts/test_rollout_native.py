"""Rollouts from our own engine in its own process: killed, stopped, orphaned, and bit for bit the same twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from crosschip.model import Transformer, save_model
from crosschip.rewards import Attempt, Verdict
from crosschip.train.rl.rollouts import LocalEngine, LocalSettings, RolloutError, TakenBatch, engines_of
from crosschip.train.rl.rollouts.publishing import ModelFacts, Publication
from tests.serve.conftest import make_model, tiny_config
from tests.train.rl.rollouts.rollout_parts import FirstIsEven, Told, rollouts_of, settings_of, wait_until
from tests.train.rl.rollouts.scripted_engine import STOP_ID, VOCAB_SIZE

NUM_EXPERT_LAYERS, EXPERTS_PER_TOKEN = 1, 2


@pytest.fixture(scope="module")
def models() -> list[Transformer]:
    """Weights of several versions; nearly uniform answers."""
    torch.set_num_threads(1)
    config = tiny_config(VOCAB_SIZE, eos_token_id=STOP_ID, max_position_embeddings=128)
    return [make_model(config, seed) for seed in range(4)]


@pytest.fixture
def writer(models: list[Transformer]) -> Callable[[int], Callable[[Path], None]]:
    return lambda version: lambda directory: save_model(models[version % len(models)], directory, torch.float32)


def native(tmp_path: Path, name: str = "native", **changes: Any) -> LocalEngine:
    fields: dict[str, Any] = {"chip": "cpu", "max_batch_size": 8, "num_threads": 1, "start_timeout_s": 120.0}
    return LocalEngine(name, LocalSettings(tmp_path / "engines", **(fields | changes)))


def bits_of(batch: TakenBatch) -> Any:
    return [
        (g.problem.number, [(s.token_ids, s.logprobs, s.versions, s.reward, s.routes.tobytes()) for s in g.samples])
        for g in batch.groups
        if all(s.routes is not None for s in g.samples)
    ]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_on_policy_with_routes_and_the_same_bits_twice(tmp_path: Path, writer: Any) -> None:
    def run(name: str) -> list[Any]:
        settings = settings_of(rollouts_timeout_s=60.0, rollouts_replay_routes=True, prompts=3)
        engine = native(tmp_path / name, deterministic=True, record_routes=True)
        found = []
        with rollouts_of(settings, [engine], tmp_path / name / "weights") as rollouts:
            for version in range(2):
                rollouts.publish(version, writer(version))
                batch = rollouts.take(version)
                for group in batch.groups:
                    for sample in group.samples:
                        num_positions = len(group.problem.prompt_ids) + len(sample.token_ids) - 1
                        assert set(sample.versions) == {version}
                        assert sample.routes is not None
                        assert sample.routes.shape == (num_positions, NUM_EXPERT_LAYERS, EXPERTS_PER_TOKEN)
                        assert sample.chip.startswith("cpu")
                found.append(bits_of(batch))
                assert len(found[-1]) == 3
            pid = engine.pid
        assert pid is not None
        assert not is_alive(pid)
        return found

    assert run("first") == run("second")


def test_a_killed_engine_loses_nothing_and_is_started_again(tmp_path: Path, writer: Any) -> None:
    told = Told()
    settings = settings_of(1, rollouts_timeout_s=60.0, drop_without_signal=False, max_new_tokens=24)
    engines = [native(tmp_path, "native", record_routes=False), native(tmp_path, "native-2", record_routes=False)]
    numbers: list[int] = []
    with rollouts_of(settings, engines, tmp_path / "weights", told=told) as rollouts:
        for version in range(6):
            rollouts.publish(version, writer(version))
            if version == 2:
                first_pid = engines[0].pid
                assert first_pid is not None
                os.kill(first_pid, signal.SIGKILL)
            batch = rollouts.take(version)
            assert len(batch.groups) == 4
            for group in batch.groups:
                assert len(group.samples) == 4
                assert all(version - 1 <= v <= version for sample in group.samples for v in sample.versions)
            numbers += [group.problem.number for group in batch.groups]
        wait_until(lambda: engines[0].pid not in (None, first_pid), "it was started again")
        version = 6
        while "native" not in batch.tokens_by_engine and version < 200:
            rollouts.publish(version, writer(version))
            batch = rollouts.take(version)
            version += 1
            time.sleep(0.5)  # the trainer works
            numbers += [group.problem.number for group in batch.groups]
        assert "native" in batch.tokens_by_engine
        state = rollouts.state()
    waiting = [*state["ask_again"], *(group["problem"]["number"] for group in state["finished"])]
    assert sorted([*numbers, *waiting]) == list(range(state["next_number"]))  # none lost, none used twice
    assert "by signal SIGKILL" in told.of("engine restarted")[0]
    assert not told.of("ENGINE DROPPED")


@dataclass
class StopsAnEngine(FirstIsEven):
    """Stops an engine's process when a group is judged for the first time after `is_armed` was set."""

    stop: Callable[[], None] = lambda: None
    is_armed: bool = False

    def judge(self, attempts: list[Attempt], /) -> list[Verdict]:
        if self.is_armed:
            self.is_armed = False
            self.stop()
        return super().judge(attempts)


def test_a_stopped_engine_is_passed_over(tmp_path: Path, writer: Any) -> None:
    told = Told()
    # More groups than both take at first: the one that is stopped has some or gets some, however quick it was before.
    settings = settings_of(
        rollouts_timeout_s=3.0, drop_without_signal=False, max_new_tokens=100, seq_len=128, prompts=8
    )
    engines = [native(tmp_path, name, record_routes=False, max_batch_size=1) for name in ("native", "native-2")]
    stopped: list[int] = []

    def stop() -> None:
        assert engines[0].pid is not None
        stopped.append(engines[0].pid)
        os.kill(engines[0].pid, signal.SIGSTOP)

    checker = StopsAnEngine(stop=stop)
    with rollouts_of(settings, engines, tmp_path / "weights", checker, told) as rollouts:
        version, batch = 0, None
        while batch is None or len(batch.tokens_by_engine) < 2:  # one may start later
            rollouts.publish(version, writer(version))
            batch = rollouts.take(version)
            version += 1
        checker.is_armed = True
        rollouts.publish(version, writer(version))
        batch = rollouts.take(version)
        assert [group.problem.number for group in batch.groups] == list(range(8 * version, 8 * version + 8))
        assert batch.num_retried >= 1, told.lines
    assert len(stopped) == 1
    assert not is_alive(stopped[0])  # a stopped one is ended, too
    assert all("native: slow: /v1/completions: no answer within 3 s" in line for line in told.of("bad answer")[:1])


def test_an_engine_that_cannot_start_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    with (
        rollouts_of(settings_of(), [native(tmp_path)], tmp_path / "weights") as rollouts,
        pytest.raises(RolloutError) as raised,
    ):
        rollouts.publish(0, lambda directory: (directory / "config.json").write_text("{}") and None)
    assert "before it was ready it ended with exit code" in raised.value.problem
    assert "native.log" in raised.value.problem
    assert "config.json" in raised.value.problem.partition("the end of")[2]


ORPHAN = """
import sys, threading, asyncio, time
from pathlib import Path
from crosschip.train.rl.rollouts import LocalEngine, LocalSettings
from crosschip.train.rl.rollouts.publishing import ModelFacts, Publication
engine = LocalEngine("native", LocalSettings(Path(sys.argv[1]), chip="cpu", num_threads=1, record_routes=False))
print(asyncio.run(engine.start(Publication(0, "0-x", Path(sys.argv[2]), ModelFacts()))), engine.pid, flush=True)
time.sleep(600)
"""


def test_a_killed_trainer_leaves_no_engine_behind(tmp_path: Path, writer: Any) -> None:
    writer(0)(tmp_path / "model")
    command = [sys.executable, "-c", ORPHAN, str(tmp_path / "engines"), str(tmp_path / "model")]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert trainer.stdout is not None
        _, pid = trainer.stdout.readline().split()
        assert is_alive(int(pid))
        trainer.kill()
        trainer.wait()
        wait_until(lambda: not is_alive(int(pid)), "the engine ended", most_s=10)
    finally:
        trainer.kill()
        trainer.communicate()


def test_engines_are_named_and_set_up_as_the_recipe_says(tmp_path: Path) -> None:
    engines = ["native", "http://a:8000", "native"]
    settings = settings_of(rollouts_engines=engines, rollouts_num_threads=3, rollouts_replay_routes=True)
    first, remote, second = engines_of(settings, "sim", "bfloat16", tmp_path)
    assert [engine.name for engine in (first, remote, second)] == ["native", "http://a:8000", "native-2"]
    assert isinstance(second, LocalEngine)
    assert second.settings == LocalSettings(
        tmp_path, "sim", "bfloat16", 64, 64, 3, record_routes=True, start_timeout_s=60.0
    )
    settings = settings_of(rollouts_dtype="float32")
    (only,) = engines_of(settings, "sim", "bfloat16", tmp_path)
    assert isinstance(only, LocalEngine)
    assert only.settings.dtype == "float32"
    (elsewhere,) = engines_of(settings_of(rollouts_engines=["native@sim:noisy"]), "cpu", "float32", tmp_path)
    assert isinstance(elsewhere, LocalEngine)
    assert (elsewhere.name, elsewhere.settings.chip) == ("native@sim-noisy", "sim:noisy")


def test_an_engine_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="'nativ' is no engine"):
        settings_of(rollouts_engines=["nativ"])


def test_an_engine_takes_half_of_the_cores_that_may_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, str]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(subprocess, "Popen", lambda command, env, **_: started.append(env))
    native(tmp_path, num_threads=None)._begin(Publication(0, "0-0", tmp_path, ModelFacts()))
    assert started[0]["OMP_NUM_THREADS"] == started[0]["MKL_NUM_THREADS"] == "3"
