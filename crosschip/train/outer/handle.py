"""The trainer's hold on its sidecar: start it, send commands, answer its questions, notice that it died."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import torch

from crosschip.train.outer.errors import GivenUp, GroupsError, SidecarLost
from crosschip.train.outer.memory import SharedMemory, open_descriptor
from crosschip.train.outer.messages import (
    Close,
    Command,
    Config,
    Donate,
    Donation,
    Failed,
    Hello,
    Reply,
    TensorEntry,
)

__all__ = ["SidecarHandle", "TrainingTensors", "read_donation"]

Answer = TypeVar("Answer", bound=Reply)
TrainingTensors = Callable[[], tuple[dict[str, torch.Tensor], dict[str, int]]]

_LISTEN_S = 0.2
_CLOSE_S = 5.0
_IN_VAIN_S = 5.0  # others that were told to stop as well have ended by then, or are about to take the same step
_BEGIN_S = 60.0  # until a sidecar's first sign of life: it imports torch on a host that may be busy
_ALIGNMENT = 64


class SidecarHandle:
    """One rank's sidecar. `donate` gives the training state, as named tensors on any device and the position.

    Everything is called from one thread. While a call waits, the sidecar's questions are answered; a trainer that
    computes calls `serve` once a step. `still_waiting` is called while a call waits for a sidecar that lives: other
    groups may take long, and such a wait is no hang of this one. `shall_stop` may be set by who owns the handle: a call
    that may be given up is, where it is true and the answer does not come; after that the handle can only be closed.
    """

    def __init__(
        self,
        config: Config,
        donate: TrainingTensors,
        log: Path,
        still_waiting: Callable[[], None] = lambda: None,
        num_threads: int = 1,
    ) -> None:
        """Start the sidecar; what it has to tell goes to the file `log`, a line per event.

        Raises:
            GroupsError: torchft is not installed, or the sidecar could not begin.
        """
        if importlib.util.find_spec("torchft") is None:
            raise GroupsError(
                "torchft is not installed, and several groups need it",
                "pip install 'torchft>=0.2,<0.3' (its wheels are for x86-64 Linux), or train as one group",
            )
        self.config, self.log = config, log
        self._donate, self._still_waiting, self._num_threads = donate, still_waiting, num_threads
        self.shall_stop: Callable[[], bool] = lambda: False
        self._is_closed = False
        self._early: Reply | Failed | None = None  # an answer that came before it was asked for
        self._descriptor = open_descriptor(config.layout)
        self.memory = SharedMemory(self._descriptor, config.layout)
        self._start()

    def _start(self) -> None:
        self._begins_until = time.monotonic() + _BEGIN_S
        self._seen_beats = self.memory.sidecar_beats
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with theirs, self.log.open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "crosschip.train.outer.sidecar", str(theirs.fileno()), str(self._descriptor)],
                pass_fds=(theirs.fileno(), self._descriptor),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(self._num_threads),
                start_new_session=True,  # Ctrl-C is for the trainer, which still needs its sidecar to end in order
            )
        self._send(self.config)
        self.store = self._receive(Hello).store

    @property
    def pid(self) -> int:
        """The sidecar's process id."""
        return self._process.pid

    def restart(self) -> None:
        """Start a new sidecar over the same memory after `SidecarLost`; the outer state is still there.

        For a group of one rank: the sidecar of a larger group's rank 0 holds what its other ranks are connected to.
        """
        self._end()
        self._start()

    def beat(self) -> None:
        """Say that the trainer lives; once a step, and in anything that takes minutes."""
        self.memory.beat()

    def send(self, command: Command) -> None:
        """Send a command without waiting for its answer."""
        self.beat()
        self._send(command)

    def receive(self, kind: type[Answer], may_give_up: bool = False) -> Answer:
        """Wait for the answer to the command before, which is a `kind`.

        Raises:
            GroupsError: the sidecar could not do it; another command makes no sense.
            SidecarLost: it has died.
            GivenUp: it `may_give_up`, and `shall_stop` says so.
        """
        return self._receive(kind, may_give_up)

    def call(self, command: Command, kind: type[Answer], may_give_up: bool = False) -> Answer:
        """`send` and `receive`."""
        self.send(command)
        return self._receive(kind, may_give_up)

    def give_up_in_vain(self, began: float) -> None:
        """To be called while something is waited for since `began`, by the monotonic clock.

        Raises:
            GivenUp: `shall_stop` says so, and it has been waited for in vain.
        """
        if time.monotonic() - began > _IN_VAIN_S and self.shall_stop():
            raise GivenUp

    def serve(self) -> None:
        """Answer the sidecar's question if it has one; returns at once."""
        self.beat()
        try:
            while self._waiting_is_question():
                pass
        except (EOFError, OSError):
            raise self._lost() from None

    def _waiting_is_question(self) -> bool:
        """Answer one question that waits; anything else stays for `receive`."""
        if self._early is None and self._connection.poll(0):
            message = self._connection.recv()
            if isinstance(message, Donate):
                self._give()
                return True
            self._early = message
        return False

    def _receive(self, kind: type[Answer], may_give_up: bool = False) -> Answer:
        message = self._next_answer(may_give_up)
        if isinstance(message, Failed):
            raise GroupsError(message.problem, message.remedy)
        assert isinstance(message, kind), f"the sidecar answered {message} instead of a {kind.__name__}"
        return message

    def _next_answer(self, may_give_up: bool) -> Reply | Failed:
        early, self._early = self._early, None
        if early is not None:
            return early
        began = time.monotonic()
        while True:
            self.beat()
            if may_give_up:
                self.give_up_in_vain(began)
            if self._sidecar_lives():
                self._still_waiting()
            try:
                if not self._connection.poll(_LISTEN_S):
                    continue
                message: Reply | Failed | Donate = self._connection.recv()
            except (EOFError, OSError):
                raise self._lost() from None
            if not isinstance(message, Donate):
                return message
            self._give()

    def _sidecar_lives(self) -> bool:
        """Whether it has given a sign of life since the last look; one that begins need not yet."""
        before, self._seen_beats = self._seen_beats, self.memory.sidecar_beats
        if self._seen_beats != before:
            self._begins_until = 0.0
            return True
        return time.monotonic() < self._begins_until

    def _give(self) -> None:
        tensors, position = self._donate()
        self._send(write_donation(self.memory, tensors, position))

    def _send(self, message: Command | Config | Donation | Close) -> None:
        try:
            self._connection.send(message)
        except OSError:
            raise self._lost() from None

    def _lost(self) -> SidecarLost:
        code = self._end()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        last = self.log.read_text(errors="replace").strip().rpartition("\n")[2]
        return SidecarLost(
            f"the sidecar (process {self.pid}) ended with {how}; the last line of {self.log}: {last}",
            "the weights are untouched: start it again, or start this group again; the other groups go on meanwhile",
        )

    def _end(self) -> int:
        """Make sure that the process is gone; its exit code."""
        self._connection.close()
        self._early = None
        try:
            return self._process.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def close(self) -> None:
        """End the sidecar and let go of the memory. The other groups go on without this one."""
        if self._is_closed:
            return
        self._is_closed = True
        with contextlib.suppress(OSError):  # it is gone already, which is what was wanted
            self._connection.send(Close())
        self._end()
        os.close(self._descriptor)  # the memory itself goes with the last tensor over it


