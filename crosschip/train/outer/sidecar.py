"""The process beside each rank that speaks with other groups: `python -m crosschip.train.outer.sidecar PIPE MEMORY`.

It sees the CPU only: no vendor's plug-in is loaded, so groups on different vendors' chips can train together, and it
goes on sending while the trainer computes or holds its interpreter's lock. It ends with its trainer.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from crosschip.chips import keep_freed_memory
from crosschip.errors import CrosschipError
from crosschip.train.outer.averaging import average
from crosschip.train.outer.exchange import ExchangeGroup, gather_numbers
from crosschip.train.outer.membership import Membership
from crosschip.train.outer.memory import SharedMemory
from crosschip.train.outer.messages import (
    Average,
    Close,
    Command,
    Config,
    Donate,
    Donation,
    Failed,
    Hello,
    Join,
    Joined,
    Reply,
    View,
)
from crosschip.train.outer.outer_state import OuterState
from crosschip.train.outer.outer_step import take_outer_step
from crosschip.train.outer.time_limits import TimeLimits

__all__ = ["main"]

_LOOK_EVERY_S = 0.5
_SILENT_EXIT = 70


def tell(text: str) -> None:
    """A line in the sidecar's log."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


class TrainerPipe:
    """The trainer's end of the pipe: commands, and answers to the one question that the sidecar asks."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._donations: queue.SimpleQueue[Donation] = queue.SimpleQueue()

    def listen(self) -> None:
        """Take in messages until the trainer closes or is gone; then end this process, whatever it is doing."""
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        try:
            while not isinstance(message := self._connection.recv(), Close):
                if isinstance(message, Donation):
                    self._donations.put(message)
                else:
                    self._commands.put(message)
        except (EOFError, OSError):
            tell("the trainer is gone")
        os._exit(0)

    def next_command(self) -> Command:
        return self._commands.get()

    def donation(self) -> Donation:
        """Have the trainer put its state into the shared memory; it does so at its next step or while it waits."""
        self._connection.send(Donate())
        return self._donations.get()

    def send(self, reply: Reply | Failed) -> None:
        try:
            self._connection.send(reply)
        except OSError:  # gone in the meantime; the listener ends this process
            tell("the trainer did not take an answer")


class Sidecar:
    """What a sidecar has, and what it does for each command."""

    def __init__(self, config: Config, memory: SharedMemory, pipe: TrainerPipe) -> None:
        self.config, self.memory, self._pipe = config, memory, pipe
        self.outer = OuterState(memory, config.rules.fragments) if config.rules.fragments else None
        self.membership = Membership(config.member, config.limits, tell)
        self._group: ExchangeGroup | None = None
        self._received: Donation | None = None  # what the trainer has not yet taken over
        self._has_given = False

    def obey(self, command: Command) -> Reply:
        """Carry out one command."""
        self._received = None
        if isinstance(command, Join):
            return self._meet(command)
        if isinstance(command, Average):
            assert self._group is not None, "averaging without a quorum"
            return average(self.membership, self.memory, self.config, self._group, command)
        assert self.outer is not None, "an outer step without fragments"
        return take_outer_step(self.membership, self.outer, self.memory, self.config, self.join, command)

    def _meet(self, command: Join) -> Joined:
        """A quorum, and the groups' common decision whether to begin.

        Each has its own clock, so what one decided alone would leave it waiting for another that still waits.
        """
        view, group = self.join(command.step)
        self._group, any_ready, trouble = group, False, ""
        if group.size < self.config.member.min_groups:
            self.membership.wait_for_more()
            return Joined(view, may_begin=False)
        try:
            any_ready = any(ready for [ready] in gather_numbers(group, [float(command.is_ready)])[0])
        except (RuntimeError, OSError) as error:
            trouble = f"{type(error).__name__}: {error}"
            tell(f"a group was lost after the quorum: {trouble}")
        if not self.membership.agreed(command.step, not trouble):
            self.membership.finish(committed=False)
            return Joined(view, may_begin=False)
        may_begin = any_ready or group.size == self.config.member.num_groups
        if not may_begin:
            self.membership.finish(committed=True)
        return Joined(view, may_begin)

    def join(self, step: int) -> tuple[View, ExchangeGroup]:
        """A quorum of a group that stands at `step`; one that is behind is healed before this returns."""
        if self._has_given:
            self.memory.forget_state()
            self._has_given = False
        quorum = self.membership.quorum(step, self._donated)
        donation = None if quorum.state is None else self._take_over(quorum.state)
        return View(quorum.group.rank, quorum.group.size, quorum.max_step, donation), quorum.group

    def _donated(self) -> dict[str, Any]:
        donation = self._received
        if donation is None:
            donation, self._has_given = self._pipe.donation(), True
        num_bytes = max((entry.start + entry.num_bytes for entry in donation.entries), default=0)
        state: dict[str, Any] = {"donation": donation, "bytes": self.memory.state(num_bytes)}
        if self.outer is not None:
            state["outer"] = self.outer.export(self.outer.commits)
            state["commits"], state["begun"] = self.outer.commits, self.memory.begun
        return state

    def _take_over(self, state: dict[str, Any]) -> Donation:
        received: torch.Tensor = state["bytes"]
        self.memory.state(received.numel()).copy_(received)
        if self.outer is not None:
            self.memory.count_healing()
            self.outer.load(state["outer"], state["commits"])
            self.memory.residual.zero_()  # it belongs to parameters that are given up
            self.memory.begun = state["begun"]  # last: a sidecar that is killed before is behind again
        donation: Donation = state["donation"]
        self._received = donation
        return donation


def _is_stopped(pid: int) -> bool:
    """Whether a process is stopped (SIGSTOP). Linux tells; elsewhere nobody counts as stopped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"
    except (OSError, IndexError):
        return False


