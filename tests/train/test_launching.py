"""`crosschip train` as a whole: one group with its supervisor, several with a lighthouse, struck while they run."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from crosschip.errors import CrosschipError, RunDirectoryError
from crosschip.model import load_model
from crosschip.recipe import load_recipe
from crosschip.rundir import RunDirectory
from crosschip.train.drill.orders import DIRECTORY, Order, give_order, taken
from crosschip.train.guard.heartbeat import read_beats
from crosschip.train.guard.interruption import Interruption
from crosschip.train.guard.observed import Event
from crosschip.train.guard.restarts import Restarts
from crosschip.train.kept_estimate import SHARED_DIRECTORY
from crosschip.train.launching import (
    TrainCommand,
    TrainingFailedError,
    _Groups,
    group_directory,
    train_from_outside,
    train_to_the_end,
)
from crosschip.train.outer.lighthouse import Lighthouse
from tests.train.launched import Training, children, is_running, lines, settings

RECIPE = Path(__file__).parents[2] / "recipes/first.toml"
LONG = ("train.steps=4000", "train.sample_every=4000", "train.validate_every=4000", "train.checkpoint_every=5")
TWO_GROUPS = ("groups.num_groups=2", "train.gradient_accumulation=1")


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_model(run / f"train/pretrain/checkpoints/step-{step:08d}").state_dict()


def pid_of(run: Path) -> int:
    (beat,) = read_beats(run / "heartbeats")
    return beat.pid


def has_checkpoint(run: Path) -> bool:
    return any(run.glob("train/pretrain/checkpoints/step-*/COMPLETE"))


def test_a_killed_process_is_replaced_and_its_steps_are_the_same_again(start, pretraining) -> None:
    training = start(pretraining, "run", 1, *settings(*LONG))
    training.wait_for_step(7)
    training.wait_until(lambda: has_checkpoint(training.out))
    seen: dict[int, float] = {line["step"]: line["loss"] for line in training.metrics()}  # type: ignore[misc]
    victim = pid_of(training.out)
    os.kill(victim, signal.SIGKILL)
    training.wait_until(lambda: "resumed" in training.events())
    assert training.events()["killed"]["detail"].startswith("rank 0 in ")
    training.wait_for_step(max(seen) + 2)
    again = {line["step"]: line["loss"] for line in training.metrics()}
    assert all(again[step] == loss for step, loss in seen.items())
    training.process.send_signal(signal.SIGTERM)
    code, said = training.end()
    assert code == 128 + signal.SIGTERM, said
    assert not is_running(victim)


def test_a_wrong_number_is_computed_again_and_nothing_else_changes(start, pretraining, tmp_path, monkeypatch) -> None:
    """Through the whole loop: an order to the rank, the guard, the log, and the weights of a run without it."""
    orders = tmp_path / "orders"
    orders.mkdir()
    give_order(orders, 0, 0, Order(1, "nan-gradient"))
    monkeypatch.setenv(DIRECTORY, str(orders))
    disturbed = start(pretraining, "disturbed", 1)
    assert disturbed.end()[0] == 0
    monkeypatch.delenv(DIRECTORY)
    honest = start(pretraining, "honest", 1)
    assert honest.end()[0] == 0
    assert taken(orders, 1) is not None
    assert "gradient norm nan; computed again" in disturbed.events()["transient-fault"]["detail"]
    assert "transient-fault" not in honest.events()
    pairs = zip(weights(disturbed.out, 10).values(), weights(honest.out, 10).values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_two_groups_train_as_one_process_and_end_with_the_same_weights(start, pretraining) -> None:
    groups = start(pretraining, "groups", 1, *settings(*TWO_GROUPS))
    code, said = groups.end()
    assert code == 0, said
    alone = start(pretraining, "alone", 1, *settings("train.gradient_accumulation=2"))
    assert alone.end()[0] == 0
    assert [line["groups"] for line in groups.metrics()] == [2] * 10
    for one, other in zip(groups.metrics(), alone.metrics(), strict=True):
        assert one["trained_tokens"] == other["trained_tokens"]
        assert one["loss"] == pytest.approx(other["loss"], rel=one["step"] * 256 * 2**-24)
    pairs = zip(weights(groups.out, 10).values(), weights(group_directory(groups.out, 1), 10).values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.slow
def test_groups_whose_weights_differ_go_back_to_where_they_were_equal(
    start, pretraining, tmp_path, monkeypatch
) -> None:
    """A bit flips in one group's weights after a step of which a checkpoint is made: that one must not be taken."""
    orders = tmp_path / "orders"
    orders.mkdir()
    monkeypatch.setenv(DIRECTORY, str(orders))
    training = start(pretraining, "groups", 1, *settings(*TWO_GROUPS, *LONG, "train.checkpoint_every=1"))
    second = group_directory(training.out, 1)
    training.wait_for_step(7)
    training.wait_until(lambda: has_checkpoint(training.out) and has_checkpoint(second))
    give_order(orders, 1, 0, Order(1, "weight-flip"))
    training.wait_until(lambda: "replicas-differ" in training.events())
    differed = training.events()["replicas-differ"]
    struck = taken(orders, 1)
    assert struck is not None
    assert differed["step"] == struck.step
    assert "rolled back to the last good checkpoint (1 of" in str(differed["action"])
    training.wait_until(lambda: training.metrics()[-1]["step"] > int(differed["step"]) + 3)
    events = [line["event"] for line in lines(second / "train/pretrain/events.jsonl")]
    assert events.count("replicas-differ") == 1
    assert "hang" not in events


