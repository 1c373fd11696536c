"""A saved checkpoint that is wrong while training looks normal (fault H17) is found by reading it back."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoint_parts import STAGE, batch_of, state_of, train, trained

import crosschip.train.checkpoint.staging
from crosschip.errors import CheckpointError
from crosschip.rundir import sha256_of
from crosschip.train.checkpoint import Checkpointer, CheckpointEvent, find_newest, save_checkpoint, verify
from crosschip.train.checkpoint.loss_check import LossAnswer, LossQuestion, answer_question
from crosschip.train.checkpoint.readback import compare_tensors
from crosschip.train.checkpoint.staging import StagingBuffers, tensors_to_save
from crosschip.train.checkpoint.verdict import verdict_of
from crosschip.train.checkpoint.verifier import COMMAND
from crosschip.train.guard.hook import RollBack
from crosschip.train.joining import GroupReport, GroupReports
from crosschip.train.loop import _Stage
from crosschip.train.optimizer import build_optimizer
from crosschip.train.step import StepResult

HANG_S = 120.0


def wait_for_events(saver: Checkpointer, count: int) -> list[CheckpointEvent]:
    found: list[CheckpointEvent] = []
    deadline = time.monotonic() + HANG_S
    while len(found) < count:
        assert time.monotonic() < deadline, f"only {found}"
        found += saver.events()
        time.sleep(0.02)
    return found


def save_and_go_on(saver: Checkpointer, model, optimizer, step: int) -> None:
    """Save after `step`, train the next one, and let its loss be heard."""
    saver.save(state_of(step))
    loss = train(model, optimizer, step + 1)
    saver.observe(step + 1, loss, lambda: batch_of(step + 1), STAGE.gradient_accumulation)


def test_right_stale_spoilt_and_old_ones_beside_a_training(tmp_path, monkeypatch) -> None:
    """The process beside is one for all; what is planted is told by what it breaks."""
    model, optimizer = trained(1)
    copy_to_host = crosschip.train.checkpoint.staging.copy_to_host
    with Checkpointer(tmp_path, model, optimizer, STAGE.model_copy(update={"keep_checkpoints": 9})) as saver:
        save_and_go_on(saver, model, optimizer, 1)
        (right,) = wait_for_events(saver, 1)
        assert (right.event, right.step) == ("checkpoint-verified", 1)
        assert right.detail.endswith("its loss is training's to the bit")

        # Communication not finished: one shard's copy is still that of the save before.
        stale = dict(tensors_to_save(model, optimizer))["model.layers.1.mlp.experts.down_proj"].data_ptr()
        monkeypatch.setattr(
            crosschip.train.checkpoint.staging,
            "copy_to_host",
            lambda to, shard: None if shard.data_ptr() == stale else copy_to_host(to, shard),
        )
        save_and_go_on(saver, model, optimizer, 2)
        (wrong,) = wait_for_events(saver, 1)
        monkeypatch.setattr(crosschip.train.checkpoint.staging, "copy_to_host", copy_to_host)
        assert (wrong.event, wrong.step) == ("checkpoint-wrong", 2)
        assert wrong.detail == ("other numbers in the file than the device had: model.layers.1.mlp.experts.down_proj")

        save_and_go_on(saver, model, optimizer, 3)
        assert wait_for_events(saver, 1)[0].event == "checkpoint-verified"

        # What is saved is not what computes: sums and copies agree, and only the loss can tell.
        computing = saver._model
        saver._model = copy.deepcopy(model)
        with torch.no_grad():
            saver._model.layers[0].self_attn.o_proj.weight[0, 0] += 1e-3
        saver._optimizer = build_optimizer(saver._model, STAGE)
        save_and_go_on(saver, computing, optimizer, 4)
        (wrong,) = wait_for_events(saver, 1)
        assert (wrong.event, wrong.step) == ("checkpoint-wrong", 4)
        assert "every bit should be the same" in wrong.detail

        # The process beside is killed: told, and the next save gets another one.
        assert saver._verifier is not None
        first_pid = saver._verifier.pid
        assert first_pid is not None
        os.kill(first_pid, signal.SIGSTOP)
        save_and_go_on(saver, computing, optimizer, 5)
        os.kill(first_pid, signal.SIGKILL)
        (lost,) = wait_for_events(saver, 1)
        assert (lost.event, lost.step, lost.action) == ("checkpoint-not-verified", 5, "training goes on")
        assert "code -9" in lost.detail
        saver._model, saver._optimizer = computing, optimizer
        save_and_go_on(saver, computing, optimizer, 6)
        assert wait_for_events(saver, 1)[0].event == "checkpoint-verified"
        last_pid = saver._verifier.pid
    assert last_pid is not None
    assert not is_running(last_pid), "the end of the block ends the process"
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000005")
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000006")
    told: list[str] = []
    newest = find_newest(tmp_path, told.append)
    assert newest is not None
    assert newest.name == "step-00000003"
    assert "its loss is" in told[0]


# Answers only when it is let, and then that all is well.
PATIENT = """
import json, sys, time
from pathlib import Path
for head in iter(sys.stdin.buffer.readline, b""):
    asked = json.loads(head)
    sys.stdin.buffer.read(asked["num_bytes"])
    while not Path(asked["path"]).with_name("go").exists():
        time.sleep(0.02)
    print(json.dumps({"verdict": VERDICT, "detail": "read", "loss": None, "seconds": 0.0}), flush=True)
