"""Saving while training goes on: staged at once, written, hashed and read back in the background."""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from crosschip.checkpoints import checkpoint_path, numbered_checkpoints, read_verdict
from crosschip.errors import CheckpointError
from crosschip.recipe import StageSettings
from crosschip.train.checkpoint.directory import clear_leftovers
from crosschip.train.checkpoint.loss_check import LossQuestion
from crosschip.train.checkpoint.readback import compare_tensors
from crosschip.train.checkpoint.retention import delete_old
from crosschip.train.checkpoint.staging import Staged, StagingBuffers, tensors_to_save
from crosschip.train.checkpoint.state import CheckpointState
from crosschip.train.checkpoint.verdict import Verdict, verdict_of, write_verdict
from crosschip.train.checkpoint.verifier import Verifier, VerifyJob

if TYPE_CHECKING:
    import torch

    from crosschip.data import Batch
    from crosschip.model import Transformer

__all__ = ["CheckpointEvent", "Checkpointer", "SaveReceipt", "background_group"]

MOST_FAILURES = 3  # saves in a row that may fail, or be found wrong, before training stops
_NICENESS = 10  # of the writing thread: training goes first

# How long a write may take before training waits for it, which the supervisor then watches as a phase of its own: three
# times what it usually takes and some seconds. A disk that others use may stop for seconds.
_TIMES_USUAL, _SLACK_S, _LEAST_S = 3.0, 5.0, 10.0
_REMEMBERED_WRITES = 15