def watch_trainer(memory: SharedMemory, limits: TimeLimits) -> None:
    """End this process when its trainer is gone, stopped or silent: as long as it has a heartbeat, others wait for it.

    The pipe tells of a trainer that is gone, too, unless a child of the trainer still holds its end. What the sidecar
    waits for has limits of its own, so a thread may tell the trainer that this process lives.
    """
    trainer = os.getppid()
    beats, heard, running = -1, time.monotonic(), time.monotonic()
    while True:
        memory.beat_as_sidecar()
        time.sleep(_LOOK_EVERY_S)
        now = time.monotonic()
        if memory.beats != beats:
            beats, heard = memory.beats, now
        if not _is_stopped(trainer):
            running = now
        if os.getppid() != trainer:
            reason = "is gone"
        elif now - running > limits.stopped_trainer_s:
            reason = f"has been stopped for {now - running:.0f} s"
        elif now - heard > limits.silent_trainer_s:
            reason = f"has given no sign of life for {now - heard:.0f} s"
        else:
            continue
        tell(f"leaving the groups: the trainer (process {trainer}) {reason}")
        os._exit(_SILENT_EXIT)


def main() -> None:
    """Serve the trainer behind the descriptors on the command line until it ends."""
    connection, memory_descriptor = Connection(int(sys.argv[1])), int(sys.argv[2])
    config: Config = connection.recv()
    keep_freed_memory()
    memory = SharedMemory(memory_descriptor, config.layout)
    pipe = TrainerPipe(connection)
    pipe.listen()
    threading.Thread(target=watch_trainer, args=(memory, config.limits), daemon=True).start()
    try:
        sidecar = Sidecar(config, memory, pipe)
        pipe.send(Hello(sidecar.membership.store))
        while True:
            pipe.send(sidecar.obey(pipe.next_command()))
    except CrosschipError as error:
        tell(str(error))
        pipe.send(Failed(error.problem, error.remedy))
        threading.Event().wait()  # until the trainer has read it and closes


if __name__ == "__main__":
    main()