"""


@pytest.mark.parametrize(("verdict", "event"), [("right", "checkpoint-verified"), ("wrong", "checkpoint-wrong")])
def test_where_reading_is_slower_than_saving_the_newest_is_read_and_what_is_read_stays(
    tmp_path, monkeypatch, verdict: str, event: str
) -> None:
    reader = (sys.executable, "-c", PATIENT.replace("VERDICT", repr(verdict)))
    monkeypatch.setattr("crosschip.train.checkpoint.verifier.COMMAND", reader)
    model, optimizer = trained(1)
    directory = tmp_path / "checkpoints"
    with Checkpointer(tmp_path, model, optimizer, STAGE.model_copy(update={"keep_checkpoints": 2})) as saver:
        assert saver._verifier is not None
        for step in (1, 2, 3, 4):
            save_and_go_on(saver, model, optimizer, step)
            saver.wait()
            deadline = time.monotonic() + HANG_S
            while saver._verifier.reads != {1}:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        assert sorted(path.name[-1] for path in directory.iterdir()) == ["1", "3", "4"]
        (directory / "go").touch()
        told = wait_for_events(saver, 3)
    assert [(each.step, each.event) for each in told] == [(1, event), (3, "checkpoint-not-verified"), (4, event)]
    assert told[1].detail.startswith("passed over: reading back takes longer than")


def test_one_that_was_wrong_and_is_gone_is_told(tmp_path) -> None:
    model, optimizer = trained(1)
    with Checkpointer(tmp_path, model, optimizer, STAGE) as saver:
        gone = tmp_path / "checkpoints" / "step-00000001"
        saver._judge(1, gone, verdict_of(None, None))
        saver._judge(1, gone, verdict_of("other numbers", None))
        (told,) = saver.events()
    assert (told.event, told.detail) == ("checkpoint-wrong", "other numbers")


def test_a_reader_that_does_not_answer_in_time_is_killed_and_told(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("crosschip.train.checkpoint.verifier.COMMAND", ("sleep", "1000"))
    monkeypatch.setattr("crosschip.train.checkpoint.verifier.LIMIT_S", 0.2)
    model, optimizer = trained(1)
    with Checkpointer(tmp_path, model, optimizer, STAGE) as saver:
        save_and_go_on(saver, model, optimizer, 1)
        (told,) = wait_for_events(saver, 1)
        assert (told.event, told.step, told.action) == ("checkpoint-not-verified", 1, "training goes on")
        assert "did not answer within 0 s and was killed" in told.detail
        assert saver._verifier is not None
        assert saver._verifier.pid is None, "the next one gets another process"


def test_one_that_training_ended_before_is_told(tmp_path, monkeypatch) -> None:
    never_answers = ("sh", "-c", "cat > /dev/null")
    monkeypatch.setattr("crosschip.train.checkpoint.verifier.COMMAND", never_answers)
    model, optimizer = trained(1)
    with Checkpointer(tmp_path, model, optimizer, STAGE) as saver:
        save_and_go_on(saver, model, optimizer, 1)
        saver.finish(state_of(2))
        last, first = saver.events()
        assert (last.event, last.step) == ("checkpoint-verified", 2)
        assert (first.event, first.step) == ("checkpoint-not-verified", 1)
        assert "training ended" in first.detail


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_the_process_beside_ends_when_training_is_killed() -> None:
    code = (
        "import subprocess, sys, time\n"
        "beside = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, start_new_session=True)\n"
        "print(beside.pid, flush=True); time.sleep(600)\n"
    )
    training = subprocess.Popen([sys.executable, "-c", code, *COMMAND], stdout=subprocess.PIPE, text=True)
    assert training.stdout is not None
    pid = int(training.stdout.readline())
    assert is_running(pid)
    training.kill()
    training.wait()
    deadline = time.monotonic() + HANG_S
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_three_wrong_ones_in_a_row_end_training(tmp_path, monkeypatch) -> None:
    model, optimizer = trained(1)
    take = StagingBuffers.take

    def spoilt(self, tensors):
        staged = take(self, tensors)
        next(iter(staged.copies.values())).view(-1)[0] += 1
        return staged

    monkeypatch.setattr(StagingBuffers, "take", spoilt)
    settings = STAGE.model_copy(update={"verify_checkpoints": "tensors"})
    with Checkpointer(tmp_path, model, optimizer, settings) as saver:
        for step in (1, 2, 3):
            saver.save(state_of(step))
        with pytest.raises(CheckpointError, match=r"3 checkpoints in a row under .* were wrong"):
            saver.save(state_of(4))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_is_reproduced_to_the_bit_where_the_arithmetic_is_the_same(tmp_path, dtype, tied) -> None:
    model, optimizer = trained(2, tie_word_embeddings=tied)
    path = save_checkpoint(tmp_path, model, optimizer, state_of(2), keep=1)
    loss = train(model, optimizer, 3, getattr(torch, dtype))
    answer = answer_question(path, LossQuestion(loss, dtype, 1, 1, 1, "cpu"), batch_of(3))
    assert (answer.limit, answer.found) == (0.0, loss)
    other = answer_question(path, LossQuestion(loss, dtype, 1, 1, 1, "cpu"), batch_of(4))
    assert not other.is_reproduced


@pytest.mark.parametrize(
    ("device", "num_processes", "dtype"),
    [("cpu", 2, "float32"), ("cuda", 1, "float32"), ("cuda", 1, "bfloat16"), ("npu", 8, "bfloat16")],
)
def test_elsewhere_the_loss_is_within_a_limit_that_an_old_checkpoint_is_not(
    tmp_path, device, num_processes, dtype
) -> None:
    """The CPU stands for a chip whose arithmetic is another one; each such computation is honest here."""
    model, optimizer = trained(2)
    path = save_checkpoint(tmp_path, model, optimizer, state_of(2), keep=2)
    losses = []
    for num_parts in (1, 2, 4):
        batch = batch_of(3)
        parts = zip(batch.input_ids_BT.chunk(num_parts), batch.labels_BT.chunk(num_parts), strict=True)
        sums = [model.loss(ids, labels, getattr(torch, dtype)).loss_sum for ids, labels in parts]
        losses.append(float(torch.stack(sums).sum().detach()) / batch.labels_BT.numel())
    train(model, optimizer, 3)
    newer = save_checkpoint(tmp_path, model, optimizer, state_of(3), keep=2)
    for loss in losses:
        question = LossQuestion(loss, dtype, 1, 1, num_processes, device)
        answer = answer_question(path, question, batch_of(3))
        assert answer.is_reproduced
        assert 0 < answer.limit < 0.01 * loss
        assert not answer_question(newer, question, batch_of(3)).is_reproduced


def test_groups_that_compute_in_two_dtypes_have_the_limit_of_the_coarser(tmp_path) -> None:
    model, optimizer = trained(2)
    path = save_checkpoint(tmp_path, model, optimizer, state_of(2), keep=2)
    batch = batch_of(3)
    halves = zip(batch.input_ids_BT.chunk(2), batch.labels_BT.chunk(2), (torch.float32, torch.bfloat16), strict=True)
    loss = sum(float(model.loss(ids, labels, dtype).loss_sum.detach()) for ids, labels, dtype in halves) / 64
    train(model, optimizer, 3)
    newer = save_checkpoint(tmp_path, model, optimizer, state_of(3), keep=2)
    for compute_alike in (True, False):
        question = LossQuestion(loss, "float32", 1, 1, 2, "cpu", compute_alike)
        assert answer_question(path, question, batch).is_reproduced is not compute_alike
        assert not answer_question(newer, question, batch).is_reproduced


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_loss_of_a_step_that_was_skipped_neither_condemns_nor_confirms_a_checkpoint(tmp_path, device) -> None:
    path = save_checkpoint(tmp_path, *trained(1), state_of(1), keep=1)
    answer = answer_question(path, LossQuestion(None, "float32", 1, 1, 1, device), batch_of(2))
    verdict = verdict_of(None, answer)
    assert verdict.verdict == "unknown"
    assert f"its loss is {answer.found!r}, and training has skipped the step" in verdict.detail
    assert verdict_of(None, LossAnswer(None, math.nan, 0.0)).verdict == "wrong", "its weights are no numbers"


@pytest.mark.parametrize("updated", [True, False])
@pytest.mark.parametrize("arithmetics", [(7, 7), (7, 8)])
def test_only_the_loss_of_a_step_that_counts_is_compared(updated, arithmetics) -> None:
    heard: list[tuple[object, ...]] = []
    job = SimpleNamespace(
        groups=SimpleNamespace(seen=lambda sequences, taken: (0, 4)),
        position=SimpleNamespace(step=2, sequences=0),
        settings=SimpleNamespace(gradient_accumulation=1),
    )
    saver = SimpleNamespace(observe=lambda step, loss, *rest: heard.append((loss, rest[-1])))
    stage: Any = SimpleNamespace(job=job, saver=saver, proven_step=0)
    _Stage._compare(stage, GroupReports({f"group {each}": GroupReport(1.0, 0.0, 1.0, 5, each) for each in arithmetics}))
    result, taken = StepResult(7.5, None, 0.1, 4, 4, None, updated=updated), SimpleNamespace(count=4)
    _Stage._observe(stage, 3, result, taken)  # type: ignore[arg-type]
    assert heard == [(7.5 if updated else None, len(set(arithmetics)) == 1)]
    assert stage.proven_step == (2 if updated else 0)


def test_nothing_is_asked_about_a_loss_of_weights_that_a_roll_back_has_changed(tmp_path) -> None:
    """Between two outer steps the step stays, and the weights become those that the groups have in common."""
    model, optimizer = trained(1)
    place = SimpleNamespace(slice=lambda *_: SimpleNamespace(taken_by_all=4))
    job = SimpleNamespace(
        groups=SimpleNamespace(place=place, take_common=lambda: True),
        position=SimpleNamespace(step=1, sequences=4),
        settings=SimpleNamespace(batch_size=4),
    )
    with Checkpointer(tmp_path, model, optimizer, STAGE) as saver:
        saver.save(state_of(1))
        stage: Any = SimpleNamespace(job=job, saver=saver, _beat=lambda phase: None)
        _Stage._roll_back(stage, RollBack(2, past_the_data=True))
        saver.observe(2, 1.0, lambda: pytest.fail("the checkpoint has other weights"), 1)
    assert job.position.sequences == 8


def test_one_that_is_set_aside_before_it_is_read_is_not_wrong(tmp_path) -> None:
    question = LossQuestion(1.0, "float32", 1, 1, 1, "cpu")
    job = {"path": str(tmp_path / "step-00000001"), "question": dataclasses.asdict(question)}
    assert verify._answer(job, b"").verdict == "unknown"


def test_by_hand(tmp_path, capsys) -> None:
    path = save_checkpoint(tmp_path, *trained(1), state_of(1), keep=1)
    assert verify.main([str(path)]) == 0
    assert "right: every tensor is what the device had" in capsys.readouterr().out
    (path / "config.json").unlink()
    assert verify.main([str(path)]) == 1
    assert "wrong: config.json is missing" in capsys.readouterr().out
    assert verify.main(["--help"]) == 2
    assert "usage: python -m crosschip.train.checkpoint.verify CHECKPOINT" in capsys.readouterr().err


def test_sums_that_do_not_fit_the_tensors_are_named(tmp_path) -> None:
    path = save_checkpoint(tmp_path, *trained(1), state_of(1), keep=1)
    assert compare_tensors(path) is None
    state = json.loads((path / "state.json").read_text())
    sums = json.loads((path / "checksums.json").read_text())
    del state["files"]["checksums.json"]
    (path / "state.json").write_text(json.dumps(state))
    (path / "COMPLETE").write_text(sha256_of(path / "state.json"))
    for changed, named in (
        (sums[1:], sums[0]["name"]),
        ([{**sums[0], "sums": [1, 2, 3]}, *sums[1:]], sums[0]["name"]),
        ([*sums, {**sums[0], "name": "model.extra"}], "model.extra"),
    ):
        (path / "checksums.json").write_text(json.dumps(changed))
        assert compare_tensors(path) == f"other numbers in the file than the device had: {named}"


def test_nothing_is_asked_about_the_loss_of_another_step(tmp_path) -> None:
    model, optimizer = trained(1)
    with Checkpointer(tmp_path, model, optimizer, STAGE) as saver:
        saver.save(state_of(1))
        saver.observe(3, 1.0, lambda: pytest.fail("its batch is not needed"), 1)
        saver.observe(2, 1.0, lambda: pytest.fail("the step after the save has gone by"), 1)
        saver.wait()
        assert saver._verifier is not None
        assert saver._verifier.pid is None