def background_group(timeout_s: float = 1800.0) -> dist.ProcessGroup | None:
    """The group on which the processes agree about a save, apart from training's; None for a process alone.

    Every process of the job calls this, in the same order as its other groups. It is gloo's on every chip: a vendor's
    collective issued from another thread could come between those of a step.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))


@dataclass(frozen=True)
class CheckpointEvent:
    """Something to tell: a line of `events.jsonl`."""

    step: int
    event: str
    detail: str
    action: str


@dataclass(frozen=True)
class SaveReceipt:
    """A save that has begun. `staging_s` held up the training, and `waited_s` before it, for the save before."""

    path: Path
    staging_s: float
    waited_s: float


class Checkpointer:
    """The checkpoints of one stage; a context manager, and every process of the job has one.

    A save returns when the tensors are copied to host memory. Errors of the background come back as events, at the
    next save or from `wait`: `MOST_FAILURES` saves in a row that failed, or were found wrong, end the training.
    `first_write_s` is how long a write may take, in seconds, while nobody knows how long one does.
    """

    def __init__(
        self,
        stage_directory: Path,
        model: Transformer,
        optimizer: torch.optim.Optimizer,
        settings: StageSettings,
        group: dist.ProcessGroup | None = None,
        first_write_s: float = 600.0,
    ) -> None:
        import crosschip.train.checkpoint.writing  # noqa: F401  (a second, which the first save need not wait for)

        self._directory = stage_directory
        self._model, self._optimizer, self._settings, self._group = model, optimizer, settings, group
        self._is_first = group is None or dist.get_rank(group) == 0
        self._staging = StagingBuffers(with_sums=settings.verify_checkpoints != "off")
        self._thread = ThreadPoolExecutor(1, "checkpoint-writer", initializer=_step_back)
        self._writing: Future[None] | None = None
        self._writing_since = 0.0
        self._write_s: deque[float] = deque(maxlen=_REMEMBERED_WRITES)
        self._allowed_s = first_write_s
        self._failure: CheckpointError | None = None
        self._failures_in_a_row = self._wrong_in_a_row = 0
        self._newest: CheckpointState | None = None  # of the newest checkpoint that is there
        self._awaits_loss: CheckpointState | None = None
        self._questions: dict[int, tuple[LossQuestion, bytes]] = {}
        self._written: set[int] = set()  # and not yet asked about
        self._lock = threading.Lock()  # over the directory and what is asked about it
        self._events: queue.SimpleQueue[CheckpointEvent] = queue.SimpleQueue()
        wants_loss = self._is_first and settings.verify_checkpoints == "loss"
        self._verifier = Verifier(self._hear) if wants_loss else None
        for name in clear_leftovers(stage_directory) if self._is_first else []:
            self._tell(0, "unfinished-checkpoint", f"{name} was being written when its process ended", "removed")

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def save(self, state: CheckpointState) -> SaveReceipt:
        """Begin to save; the tensors may change again when this returns. Waits for a save that is still going on.

        Raises:
            CheckpointError: too many saves in a row have failed or were found wrong.
        """
        started = time.perf_counter()
        self._join()
        waited = time.perf_counter()
        self._stop_after_failures()
        staged = self._staging.take(tensors_to_save(self._model, self._optimizer))
        path = checkpoint_path(self._directory, state.step)
        self._awaits_loss = state
        self._writing_since = time.monotonic()
        self._writing = self._thread.submit(self._write, path, staged, state)
        self._writing.add_done_callback(functools.partial(self._learn, self._writing_since))
        return SaveReceipt(path, time.perf_counter() - waited, waited - started)

    def observe(
        self,
        step: int,
        loss: float | None,
        batch: Callable[[], Batch],
        num_parts: int,
        num_groups: int = 1,
        compute_alike: bool = True,
    ) -> None:
        """Hear the loss of `step`, computed before its update, and how to get its whole batch, of `num_groups` groups.

        It is the loss of the checkpoint after `step - 1`, if there is one; then that is asked about. `num_parts` are
        the parts in which one process computed its share of the batch; `compute_alike` is whether all groups did so on
        the same chips, in the same dtype. A step that was skipped has no `loss` that could be believed. Cheap at every
        other step.
        """
        state = self._awaits_loss
        self._awaits_loss = None
        if self._verifier is None or state is None or state.step != step - 1:
            return
        question = LossQuestion(
            loss,
            state.compute_dtype,
            num_parts,
            state.num_threads,
            state.num_processes * num_groups,
            state.device.split(":")[0],
            compute_alike,
        )
        with self._lock:
            self._questions = {state.step: (question, _as_bytes(batch()))}
            self._ask()

    def forget_loss(self) -> None:
        """Ask nothing about the loss of the checkpoint saved last: the weights are no longer those that it holds."""
        self._awaits_loss = None

    def events(self) -> list[CheckpointEvent]:
        """What has happened in the background since the last call; only the first process has anything to tell."""
        found = []
        while not self._events.empty():
            found.append(self._events.get())
        return found

    def is_overdue(self) -> bool:
        """Whether the save that is going on takes longer than saves do, and should be waited for."""
        return self._time_left_s() < 0.0

    def write_may_take_s(self) -> float:
        """Seconds that the save which is going on may still take, and the next one waits for it; 0: there is none."""
        return max(0.0, self._time_left_s())

    def finish_may_take_s(self) -> float:
        """Seconds that `finish` may take: it waits for two writes, and one process reads back what all have written."""
        num_processes = 1 if self._group is None else dist.get_world_size(self._group)
        return self.write_may_take_s() + (1 + num_processes) * self._allowed_s

    def _time_left_s(self) -> float:
        """Seconds that are left to the save which is going on, negative where it is overdue; 0 when there is none."""
        if self._writing is None or self._writing.done():
            return 0.0
        return self._writing_since + self._allowed_s - time.monotonic()

    def _learn(self, since: float, writing: Future[None]) -> None:
        """In the background: how long a write has taken, and so how long the next may take."""
        self._write_s.append(time.monotonic() - since)
        self._allowed_s = max(_LEAST_S, _TIMES_USUAL * statistics.median(self._write_s) + _SLACK_S)

    def wait(self) -> Path | None:
        """Wait for the save that is going on; return the newest checkpoint that this object wrote.

        Raises:
            CheckpointError: the last save failed.
        """
        self._join()
        if self._failure is not None:
            raise self._failure
        return None if self._newest is None else checkpoint_path(self._directory, self._newest.step)

    def finish(self, state: CheckpointState) -> Path:
        """Save, wait until it is written, and read it back, unless the recipe says `verify_checkpoints = "off"`.

        For the end of training, after which there is no loss to compare with and nothing more is asked.

        Raises:
            CheckpointError: it could not be written, or the files are not what the device had.
        """
        self.save(state)
        path = self.wait()
        assert path is not None
        problem = read_verdict(path) if self._is_first else None
        if self._is_first and self._settings.verify_checkpoints != "off" and problem is None:
            problem = self._hear_tensors(state.step, path)
        for job in self._verifier.close() if self._verifier is not None else []:
            self._tell(
                job.step, "checkpoint-not-verified", "training ended before its loss was computed", "kept as it is"
            )
        if problem:
            raise CheckpointError(
                f"{path} is wrong: {problem}",
                "examine memory and disk of this machine, then go on from the checkpoint before with --resume",
            )
        return path

    def close(self) -> None:
        """Wait for the save that is going on and end the process that reads back. Errors are told by `events`."""
        self._thread.shutdown(wait=True)
        if self._verifier is not None:
            self._verifier.close()

    def _join(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()  # raises what is our own defect

    def _stop_after_failures(self) -> None:
        if self._failures_in_a_row >= MOST_FAILURES:
            assert self._failure is not None
            raise CheckpointError(
                f"{self._failures_in_a_row} saves in a row have failed, the last one: {self._failure.problem}",
                self._failure.remedy,
            )
        if self._wrong_in_a_row >= MOST_FAILURES:
            raise CheckpointError(
                f"{self._wrong_in_a_row} checkpoints in a row under {self._directory} were wrong when they were read "
                "back; events.jsonl says how",
                "examine memory and disk of this machine, or qualify the chip; then go on with --resume",
            )

    def _write(self, path: Path, staged: Staged, state: CheckpointState) -> None:
        """In the background: write, delete what is old, and have it read back."""
        from crosschip.train.checkpoint.writing import WriteFailedError, write_checkpoint

        try:
            write_checkpoint(path, staged, state, self._model.config, self._group)
        except WriteFailedError as error:
            self._failure = error
            self._failures_in_a_row += 1
            count = f"{self._failures_in_a_row} of {MOST_FAILURES} failures in a row"
            self._tell(
                state.step, "checkpoint-failed", error.problem, f"training goes on; the next save tries ({count})"
            )
            return
        self._failure, self._failures_in_a_row, self._newest = None, 0, state
        if not self._is_first:
            return
        if self._settings.verify_checkpoints == "tensors":
            self._hear_tensors(state.step, path)
        with self._lock:
            found, settings = numbered_checkpoints(self._directory), self._settings
            being_read = set() if self._verifier is None else self._verifier.reads
            delete_old(found, settings.keep_checkpoints, settings.keep_every, being_read)
            self._written = {state.step}
            self._ask()

    def _ask(self) -> None:
        """Ask about the loss of a checkpoint that is there and whose loss is known; the lock is held."""
        for step in self._written & self._questions.keys():
            question, batch = self._questions.pop(step)
            self._written.discard(step)
            if self._verifier is not None:
                self._verifier.submit(VerifyJob(step, checkpoint_path(self._directory, step), question, batch))

    def _hear_tensors(self, step: int, path: Path) -> str | None:
        """Read a checkpoint back; returns what is wrong with its tensors."""
        problem = compare_tensors(path)
        self._judge(step, path, verdict_of(problem, None))
        return problem

    def _hear(self, job: VerifyJob, verdict: Verdict) -> None:
        self._judge(job.step, job.path, verdict)

    def _judge(self, step: int, path: Path, verdict: Verdict) -> None:
        with self._lock:
            is_there = path.is_dir()
            unwritten = _not_written(path, verdict) if is_there and verdict.verdict != "unknown" else None
        if not is_there and verdict.verdict != "wrong":
            return  # it was old, and has been deleted meanwhile
        detail = verdict.detail if unwritten is None else f"{verdict.detail}; {unwritten}"
        if verdict.verdict == "wrong":
            self._wrong_in_a_row += 1
            away = "it will not be resumed from" if unwritten is None else f"delete {path}, which nothing marks"
            self._tell(step, "checkpoint-wrong", detail, f"{away}; the next save takes its place")
            return
        if verdict.verdict == "right":
            self._wrong_in_a_row = 0
        if verdict.verdict == "right" and unwritten is None:
            self._tell(step, "checkpoint-verified", detail, "kept")
        else:
            self._tell(step, "checkpoint-not-verified", detail, "training goes on")

    def _tell(self, step: int, event: str, detail: str, action: str) -> None:
        if self._is_first:
            self._events.put(CheckpointEvent(step, event, detail, action))


def _not_written(path: Path, verdict: Verdict) -> str | None:
    """Write the verdict; returns why that could not be done, as on a full disk."""
    try:
        write_verdict(path, verdict)
    except OSError as error:
        return f"the verdict could not be written: {error}"
    return None


def _step_back() -> None:
    """Give way to the training's threads. Linux has a priority for each thread; elsewhere it stays as it is."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


def _as_bytes(batch: Batch) -> bytes:
    from safetensors.torch import save

    return save({"input_ids_BT": batch.input_ids_BT.contiguous(), "labels_BT": batch.labels_BT.contiguous()})
