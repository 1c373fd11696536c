"""Saving beside the training: what is saved, what waits for what, and what becomes of errors."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_parts import STAGE, names, new_model, state_of, train, trained

import crosschip.train.checkpoint.writing
from crosschip.errors import CheckpointError
from crosschip.model import load_model
from crosschip.model.weights import own_tensors
from crosschip.rundir import write_json
from crosschip.train.checkpoint import Checkpointer, find_newest, load_optimizer, read_state, save_checkpoint
from crosschip.train.checkpoint.staging import StagingBuffers, tensors_to_save
from crosschip.train.optimizer import build_optimizer, optimizer_tensors

TENSORS = STAGE.model_copy(update={"verify_checkpoints": "tensors"})
OFF = STAGE.model_copy(update={"verify_checkpoints": "off"})


@contextlib.contextmanager
def no_file_over(num_bytes: int) -> Iterator[None]:
    """As on a full disk: writing a file beyond that fails in this process, with an error of the system."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def gate(monkeypatch) -> Iterator[threading.Event]:
    """Saves are not written before this is set."""
    opened = threading.Event()
    write = crosschip.train.checkpoint.writing.write_checkpoint

    def gated(*arguments: object) -> None:
        assert opened.wait(60)
        write(*arguments)

    monkeypatch.setattr(crosschip.train.checkpoint.writing, "write_checkpoint", gated)
    yield opened
    opened.set()


