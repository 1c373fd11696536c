"""Rollouts from a scripted server that speaks as vLLM does."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from crosschip.train.rl.rollouts import RolloutError
from tests.train.rl.rollouts.rollout_parts import (
    Told,
    rollouts_of,
    settings_of,
    take_all,
    versions_of,
    write_nothing,
)
from tests.train.rl.rollouts.scripted_engine import ScriptedEngine, served


def test_vllm_is_paused_reloaded_and_resumed_and_its_version_is_known_by_order(tmp_path: Path) -> None:
    engine = ScriptedEngine(kind="vllm", play=lambda number: 0.02)
    with served(engine) as urls, rollouts_of(settings_of(1), urls, tmp_path) as rollouts:
        taken = take_all(rollouts, 3)
    for version, batch in enumerate(taken):
        assert versions_of(batch) <= {version - 1, version}
    steps = ["/pause?mode=wait", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version", "/resume"]
    assert engine.steps[:5] == steps
    assert engine.loads[0]["kwargs"] == {"weights_path": str(tmp_path / "version-00000000")}
    assert taken[0].groups[0].samples[0].chip == "unknown"


def test_an_older_vllm_without_pause_is_reloaded_all_the_same(tmp_path: Path) -> None:
    engine = ScriptedEngine(kind="vllm", lacks=("/pause", "/resume", "/update_weight_version"))
    with served(engine) as urls, rollouts_of(settings_of(), urls, tmp_path) as rollouts:
        take_all(rollouts, 2)
    assert engine.steps == ["/collective_rpc", "/reset_prefix_cache"] * 2


def test_vllm_without_its_development_mode_is_refused_with_the_remedy(tmp_path: Path) -> None:
    engine = ScriptedEngine(kind="vllm", lacks=("/pause", "/resume", "/collective_rpc"))
    with (
        served(engine) as urls,
        rollouts_of(settings_of(), urls, tmp_path) as rollouts,
        pytest.raises(RolloutError, match="VLLM_SERVER_DEV_MODE=1"),
    ):
        rollouts.publish(0, write_nothing)


@pytest.mark.parametrize("raw", [False, True])
def test_vllm_must_tell_log_probs_at_the_temperature(tmp_path: Path, raw: bool) -> None:
    engine = ScriptedEngine(kind="vllm", raw_logprobs=raw)
    told = Told()
    settings = settings_of(temperature=0.6)
    with (
        served(engine) as [url],
        rollouts_of(settings, [url], tmp_path / "weights", told=told) as rollouts,
        pytest.raises(RolloutError, match="processed_logprobs") if raw else nullcontext(),
    ):
        rollouts.publish(0, write_nothing)
        assert len(rollouts.take(0).groups) == 4
        sampled = [body for body in engine.bodies if body["max_tokens"] > 1]
        assert {body["temperature"] for body in sampled} == {0.6}