@pytest.mark.slow
def test_a_group_that_dies_is_healed_while_the_other_goes_on(start, pretraining) -> None:
    training = start(pretraining, "groups", 1, *settings(*TWO_GROUPS, *LONG))
    second = group_directory(training.out, 1)
    training.wait_for_step(7)
    os.kill(pid_of(second), signal.SIGKILL)
    training.wait_until(lambda: any(line.get("groups", 1) == 1 for line in training.metrics()))
    training.wait_until(
        lambda: any(line["event"] == "healed" for line in lines(second / "train/pretrain/events.jsonl"))
    )
    healed = len(training.metrics())
    training.wait_until(lambda: training.metrics()[-1].get("groups") == 2)
    training.wait_for_step(healed + 3)
    both = [
        {line["step"]: line["loss"] for line in lines(run / "train/pretrain/metrics.jsonl")}
        for run in (training.out, second)
    ]
    common = [step for step in both[0].keys() & both[1].keys() if step > healed]
    assert common
    assert all(both[0][step] == both[1][step] for step in common)


def supervisor_of(training: Training, group: int) -> int:
    """The process id of a group's supervisor, below that of all groups."""
    found = [pid for pid in children(training.process.pid) if f"--group\0{group}\0".encode() in command_line(pid)]
    assert len(found) == 1
    return found[0]


def command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.slow
def test_a_group_whose_supervisor_is_killed_is_told_started_again_and_healed(start, pretraining) -> None:
    training = start(pretraining, "groups", 1, *settings(*TWO_GROUPS, *LONG))
    second = group_directory(training.out, 1)
    training.wait_for_step(7)
    os.kill(supervisor_of(training, 1), signal.SIGKILL)
    training.wait_until(lambda: "group-lost" in training.events())
    lost = training.events()["group-lost"]
    assert lost["detail"] == "the supervisor of group 1 died of signal 9"
    assert re.match(r"restarting after committed step \d+ \(1 of 3 without progress\)", lost["action"])
    training.wait_until(
        lambda: any(line["event"] == "healed" for line in lines(second / "train/pretrain/events.jsonl"))
    )
    training.wait_until(lambda: training.metrics()[-1].get("groups") == 2)
    training.process.send_signal(signal.SIGTERM)
    code, said = training.end()
    assert code == 128 + signal.SIGTERM, said
    assert "2 groups meet at http://" in said