def clones(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def test_a_save_holds_the_moment_of_the_call_though_training_went_on(tmp_path, gate) -> None:
    model, optimizer = trained(2)
    weights, moments = clones(own_tensors(model)), clones(optimizer_tensors(model, optimizer))
    with Checkpointer(tmp_path, model, optimizer, TENSORS) as saver:
        receipt = saver.save(state_of(2))
        train(model, optimizer, 3)
        assert not receipt.path.exists()
        gate.set()
        assert saver.wait() == receipt.path
    again = load_model(receipt.path)
    its_optimizer = build_optimizer(again, STAGE)
    load_optimizer(receipt.path, again, its_optimizer)
    for found, expected in ((own_tensors(again), weights), (optimizer_tensors(again, its_optimizer), moments)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert any(not torch.equal(own_tensors(model)[name], tensor) for name, tensor in weights.items())


def test_the_memory_of_the_copies_is_used_again(tmp_path) -> None:
    model, optimizer = trained(1)
    buffers = StagingBuffers()
    first, second = (buffers.take(tensors_to_save(model, optimizer)) for _ in range(2))
    assert [c.data_ptr() for c in first.copies.values()] == [c.data_ptr() for c in second.copies.values()]
    live = {tensor.data_ptr() for tensor in tensors_to_save(model, optimizer).values()}
    assert not live & {copy.data_ptr() for copy in second.copies.values()}


def test_a_second_save_waits_for_the_first(tmp_path, gate) -> None:
    model, optimizer = trained(1)
    with Checkpointer(tmp_path, model, optimizer, OFF) as saver:
        saver.save(state_of(1))
        threading.Timer(0.3, gate.set).start()
        saver.save(state_of(2))
        assert gate.is_set()
        assert "step-00000001" in names(tmp_path), "the first is there before the second begins"
        saver.wait()
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_save_that_takes_too_long_is_overdue_until_it_is_done(tmp_path, gate) -> None:
    model, optimizer = trained(1)
    with Checkpointer(tmp_path, model, optimizer, OFF, first_write_s=0.0) as saver:
        assert not saver.is_overdue(), "nothing is being written"
        saver.save(state_of(1))
        assert saver.is_overdue()
        gate.set()
        saver.wait()
        assert not saver.is_overdue()
        gate.clear()
        saver.save(state_of(2))
        assert not saver.is_overdue(), "one that has begun just now, when it is known how long they take"
        gate.set()


def test_how_long_a_save_may_still_take_is_known(tmp_path, gate) -> None:
    model, optimizer = trained(1)
    with Checkpointer(tmp_path, model, optimizer, OFF, first_write_s=30.0) as saver:
        assert (saver.write_may_take_s(), saver.finish_may_take_s()) == (0.0, 60.0), "a write, and reading it back"
        saver.save(state_of(1))
        assert 0.0 < saver.write_may_take_s() <= 30.0
        assert 60.0 < saver.finish_may_take_s() <= 90.0, "the write before comes first"
        gate.set()
        saver.wait()
        assert saver.write_may_take_s() == 0.0


def test_the_end_of_the_block_waits_even_when_training_failed(tmp_path, gate) -> None:
    model, optimizer = trained(1)

    def fail() -> None:
        with Checkpointer(tmp_path, model, optimizer, OFF) as saver:
            saver.save(state_of(1))
            threading.Timer(0.3, gate.set).start()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert names(tmp_path) == ["step-00000001"]


def test_old_checkpoints_go_and_permanent_ones_stay(tmp_path) -> None:
    model, optimizer = trained(1)
    settings = OFF.model_copy(update={"keep_checkpoints": 2, "keep_every": 3})
    with Checkpointer(tmp_path, model, optimizer, settings) as saver:
        for step in range(1, 9):
            saver.save(state_of(step))
        saver.wait()
    assert names(tmp_path) == [f"step-0000000{step}" for step in (3, 6, 7, 8)]


def test_the_newest_right_one_stays_while_later_ones_are_wrong(tmp_path) -> None:
    model, optimizer = trained(1)
    with Checkpointer(tmp_path, model, optimizer, OFF) as saver:
        for step in range(1, 7):
            path = saver.save(state_of(step)).path
            saver.wait()
            verdict = "right" if step == 1 else "wrong"
            write_json(path / "verified.json", {"schema_version": 1, "verdict": verdict, "detail": "planted"})
    newest = find_newest(tmp_path, warn=lambda told: None)
    assert newest is not None
    assert newest.name == "step-00000001"


def test_a_full_disk_is_told_and_the_next_save_tries_again(tmp_path) -> None:
    model, optimizer = trained(1)
    with Checkpointer(tmp_path, model, optimizer, TENSORS) as saver:
        saver.save(state_of(1))
        saver.wait()
        with no_file_over(10_000):
            saver.save(state_of(2))
            with pytest.raises(CheckpointError, match=r"step 2 could not be written.*File too large"):
                saver.wait()
        events = saver.events()
        assert [event.event for event in events] == ["checkpoint-verified", "checkpoint-failed"]
        assert (events[1].step, "1 of 3" in events[1].action) == (2, True)
        assert names(tmp_path) == ["step-00000001"], "nothing is left of what failed"
        train(model, optimizer, 2)
        saver.save(state_of(3))
        assert saver.wait() == tmp_path / "checkpoints" / "step-00000003"


def test_a_disk_that_stays_full_ends_training_after_three_saves(tmp_path) -> None:
    model, optimizer = trained(1)
    with Checkpointer(tmp_path, model, optimizer, OFF) as saver, no_file_over(10_000):
        for step in (1, 2, 3):
            saver.save(state_of(step))
        with pytest.raises(CheckpointError, match=r"3 saves in a row have failed, the last one:.*step 3.*File too"):
            saver.save(state_of(4))
        assert [event.event for event in saver.events()] == ["checkpoint-failed"] * 3


def test_failures_that_are_not_in_a_row_do_not_end_training(tmp_path) -> None:
    model, optimizer = trained(1)
    with Checkpointer(tmp_path, model, optimizer, OFF) as saver:
        for step in range(1, 9):
            with no_file_over(10_000 if step % 2 else 10**9):
                saver.save(state_of(step))
                saver._join()
        assert [event.step for event in saver.events()] == [1, 3, 5, 7]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(directory)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def fill(file: Path) -> None:
    """Write until nothing fits any more."""
    with file.open("wb", buffering=0) as opened, contextlib.suppress(OSError):
        while True:
            opened.write(bytes(4096))


def test_a_really_full_disk_and_room_again(small_disk) -> None:
    model, optimizer = trained(1)
    with Checkpointer(small_disk, model, optimizer, TENSORS) as saver:
        saver.save(state_of(1))
        saver.wait()
        filling = small_disk / "filling"
        fill(filling)
        saver.save(state_of(2))
        with pytest.raises(CheckpointError, match="No space left on device"):
            saver.wait()
        assert names(small_disk) == ["step-00000001"]
        assert find_newest(small_disk, warn=pytest.fail) == small_disk / "checkpoints" / "step-00000001"
        filling.unlink()
        saver.save(state_of(3))
        saver.wait()
        assert [event.event for event in saver.events()] == [
            "checkpoint-verified",
            "checkpoint-failed",
            "checkpoint-verified",
        ]


def test_a_defect_of_ours_in_the_background_is_raised_at_the_next_call(tmp_path, monkeypatch) -> None:
    def broken(*arguments: object) -> None:
        raise TypeError("a defect")

    monkeypatch.setattr(crosschip.train.checkpoint.writing, "write_checkpoint", broken)
    model, optimizer = trained(1)
    with Checkpointer(tmp_path, model, optimizer, OFF) as saver:
        saver.save(state_of(1))
        with pytest.raises(TypeError, match="a defect"):
            saver.save(state_of(2))


def test_finish_writes_and_reads_back(tmp_path) -> None:
    model, optimizer = trained(1)
    with Checkpointer(tmp_path, model, optimizer, STAGE) as saver:
        path = saver.finish(state_of(1))
        assert read_state(path).step == 1
        (event,) = saver.events()
        assert (event.event, event.detail) == (
            "checkpoint-verified",
            "every tensor is what the device had; its loss was not compared",
        )


def test_finish_refuses_a_wrong_one(tmp_path, monkeypatch) -> None:
    model, optimizer = trained(1)
    spoil_copies(monkeypatch, "model.lm_head.weight")
    named = r"step-00000001 is wrong: other numbers.*model\.lm_head\.weight"
    with Checkpointer(tmp_path, model, optimizer, STAGE) as saver, pytest.raises(CheckpointError, match=named):
        saver.finish(state_of(1))


def test_a_verdict_that_cannot_be_written_ends_nothing(tmp_path, monkeypatch) -> None:
    """As on a full disk: what comes after is read back all the same."""
    model, optimizer = trained(1)
    with Checkpointer(tmp_path, model, optimizer, TENSORS) as saver:
        with monkeypatch.context() as full:
            full.setattr("crosschip.train.checkpoint.saver.write_verdict", disk_is_full)
            saver.save(state_of(1))
            saver.wait()
        saver.finish(state_of(2))
        first, second = saver.events()
    assert (first.event, first.step) == ("checkpoint-not-verified", 1)
    assert "the verdict could not be written: [Errno 28]" in first.detail
    assert (second.event, second.step) == ("checkpoint-verified", 2)


def test_a_last_one_that_is_wrong_ends_training_where_no_verdict_can_be_written(tmp_path, monkeypatch) -> None:
    model, optimizer = trained(1)
    spoil_copies(monkeypatch, "model.norm.weight")
    monkeypatch.setattr("crosschip.train.checkpoint.saver.write_verdict", disk_is_full)
    with Checkpointer(tmp_path, model, optimizer, STAGE) as saver:
        with pytest.raises(CheckpointError, match="step-00000001 is wrong: other numbers in the file"):
            saver.finish(state_of(1))
        (event,) = saver.events()
    assert event.event == "checkpoint-wrong"
    assert event.action.startswith(f"delete {tmp_path / 'checkpoints/step-00000001'}, which nothing marks")


def test_a_directory_that_cannot_be_made_is_a_save_that_failed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("crosschip.train.checkpoint.writing._make_directory", disk_is_full)
    with pytest.raises(CheckpointError, match=r"could not be written to .* MB are free there.*No space"):
        save_checkpoint(tmp_path / "pretrain", *trained(1), state_of(1), keep=1)


def disk_is_full(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def spoil_copies(monkeypatch, name: str) -> None:
    """One number of a tensor is changed after it was copied and before it is written."""
    take = StagingBuffers.take

    def spoilt(self: StagingBuffers, tensors: dict[str, torch.Tensor]) -> object:
        staged = take(self, tensors)
        (copy,) = [copy for index, copy in staged.copies.items() if index.fqn == name]
        copy.view(-1)[3] += 1e-6
        return staged

    monkeypatch.setattr(StagingBuffers, "take", spoilt)


def test_what_a_killed_save_has_left_is_told_and_removed(tmp_path) -> None:
    (tmp_path / "checkpoints" / ".step-00000007.tmp" / "dcp").mkdir(parents=True)
    model, optimizer = trained(1)
    with Checkpointer(tmp_path, model, optimizer, OFF) as saver:
        (event,) = saver.events()
        assert event.event == "unfinished-checkpoint"
        assert ".step-00000007.tmp" in event.detail
    assert names(tmp_path) == []


@pytest.mark.parametrize("change", [lambda m: None, lambda m: m.to(torch.bfloat16)], ids=["fp32", "bf16"])
def test_a_checkpoint_is_a_model_directory(tmp_path, change: Callable[[torch.nn.Module], object]) -> None:
    model, optimizer = new_model(tie_word_embeddings=True), None
    change(model)
    optimizer = build_optimizer(model, STAGE)
    with Checkpointer(tmp_path, model, optimizer, TENSORS) as saver:
        saver.save(state_of(1))
        path = saver.wait()
    assert path is not None
    loaded = load_model(path, dtype=torch.float32)
    assert loaded.config == model.config
    assert loaded.lm_head.weight is loaded.embed_tokens.weight
    for name, tensor in own_tensors(model).items():
        assert torch.equal(own_tensors(loaded)[name], tensor.float()), name
