"""The disturbed side of a drill: a rank that plants faults into itself when it is told to.

What is planted is as real as it can be from inside of the process: a real segmentation fault, a real C call that holds
the interpreter's lock, a real refusal of the operating system to write or to give memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import os
import resource
import statistics
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from crosschip.checkpoints import read_verdict
from crosschip.model.weights import DCP_DIRECTORY, MODEL_PREFIX
from crosschip.train.drill.orders import Order, note_taken, take_order
from crosschip.train.group.sharding import local_part

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from crosschip.data import Batch
    from crosschip.model import Transformer
    from crosschip.train.checkpoint.staging import Staged
    from crosschip.train.stage_job import StageJob
    from crosschip.train.step import StepSums

__all__ = ["disturbed"]

_FOR_EVER_S = 1e6
_SLOW_STEPS, _SLOW_TIMES = 90, 2.0  # a step then takes three times as long
_PACE_STEPS = 9  # whose median is how long a step takes: one with a save says nothing of the others
_MEMORY_LEFT = 256 << 20  # bytes, of which a step may still get some
_MOST_WRONG = 4  # saves in a row that are wrong, if none of them is read back
_FULL = "/dev/full"  # takes no byte


class DrillException(RuntimeError):
    """What an order to raise raises."""


def disturbed(job: StageJob, directory: Path, group: int) -> StageJob:
    """The same job, which carries out the orders that come to `directory` for this rank of `group`."""
    disturber = _Disturber(job, directory, group)
    honest = job.hooks

    def after_backward(model: Transformer, sums: StepSums) -> StepSums:
        disturber.after_backward(model)
        return honest.step.after_backward(model, sums)

    def after_update(step: int) -> None:
        disturber.after_update(step)
        honest.after_update(step)

    step_hooks = dataclasses.replace(honest.step, after_backward=after_backward)
    hooks = dataclasses.replace(honest, step=step_hooks, on_batch=disturber.on_batch, after_update=after_update)
    return dataclasses.replace(job, hooks=hooks)


class _Disturber:
    """Carries out one order at a time, each at its point of the step."""

    def __init__(self, job: StageJob, directory: Path, group: int) -> None:
        self._job, self._directory, self._group = job, directory, group
        self._order: Order | None = None
        self._slow_steps, self._slow_s = 0, 0.0
        self._began, self._is_slow = 0.0, False  # of the step that goes on
        self._steps_s: deque[float] = deque(maxlen=_PACE_STEPS)  # of those that were not made slow
        job.model.norm.register_forward_hook(self._forward_hook)

    @property
    def _step(self) -> int:
        return self._job.position.step + 1

    def on_batch(self, batch: Batch) -> Batch:
        """A step begins: the time for orders. Its data, or noise in their place."""
        self._begin()
        return self._noise(batch) if self._pending() == "loss-spike" and self._strike() else batch

    def _begin(self) -> None:
        """Take an order; those that end a step at once are carried out."""
        self._note_pace()
        if self._order is None:
            self._order = take_order(self._directory, self._group, self._job.world.rank)
        match self._pending():
            case "segfault" if self._strike():
                ctypes.string_at(0)
            case "exception" if self._strike():
                raise DrillException(f"step {self._step}: an exception that the drill has ordered")
            case "lock-held" if self._strike():
                while True:
                    ctypes.PyDLL(None).sleep(int(_FOR_EVER_S))  # a signal ends it early
            case "data" if self._strike():
                raise OSError(errno.EIO, os.strerror(errno.EIO), "the token store, as the drill has ordered")
            case "out-of-memory" if self._strike():
                _use_up_memory()
            case "slow" if self._strike():
                self._slow_steps, self._slow_s = _SLOW_STEPS, _SLOW_TIMES * statistics.median(self._steps_s or [0.0])
            case "save-hang" | "full-disk" | "wrong-save" as fault:
                self._disturb_next_save(fault)

    def _note_pace(self) -> None:
        now = time.perf_counter()
        if self._began and not self._is_slow:
            self._steps_s.append(now - self._began)
        self._began, self._is_slow = now, False

    def _slow_down(self) -> None:
        """Once in each slow step, however many passes it has."""
        if self._slow_steps and not self._is_slow:
            self._slow_steps, self._is_slow = self._slow_steps - 1, True
            time.sleep(self._slow_s)

    def _pending(self) -> str | None:
        return None if self._order is None else self._order.fault

    def _strike(self) -> bool:
        """Note that the order is carried out now, and forget it; False when it was withdrawn meanwhile."""
        assert self._order is not None
        order, self._order = self._order, None
        return note_taken(self._directory, order, self._step)

    def _noise(self, batch: Batch) -> Batch:
        generator = torch.Generator().manual_seed(self._step)
        size = self._job.model.config.vocab_size
        noise = torch.randint(0, size, batch.input_ids_BT.shape, generator=generator)
        labels = torch.randint(0, size, batch.labels_BT.shape, generator=generator)
        return dataclasses.replace(batch, input_ids_BT=noise, labels_BT=labels.to(batch.labels_BT.dtype))

    def _forward_hook(self, module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        """What happens in the middle of a forward pass."""
        if not torch.is_grad_enabled():  # validation and samples are left alone
            return None
        self._slow_down()
        match self._pending():
            case "operator-hang" if self._strike():
                time.sleep(_FOR_EVER_S)
            case "activation-flip" if self._strike():
                flipped = output.detach().clone()
                _flip_high_bit(flipped)
                return output + (flipped - output.detach())
        return None

    def after_backward(self, model: Transformer) -> None:
        """What happens to gradients."""
        fault = self._pending()
        if fault not in ("nan-gradient", "gradient-flip") or not self._strike():
            return
        gradient = next(local_part(p.grad) for p in reversed(list(model.parameters())) if p.grad is not None)
        if fault == "nan-gradient":
            gradient.view(-1)[0] = float("nan")
        else:
            _flip_high_bit(gradient)

    def after_update(self, step: int) -> None:
        """What happens to weights."""
        if self._pending() != "weight-flip" or not self._strike():
            return
        with torch.no_grad():
            _flip_high_bit(local_part(self._job.model.lm_head.weight))

    def _disturb_next_save(self, fault: str) -> None:
        """Put something else in the place of what writes a checkpoint, for one time, unless the order is withdrawn.

        Wrong saves come until one of them was read back: where saves are faster than that, some are passed over.
        """
        from crosschip.train.checkpoint import writing

        order, self._order = self._order, None
        assert order is not None
        honest = writing.write_checkpoint
        most, struck = _MOST_WRONG if fault == "wrong-save" else 1, list[Path]()

        def write_checkpoint(path: Path, staged: Staged, *args: Any, **kwargs: Any) -> None:
            is_over = any(read_verdict(each) is not None for each in struck)
            if is_over or not (struck or note_taken(self._directory, order, self._job.position.step)):
                writing.write_checkpoint = honest
                honest(path, staged, *args, **kwargs)
                return
            struck.append(path)
            if len(struck) == most:
                writing.write_checkpoint = honest
            if fault == "save-hang":
                time.sleep(_FOR_EVER_S)
            if fault == "wrong-save":
                _lose_half(staged)
            with _full_disk(self._job.world.rank) if fault == "full-disk" else contextlib.nullcontext():
                honest(path, staged, *args, **kwargs)

        writing.write_checkpoint = write_checkpoint


def _lose_half(staged: Staged) -> None:
    """Leave the second half of the largest weight's copy as the memory was before it arrived: zeros."""
    weights = [copy for index, copy in staged.copies.items() if index.fqn.startswith(MODEL_PREFIX)]
    largest = max(weights, key=Tensor.numel).view(-1)
    largest[largest.numel() // 2 :] = 0


@contextlib.contextmanager
def _full_disk(rank: int) -> Iterator[None]:
    """Within the block the system has no room for this rank's part of a checkpoint; logs are written beside it."""
    from crosschip.train.checkpoint import writing

    honest = writing._write_tensors

    def write_tensors(temporary: Path, staged: Staged, group: ProcessGroup | None) -> None:
        part = temporary / DCP_DIRECTORY / f"__{rank}_0.distcp"
        part.parent.mkdir(exist_ok=True)
        part.symlink_to(_FULL)
        honest(temporary, staged, group)

    writing._write_tensors = write_tensors
    try:
        yield
    finally:
        writing._write_tensors = honest


def _use_up_memory() -> None:
    """Ask for more memory than the system gives: its limit is set a little above what the process has."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    limit = used + _MEMORY_LEFT
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    torch.ones(4 * _MEMORY_LEFT, dtype=torch.uint8)


def _flip_high_bit(tensor: Tensor) -> None:
    """Flip the highest bit of the exponent of the first number: small numbers become huge ones."""
    flat = tensor.view(-1)[:1]
    integers = {2: torch.int16, 4: torch.int32}[flat.element_size()]
    bits = flat.view(integers)
    bits ^= 1 << (8 * flat.element_size() - 2)
