"""`crosschip train --nproc`: real ranks that are stopped, killed and resumed at another number."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from crosschip.model import load_model
from crosschip.recipe import load_recipe
from crosschip.rundir import RunDirectory
from crosschip.train import LineProgress, train_recipe
from crosschip.train.signals import ONE_REQUEST_S
from tests.train.launched import LIMIT_S, ROOT, is_running, lines, settings

RATHER_LONG = ("train.steps=5000", "train.sample_every=5000", "train.validate_every=5000", "train.checkpoint_every=5")
STEADY = ("train.schedule=wsd", "train.decay_share=0.0")  # so that a step does not depend on how many follow


def assert_same_curve(found: list[dict[str, float]], wanted: list[dict[str, float]], num_steps: int) -> None:
    """Equal but for rounding. A sum of n numbers in two orders differs by up to n units of 2^-24, and a step's loss
    is one of about 130 logits at each of 128 places; each step hands its own difference on to the next.
    """
    assert [line["step"] for line in found] == [line["step"] for line in wanted] == list(range(1, num_steps + 1))
    for one, other in zip(found, wanted, strict=True):
        assert one["trained_tokens"] == other["trained_tokens"]
        assert one["tokens"] == other["tokens"]
        assert one["loss"] == pytest.approx(other["loss"], rel=one["step"] * 256 * 2**-24)


def test_two_ranks_train_and_fine_tune_as_one(start, tiny_toml, uninterrupted) -> None:
    training = start(tiny_toml, "two", 2)
    code, said = training.end()
    assert code == 0, said
    assert "with 2 ranks of 1 thread each" in said
    assert said.count("trained: pretrain 10 steps, sft 7 steps") == 1
    for stage, num_steps in (("pretrain", 10), ("sft", 7)):
        for name, key in (("metrics", "loss"), ("validation", "validation_loss")):
            both = [lines(run / f"train/{stage}/{name}.jsonl") for run in (training.out, uninterrupted)]
            if name == "metrics":
                assert_same_curve(*both, num_steps)
            for one, other in zip(*both, strict=True):
                assert one[key] == pytest.approx(other[key], rel=num_steps * 256 * 2**-24)
        texts = [
            [line["text"] for line in lines(run / f"train/{stage}/samples.jsonl")]
            for run in (training.out, uninterrupted)
        ]
        assert texts[0] == texts[1], "written from the gathered weights"
    assert not list(training.out.glob("lock.json"))


@pytest.mark.slow
def test_ranks_are_stopped_and_another_number_goes_on(start, pretraining, tmp_path) -> None:
    """Two ranks are stopped, four go on with experts over two of them, and one ends it, on one curve."""
    stopped = start(pretraining, "run", 2, *settings(*RATHER_LONG, *STEADY))
    stopped.wait_for_step(3)
    stopped.process.send_signal(signal.SIGTERM)
    code, said = stopped.end()
    assert code == 128 + signal.SIGTERM, said
    assert "interrupted; saved: pretrain" in said
    assert "--nproc 2 --resume" in said
    assert "Traceback" not in said
    step = len(stopped.metrics())
    assert (stopped.out / f"train/pretrain/checkpoints/step-{step:08d}/COMPLETE").exists()
    four = (f"train.steps={step + 4}", "train.gradient_accumulation=1", "parallel.expert_parallel=2")
    code, said = start(pretraining, "run", 4, *settings(*STEADY, *four), "--resume").end()
    assert code == 0, said
    assert f"going on after step {step}" in said
    assert "ranks were 2 and are now 4" in said
    for name in ("run", "alone"):
        recipe = load_recipe(pretraining, [*STEADY, f"train.steps={step + 8}"])
        train_recipe(recipe, RunDirectory(tmp_path / name), name == "run", LineProgress(None))
    curves = [lines(tmp_path / name / "train/pretrain/metrics.jsonl") for name in ("run", "alone")]
    assert_same_curve(*curves, step + 8)


def test_a_killed_rank_is_replaced_and_a_killed_launcher_leaves_none(start, pretraining) -> None:
    training = start(pretraining, "run", 2, *settings(*RATHER_LONG))
    training.wait_for_step(6)
    ranks = training.ranks()
    assert sorted(ranks) == [0, 1]
    os.kill(ranks[1], signal.SIGKILL)
    training.wait_until(lambda: "killed" in training.events())
    told = training.events()["killed"]
    assert told["detail"].startswith("rank 1 in ")
    assert "SIGKILL" in told["detail"]
    assert "restarting after committed step" in told["action"]
    training.wait_until(lambda: sorted(training.ranks()) == [0, 1])
    assert not any(map(is_running, ranks.values()))
    ranks = training.ranks()
    training.wait_for_step(int(told["step"]) + 2)
    training.process.kill()
    training.process.wait()
    training.wait_until(lambda: not any(map(is_running, ranks.values())), while_it_runs=False)


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_and_restarts_have_an_end(start, pretraining) -> None:
    training = start(pretraining, "hung", 2, *settings(*RATHER_LONG, "guard.max_restarts=0"))
    training.wait_for_step(3)
    ranks = training.ranks()
    os.kill(ranks[1], signal.SIGSTOP)
    code, said = training.end()
    assert code == 1
    assert "rank 1" in said
    assert "it was stopped from outside" in said
    assert "1 attempts in a row ended without a new checkpoint" in said
    assert not any(map(is_running, ranks.values()))


@pytest.mark.slow
def test_a_second_signal_ends_at_once(start, pretraining) -> None:
    training = start(pretraining, "twice", 2, *settings(*RATHER_LONG))
    training.wait_for_step(3)
    ranks = training.ranks()
    os.kill(ranks[1], signal.SIGSTOP)  # so that no orderly end comes before the second one
    training.process.send_signal(signal.SIGINT)
    time.sleep(ONE_REQUEST_S)
    training.process.send_signal(signal.SIGTERM)
    assert training.end()[0] == 128 + signal.SIGINT
    training.wait_until(lambda: not any(map(is_running, ranks.values())), while_it_runs=False)


@pytest.mark.slow
def test_the_same_ranks_go_on_bit_exactly(start, pretraining, tmp_path) -> None:
    """Also where torchrun starts them."""
    overrides = settings("train.checkpoint_every=5", "train.sample_every=100")
    whole = start(pretraining, "whole", 2, *overrides)
    assert whole.end()[0] == 0
    shutil.copytree(whole.out, tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/train/pretrain/checkpoints/step-00000010")
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "crosschip",
    ]
    train = ["train", str(pretraining), "--out", str(tmp_path / "resumed"), *overrides, "--resume"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*torchrun, *train], capture_output=True, text=True, env=environment, timeout=LIMIT_S)
    assert ended.returncode == 0, ended.stderr
    assert "going on after step 5" in ended.stderr
    curves = [lines(tmp_path / name / "train/pretrain/metrics.jsonl") for name in ("whole", "resumed")]
    for one, other in zip(*curves, strict=True):
        assert {key: value for key, value in one.items() if key not in ("seconds", "tokens_per_s")} == {
            key: value for key, value in other.items() if key not in ("seconds", "tokens_per_s")
        }
    checkpoints = [tmp_path / name / "train/pretrain/checkpoints/step-00000010" for name in ("whole", "resumed")]
    weights = [load_model(path).state_dict() for path in checkpoints]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_a_plug_in_s_chip_trains_as_the_cpu(start, pretraining, tmp_path) -> None:
    """The simulated chip is a device that torch learned of from a plug-in, with collectives of its own."""
    code, said = start(pretraining, "sim", 2, *settings("chips.train=sim", "parallel.expert_parallel=2")).end()
    assert code == 0, said
    assert "training on sim with 2 ranks of 1 thread each, 2 of which hold one set of experts" in said
    train_recipe(load_recipe(pretraining), RunDirectory(tmp_path / "cpu"), progress=LineProgress(None))
    curves = [lines(tmp_path / name / "train/pretrain/metrics.jsonl") for name in ("sim", "cpu")]
    assert_same_curve(*curves, 10)


def test_what_cannot_be_shared_is_said_before_any_rank_starts(start, pretraining) -> None:
    code, said = start(pretraining, "run", 3).end()
    assert code == 2
    assert said.count("is not a multiple of 6 (groups.num_groups = 1 x 3 ranks x train.gradient_accumulation = 2)") == 1
    assert not (pretraining.parent / "run").exists()