@pytest.mark.parametrize(("code", "num_starts"), [(-signal.SIGKILL, 2), (1, 0)])
def test_a_group_is_not_started_again_for_ever(code: int, num_starts: int, tmp_path: Path) -> None:
    """Nor at all where its supervisor has ended by itself, which then has tried its own remedies."""
    started: list[bool] = []

    def start(number: int, resume: bool) -> SimpleNamespace:
        started.append(resume)
        return SimpleNamespace(poll=lambda: code)

    told: list[Event] = []
    groups = object.__new__(_Groups)
    groups.__dict__ |= {
        "_command": SimpleNamespace(run=RunDirectory(tmp_path)),
        "_processes": [SimpleNamespace(poll=lambda: None), SimpleNamespace(poll=lambda: code)],
        "_restarts": [Restarts(2, 0), Restarts(2, 0)],
        "_given_up": set(),
        "_log": lambda stage, event: told.append(event),
        "_start": start,
    }
    for _ in range(5):
        groups._tell_of_the_lost(Interruption())
    assert started == [True] * num_starts
    assert [event.event for event in told] == ["group-lost"] * (num_starts + 1)
    assert told[-1].action == "not started again"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["every-step", "diloco"])
def test_groups_that_were_stopped_go_on_together(start, pretraining, mode) -> None:
    overrides = settings(*TWO_GROUPS, *LONG, f"groups.mode={mode}", "groups.sync_every=4")
    training = start(pretraining, "groups", 1, *overrides)
    training.wait_for_step(10)
    training.process.send_signal(signal.SIGTERM)
    code, said = training.end()
    assert code == 128 + signal.SIGTERM, said
    stopped = [len(lines(group_directory(training.out, group) / "train/pretrain/metrics.jsonl")) for group in (0, 1)]
    again = start(pretraining, "groups", 1, *overrides, "--resume")
    again.wait_for_step(max(stopped) + 6)
    again.process.send_signal(signal.SIGTERM)
    code, said = again.end()
    assert code == 128 + signal.SIGTERM, said
    assert again.events()["resumed"]["detail"].startswith("after step ")


@pytest.mark.parametrize("mode", ["every-step", pytest.param("diloco", marks=pytest.mark.slow)])
def test_a_group_that_is_to_stop_does_not_wait_for_one_that_has_ended(start, pretraining, mode) -> None:
    """The other may have had its signal a step earlier, and `min_groups` makes the wait one for who never comes."""
    with contextlib.closing(Lighthouse(min_groups=2)) as lighthouse:
        overrides = settings(*TWO_GROUPS, *LONG, "groups.min_groups=2", f"groups.lighthouse={lighthouse.address}")
        overrides += settings(f"groups.mode={mode}", "groups.sync_every=4")
        both = [start(pretraining, f"{group}", 1, *overrides, "--group", str(group)) for group in (0, 1)]
        both[0].wait_for_step(6)
        for training in both:
            if training is both[1]:  # waits for the other, which its supervisor must not take for a hang
                waiting = pid_of(training.out)
                time.sleep(12.0)
                assert pid_of(training.out) == waiting
            training.process.send_signal(signal.SIGTERM)
            code, said = training.end()
            assert code == 128 + signal.SIGTERM, said
            step = training.metrics()[-1]["step"]
            assert training.events()["interrupted"]["action"] == f"saved step-{int(step):08d}"
        again = [start(pretraining, f"{group}", 1, *overrides, "--group", str(group), "--resume") for group in (0, 1)]
        again[0].wait_for_step(int(both[0].metrics()[-1]["step"]) + 6)
        assert again[0].metrics()[-1]["groups"] == 2


def command(recipe: Path, out: Path, *overrides: str, resume: bool = False, group: int | None = None) -> TrainCommand:
    run = RunDirectory(out)
    return TrainCommand(
        load_recipe(recipe, list(overrides)), run, ["train", str(recipe), "--out", str(out)], resume, 1, group
    )