def _environment(num_threads: int) -> dict[str, str]:
    """A sidecar sees no accelerator and no setting that would overrule the time limits of its trainer."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TORCHFT_")}
    kept.pop("CROSSCHIP_SIM", None)
    return {
        **kept,
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": str(num_threads),
        "PYTHONUNBUFFERED": "1",
        "TORCH_CPP_LOG_LEVEL": kept.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        "RUST_LOG": kept.get("RUST_LOG", "warn"),  # torchft's managers tell of each quorum otherwise
    }


def write_donation(memory: SharedMemory, tensors: dict[str, torch.Tensor], position: dict[str, int]) -> Donation:
    """Copy named tensors, from any device, into the part for the training state."""
    entries, end = [], 0
    for name, tensor in tensors.items():
        num_bytes = tensor.numel() * tensor.element_size()
        dtype = str(tensor.dtype).removeprefix("torch.")
        entries.append(TensorEntry(name, dtype, tuple(tensor.shape), end, num_bytes))
        end += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
    part = memory.state(end)
    for entry, tensor in zip(entries, tensors.values(), strict=True):
        _view(part, entry).copy_(tensor.detach())
    return Donation(tuple(entries), position)


def read_donation(memory: SharedMemory, donation: Donation) -> dict[str, torch.Tensor]:
    """The named tensors of a donation, as views of the shared memory: copy what is to stay."""
    end = max((entry.start + entry.num_bytes for entry in donation.entries), default=0)
    part = memory.state(end)
    return {entry.name: _view(part, entry) for entry in donation.entries}


def _view(part: torch.Tensor, entry: TensorEntry) -> torch.Tensor:
    dtype: torch.dtype = getattr(torch, entry.dtype)
    return part[entry.start : entry.start + entry.num_bytes].view(dtype).view(entry.shape)
