"""A whole stage: a real engine process on loopback answers, real weights go out, the policy moves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crosschip.model import load_model
from crosschip.recipe import load_recipe
from crosschip.rundir import RunDirectory
from crosschip.train.progress import LineProgress
from crosschip.train.rl.reinforcer import MismatchError
from crosschip.train.rl.rollouts import RolloutError
from crosschip.train.stages import train_recipe
from tests.train.conftest import TINY

RL = """
[rl]
steps = 3
prompts = 2
samples = 8
seq_len = 96
max_new_tokens = 16
learning_rate = 3e-3
dtype = "float32"
warmup_steps = 0
validate_every = 2
validation_sequences = 4
sample_every = 3
checkpoint_every = 1
[[rl.rewards]]
checker = "tests.train.rl.checkers:short"
[rl.rollouts]
max_staleness = 0
num_threads = 1
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "rl.toml"
    path.write_text(TINY.replace("[evaluate]", RL + "[evaluate]"))
    return path


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def processes_with(words: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if words in path.read_bytes().replace(b"\0", b" ").decode(errors="replace"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.fixture
def trained(recipe_file: Path, tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    outcome = train_recipe(load_recipe(recipe_file), run, progress=LineProgress(None))
    assert outcome.exit_code == 0
    return run


def test_a_stage_samples_judges_trains_and_publishes(trained: RunDirectory) -> None:
    stage = trained.stage("rl")
    metrics = lines(stage / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3]
    for line in metrics:
        assert {"reward", "entropy", "objective", "answer_tokens", "both_work_share"} <= set(line)
        assert line["mismatch_k3"] < 1e-6  # both compute in fp32 with the same experts  # type: ignore[operator]
        assert line["groups_stale"] == 0
    assert {line["step"] for line in lines(stage / "validation.jsonl")} == {0, 2, 3}
    assert all("score" in line for line in lines(stage / "validation.jsonl"))
    assert lines(stage / "samples.jsonl")
    versions = sorted(path.name for path in (stage / "weights").glob("version-*"))
    assert versions == ["version-00000001", "version-00000002"]  # none after the last step
    newest = load_model(stage / "checkpoints/step-00000003")
    published = load_model(stage / "weights/version-00000002")
    before = load_model(trained.stage("sft") / "checkpoints/step-00000007")
    assert not newest.lm_head.weight.equal(published.lm_head.weight)
    assert not published.lm_head.weight.equal(before.lm_head.weight)
    assert processes_with(str(stage / "weights")) == []


def test_the_policy_gets_what_is_rewarded(recipe_file: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    settings = ["rl.steps=25", "rl.learning_rate=1e-2", "rl.checkpoint_every=100", "rl.rollouts.max_staleness=1"]
    settings += ['rl.rewards=[{checker="tests.train.rl.checkers:lettered"}]', "rl.validate_every=100"]
    recipe = load_recipe(recipe_file, settings)
    train_recipe(recipe, run, progress=LineProgress(None))
    rewards = [float(str(line["reward"])) for line in lines(run.stage("rl") / "metrics.jsonl")]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1


def test_without_what_is_required_nothing_is_rewarded(recipe_file: Path, tmp_path: Path) -> None:
    """The model is far too small to close its reasoning in 16 tokens; letters alone would be worth something."""
    terms = 'rl.rewards=[{checker="tests.train.rl.checkers:lettered"},{checker="format",weight=0.0,required=%s}]'
    judged = []
    for required in ("false", "true"):
        run = RunDirectory(tmp_path / required)
        recipe = load_recipe(recipe_file, [terms % required, "rl.max_groups_tried=1", "rl.validate_every=100"])
        train_recipe(recipe, run, progress=LineProgress(None))
        judged.append([float(str(line["judged_reward"])) for line in lines(run.stage("rl") / "metrics.jsonl")])
    without, with_it = judged
    assert min(without) > 0.0
    assert with_it == [0.0] * 3


def test_several_updates_with_one_batch(recipe_file: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    recipe = load_recipe(recipe_file, ["rl.steps=4", "rl.updates_per_batch=2", "rl.kl_weight=0.01"])
    train_recipe(recipe, run, progress=LineProgress(None))
    metrics = lines(run.stage("rl") / "metrics.jsonl")
    assert ["reward" in line for line in metrics] == [True, False, True, False]
    assert metrics[0]["kl_reference"] == pytest.approx(0.0, abs=1e-6)
    assert float(str(metrics[-1]["kl_reference"])) > 0.0


def test_a_killed_trainer_leaves_no_engine_and_goes_on(recipe_file: Path, tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "train_process.py"
    out = tmp_path / "killed"
    command = [sys.executable, str(script), str(recipe_file), str(out), "--set", "rl.steps=4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[2])}
    killed = subprocess.run(
        [*command, "--signal-at", "rl:3:SIGKILL"], env=environment, capture_output=True, timeout=300, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while processes_with(str(out)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_with(str(out)) == []
    again = subprocess.run(
        [*command, "--resume"], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert again.returncode == 0, again.stderr
    metrics = lines(out / "train/rl/metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    events = [str(line["event"]) for line in lines(out / "train/rl/events.jsonl")]
    assert "resumed" in events
    states = {path.stem for path in (out / "train/rl/rollouts").glob("step-*.json")}
    assert states == {path.name for path in (out / "train/rl/checkpoints").glob("step-*")}


def test_a_trainer_that_is_stopped_in_the_middle_of_a_batch_trains_its_rest(recipe_file: Path, tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "train_process.py"
    out = tmp_path / "stopped"
    command = [sys.executable, str(script), str(recipe_file), str(out), "--set", "rl.steps=6"]
    command += ["--set", "rl.updates_per_batch=2", "--set", "rl.checkpoint_every=4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[2])}
    for more, code in ((["--signal-at", "rl:3:SIGINT"], 130), (["--resume"], 0)):
        ended = subprocess.run(
            [*command, *more], env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert ended.returncode == code, ended.stderr
    metrics = lines(out / "train/rl/metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert ["reward" in line for line in metrics] == [True, False] * 3  # a batch begins where a reward stands
    assert all(float(str(line["mismatch_k3"])) < 1e-6 for line in metrics[::2])  # of the weights that it trains first
    assert "rollouts lost" not in [line["event"] for line in lines(out / "train/rl/events.jsonl")]


def test_an_engine_that_computes_otherwise_stops_the_run_before_a_weight_is_touched(
    recipe_file: Path, tmp_path: Path
) -> None:
    run = RunDirectory(tmp_path / "run")
    settings = ["rl.rollouts.dtype=bfloat16", "rl.rollouts.mismatch_limit=1e-9"]
    with pytest.raises(MismatchError, match=r"native \(chip .+\): KL"):
        train_recipe(load_recipe(recipe_file, settings), run, progress=LineProgress(None))
    assert not lines(run.stage("rl") / "metrics.jsonl")


def test_a_checker_that_raises_is_an_error_and_not_a_zero(recipe_file: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    settings = ['rl.rewards=[{checker="tests.train.rl.checkers:broken"}]']
    with pytest.raises(RolloutError, match="no such unit"):
        train_recipe(load_recipe(recipe_file, settings), run, progress=LineProgress(None))


def test_further_stages_follow(recipe_file: Path, tmp_path: Path) -> None:
    recipe_file.write_text(
        recipe_file.read_text()
        + """
[[then]]
kind = "rl"
name = "rl-again"
steps = 2
warmup_steps = 0
prompts = 2
samples = 4
seq_len = 96
max_new_tokens = 8
dtype = "float32"
rewards = [{checker = "tests.train.rl.checkers:short"}]
lora_rank = 2
"""
    )
    run = RunDirectory(tmp_path / "run")
    outcome = train_recipe(load_recipe(recipe_file), run, progress=LineProgress(None))
    assert [end.stage for end in outcome.stages] == ["pretrain", "sft", "rl", "rl-again"]
    before = load_model(run.stage("rl") / "checkpoints/step-00000003")
    after = load_model(run.stage("rl-again") / "checkpoints/step-00000002")
    assert after.embed_tokens.weight.equal(before.embed_tokens.weight)
    assert not after.layers[0].self_attn.o_proj.weight.equal(before.layers[0].self_attn.o_proj.weight)