def test_what_makes_no_sense_is_said_before_anything_starts(pretraining, tmp_path) -> None:
    with pytest.raises(RunDirectoryError, match="no run at"):
        train_from_outside(command(pretraining, tmp_path / "none", resume=True))
    assert not (tmp_path / "none").exists()
    metrics = tmp_path / "old/train/pretrain/metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    metrics.write_text('{"step": 1}\n')
    for overrides in ((), TWO_GROUPS):  # a rank that dies early would be started again with --resume
        with pytest.raises(RunDirectoryError, match=f"{tmp_path / 'old'} already holds results of a run"):
            train_from_outside(command(pretraining, tmp_path / "old", *overrides))
    with pytest.raises(CrosschipError, match="--group 2 is none of the 2 groups"):
        train_from_outside(command(pretraining, tmp_path / "run", *TWO_GROUPS, group=2))
    with pytest.raises(CrosschipError, match="--group 1 is one of 2 groups, and nothing says where they meet"):
        train_from_outside(command(pretraining, tmp_path / "run", *TWO_GROUPS, group=1))
    with pytest.raises(CrosschipError, match="which of the 2 is this"):
        train_from_outside(command(pretraining, tmp_path / "run", *TWO_GROUPS, "groups.lighthouse=http://127.0.0.1:1"))


@pytest.mark.parametrize(
    ("codes", "is_urgent", "code"),
    [
        ([143, 143], False, 143),
        ([143, 0], False, 143),
        ([143, 2], False, 2),
        ([0, -9], False, 137),
        ([-9, 143], True, 143),
    ],
)
def test_a_group_that_could_not_save_after_a_signal_decides_about_the_exit_code(
    codes: list[int], is_urgent: bool, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = object.__new__(_Groups)
    groups.__dict__["_processes"] = [SimpleNamespace(pid=pid, returncode=each) for pid, each in enumerate(codes)]
    groups.__dict__ |= {"_command": SimpleNamespace(run=SimpleNamespace(path=tmp_path)), "_sent_home": set()}
    interruption = Interruption()
    interruption.received, interruption.is_urgent = signal.SIGTERM, is_urgent
    assert groups.exit_code(interruption) == code
    assert ("group 1 ended with exit code" in capsys.readouterr().err) is (code not in (143,))


def test_all_groups_of_a_machine_are_told_of_one_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, str]] = []
    monkeypatch.setattr(subprocess, "Popen", lambda arguments, env, **words: told.append(env))
    groups = object.__new__(_Groups)
    command = TrainCommand(load_recipe(RECIPE), RunDirectory(tmp_path), ["--out", ""], False, 1, None)
    groups.__dict__ |= {"_command": command, "_settings": SimpleNamespace(num_groups=2), "_address": "http://x:1"}
    for number in (0, 1):
        groups._start(number, resume=False)
    assert [environment[SHARED_DIRECTORY] for environment in told] == [str(tmp_path)] * 2


def test_groups_that_are_too_few_save_before_they_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved, ready = tmp_path / "saved", tmp_path / "ready"
    saves = f"trap 'sleep 1; touch {saved}; exit 143' TERM; touch {ready}; while :; do sleep 0.05; done"
    groups = object.__new__(_Groups)
    groups.__dict__ |= {
        "_command": SimpleNamespace(run=SimpleNamespace(path=tmp_path)),
        "_settings": SimpleNamespace(min_groups=2),
        "_processes": [subprocess.Popen(["sh", "-c", saves]), subprocess.Popen(["sh", "-c", "exit 1"])],
        "_told": set(),
        "_sent_home": set(),
        "_tell_of_the_lost": lambda interruption: None,
        "_keep_alight": lambda: None,
    }
    while not ready.exists():
        time.sleep(0.05)
    interruption = Interruption()
    groups.run(interruption)
    assert saved.exists()
    assert groups.exit_code(interruption) == 1
    assert "group 1 ended with exit code 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "error"), [(0, KeyboardInterrupt), (130, KeyboardInterrupt), (1, TrainingFailedError)]
)
def test_a_signal_in_the_last_step_ends_the_verb_that_would_go_on(
    pretraining: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, error: type[BaseException]
) -> None:
    def train(command: TrainCommand) -> int:
        with Interruption():
            if code != 130:
                os.kill(os.getpid(), signal.SIGTERM)
        return code

    monkeypatch.setattr("crosschip.train.launching.train_from_outside", train)
    with pytest.raises(error):
        train_to_the_end(command(pretraining, tmp_path / "run"))


def test_without_a_signal_the_verb_goes_on(pretraining: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crosschip.train.launching.train_from_outside", lambda command: 0)
    train_to_the_end(command(pretraining, tmp_path / "run"))
