"""`crosschip train` seen from outside: a supervised replica group, or all groups of this machine. No torch.

    one group         this process supervises its ranks (see `guard.supervisor`)
    several, here     this process -> a lighthouse, and for each group a `crosschip train --group K` that supervises it

Group 0 has the run directory, group K the directory `group-K` in it: on machines of their own groups share no files.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from crosschip.errors import CrosschipError
from crosschip.orphans import end_with_parent
from crosschip.recipe import Recipe
from crosschip.rundir import RunDirectory
from crosschip.train.group.launch import agent_command, rank_environment, share_of_cores
from crosschip.train.guard.heartbeat import DIRECTORY
from crosschip.train.guard.interruption import Interruption
from crosschip.train.guard.observed import Event
from crosschip.train.guard.processes import process_state
from crosschip.train.guard.restarts import INTERRUPTED, Ended, Restarts
from crosschip.train.guard.run_files import EventLog, check_directory, committed_steps, logged_steps, newest_stage
from crosschip.train.guard.supervisor import Launch, SupervisedRun, supervise
from crosschip.train.kept_estimate import SHARED_DIRECTORY
from crosschip.train.outer.lighthouse import Lighthouse
from crosschip.train.saying import say

__all__ = [
    "GO_ON_WITH",
    "TrainCommand",
    "TrainingFailedError",
    "group_directory",
    "is_rank",
    "train_from_outside",
    "train_to_the_end",
]

_POLL_S = 0.2
_LAST_SAVE_S = 600.0  # of groups that end because others have; those that cannot are killed

GO_ON_WITH = "CROSSCHIP_GO_ON_WITH"  # the environment's name for the command that goes on with an interrupted training


@dataclass(frozen=True)
class TrainCommand:
    """What the user has asked for: `arguments` are those of `crosschip train` without --resume, --nproc and --group.

    `go_on_with` is the command that an interrupted training names, where it is another one than `crosschip train`.
    """

    recipe: Recipe
    run: RunDirectory
    arguments: Sequence[str]
    resume: bool
    num_ranks: int
    group: int | None
    go_on_with: str | None = None

    def environment(self) -> dict[str, str]:
        """That of the processes it starts."""
        return {**os.environ, **({GO_ON_WITH: self.go_on_with} if self.go_on_with else {})}


def is_rank() -> bool:
    """Whether this process trains itself: it was started by a supervisor, or by a launcher such as torchrun."""
    return DIRECTORY in os.environ or "RANK" in os.environ


def group_directory(run: Path, group: int) -> Path:
    """Where a group keeps its files on a machine that holds all groups."""
    return run if group == 0 else run / f"group-{group}"


def train_from_outside(command: TrainCommand) -> int:
    """Start and watch what was asked for; returns the exit code.

    Raises:
        RunDirectoryError: there are results of a run and no --resume, or no run to go on with.
        CrosschipError: the groups do not fit together.
        NoProgressError: see `guard.supervisor.supervise`.
    """
    settings = command.recipe.groups
    check_directory(command.run, command.resume)  # a restart says --resume, which the rank's own check lets through
    if command.group is not None and command.group >= settings.num_groups:
        raise CrosschipError(
            f"--group {command.group} is none of the {settings.num_groups} groups that [groups] num_groups plans",
            f"number them from 0 to {settings.num_groups - 1}",
        )
    if command.group is not None and settings.num_groups > 1 and settings.lighthouse is None:
        raise CrosschipError(
            f"--group {command.group} is one of {settings.num_groups} groups, and nothing says where they meet",
            "set groups.lighthouse = 'http://HOST:PORT' (python -m crosschip.train.outer.lighthouse starts one), or "
            "leave --group out to start all groups on this machine",
        )
    if settings.num_groups == 1 or command.group is not None:
        return _supervise_group(command)
    if settings.lighthouse is not None:
        raise CrosschipError(
            f"the groups meet at {settings.lighthouse}, and which of the {settings.num_groups} is this?",
            "give --group 0 on the first machine, --group 1 on the next; or leave groups.lighthouse out to start all "
            "groups on this machine",
        )
    return _train_groups_here(command)


class TrainingFailedError(CrosschipError):
    """The processes that train have ended with an error, which they have told; the exit code is theirs."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"the training ended with exit code {exit_code}", "do what it says above")
        self.exit_code = exit_code


def train_to_the_end(command: TrainCommand) -> None:
    """As `train_from_outside`, for a verb that goes on afterwards.

    Raises:
        KeyboardInterrupt: it was ended by a signal, and has saved; or one came in its last step.
        TrainingFailedError: it ended with an error.
        CrosschipError, NoProgressError: see `train_from_outside`.
    """
    with Interruption() as interruption:
        code = train_from_outside(command)
    if code and code not in INTERRUPTED:
        raise TrainingFailedError(code)
    if code or interruption.received is not None:
        raise KeyboardInterrupt


def _supervise_group(command: TrainCommand) -> int:
    train = command.run.path / "train"
    several = command.recipe.groups.num_groups > 1

    def launch(attempt: int) -> Launch:
        arguments = [*command.arguments, *(["--resume"] if command.resume or attempt else [])]
        if command.group is not None:
            arguments += ["--group", str(command.group)]
        if command.num_ranks > 1:
            environment = rank_environment(command.num_ranks, command.environment())
            return Launch(agent_command(command.num_ranks, arguments), environment, command.num_ranks)
        return Launch([sys.executable, "-m", "crosschip", *arguments], command.environment())

    return supervise(
        SupervisedRun(
            launch=launch,
            heartbeats=command.run.path / "heartbeats",
            # A group that the others heal makes progress without a checkpoint of its own.
            committed=functools.partial(logged_steps if several else committed_steps, train),
            tell=EventLog(train, say),
            settings=command.recipe.guard,
            go_on_with=f"`{command.go_on_with}`" if command.go_on_with else "--resume",
        )
    )


def _train_groups_here(command: TrainCommand) -> int:
    groups = _Groups(command)
    try:
        with Interruption() as interruption:
            groups.run(interruption)
    finally:
        groups.close()
    return groups.exit_code(interruption)


class _Groups:
    """All groups of a run on this machine, each with a supervisor of its own, and the lighthouse where they meet."""

    def __init__(self, command: TrainCommand) -> None:
        self._command = command
        self._settings = command.recipe.groups
        self._log = EventLog(command.run.path / "train", say)
        self._lighthouse = Lighthouse(min_groups=self._settings.min_groups)
        self._address = self._lighthouse.address
        say(f"{self._settings.num_groups} groups meet at {self._address}")
        numbers = range(self._settings.num_groups)
        most = command.recipe.guard.max_restarts
        self._restarts = [Restarts(most, logged_steps(self._train_directory(number))) for number in numbers]
        self._given_up: set[int] = set()
        self._processes = [self._start(number, command.resume) for number in numbers]
        self._told: set[int] = set()
        self._sent_home: set[int] = set()

    def _train_directory(self, number: int) -> Path:
        return group_directory(self._command.run.path, number) / "train"

    def _start(self, number: int, resume: bool) -> subprocess.Popen[bytes]:
        """Start a `crosschip train` for one group, which ends when this process does."""
        command = self._command
        directory = group_directory(command.run.path, number)
        arguments = list(command.arguments)
        arguments[arguments.index("--out") + 1] = str(directory)
        arguments += ["--group", str(number), "--nproc", str(command.num_ranks)]
        arguments += ["--set", f"groups.lighthouse={self._address}"]
        # A group that has not begun yet has nothing to resume; it is given the others' state.
        arguments += ["--resume"] if resume and directory.is_dir() else []
        num_processes = self._settings.num_groups * command.num_ranks
        return subprocess.Popen(
            [sys.executable, "-m", "crosschip", *arguments],
            env=share_of_cores(num_processes, {**command.environment(), SHARED_DIRECTORY: str(command.run.path)}),
            start_new_session=True,  # a terminal's Ctrl-C comes here, and is handed on once
            preexec_fn=functools.partial(end_with_parent, os.getpid()),
        )

    def run(self, interruption: Interruption) -> None:
        """Watch until every group has ended, or too few are left to go on; those save before they end."""
        while True:
            if interruption.received is None:
                self._tell_of_the_lost(interruption)
            running = [process for process in self._processes if process.poll() is None]
            if not running:
                return
            if len(running) < self._settings.min_groups and self._failed(interruption):
                self._send_home(running, interruption)
                return
            self._keep_alight()
            self._hand_on(interruption, running)
            time.sleep(_POLL_S)

    def _send_home(self, running: Sequence[subprocess.Popen[bytes]], interruption: Interruption) -> None:
        """Have groups that are too few to go on save what they have, and wait for that."""
        deadline = time.monotonic() + _LAST_SAVE_S
        self._sent_home |= {process.pid for process in running}
        self._tell_to_end(running, signal.SIGTERM)
        while any(process.poll() is None for process in running):
            if interruption.is_urgent or time.monotonic() > deadline:
                return
            time.sleep(_POLL_S)

    def _tell_of_the_lost(self, interruption: Interruption) -> None:
        """Tell of each group that has failed; where its supervisor was killed, start it again.

        One that ended by itself has tried what there is to try.
        """
        for number, process in enumerate(self._processes):
            code = process.poll()
            if code is None or code in (0, *INTERRUPTED) or number in self._given_up:
                continue
            how = f"died of signal {-code}" if code < 0 else f"ended with exit code {code}"
            lost = Ended("killed", f"the supervisor of group {number} {how}", code, is_final=code > 0)
            restarts = self._restarts[number]
            may_go_on = code < 0 and restarts.may_try_again(lost, logged_steps(self._train_directory(number)))
            action = restarts.words() if may_go_on else "not started again"
            train = self._train_directory(0)
            self._log(newest_stage(train), Event(logged_steps(train), "group-lost", lost.detail, action))
            if may_go_on:
                interruption.wait(restarts.wait_s())
                self._processes[number] = self._start(number, resume=True)
            else:
                self._given_up.add(number)

    def _failed(self, interruption: Interruption) -> bool:
        """Whether one has failed; one that has saved after a signal, while others still do, has not."""
        good = (None, 0, *(INTERRUPTED if interruption.received is not None else ()))
        return any(process.returncode not in good for process in self._processes)

    def _keep_alight(self) -> None:
        """Start the lighthouse again under its address when it has died."""
        if process_state(self._lighthouse.pid) not in ("Z", None):
            return
        lost = f"the lighthouse (process {self._lighthouse.pid}) has died"
        self._lighthouse.close()
        self._lighthouse = Lighthouse(self._address.rpartition("/")[2], self._settings.min_groups)
        train = self._train_directory(0)
        self._log(newest_stage(train), Event(logged_steps(train), "lighthouse-lost", lost, "started again"))

    def _hand_on(self, interruption: Interruption, running: Sequence[subprocess.Popen[bytes]]) -> None:
        """Give a signal to every group: the first for an orderly end, the second at once."""
        if interruption.received is None:
            return
        if not interruption.is_urgent:
            self._tell_to_end(running, interruption.received)
            return
        for process in running:
            process.kill()

    def _tell_to_end(self, running: Sequence[subprocess.Popen[bytes]], number: int) -> None:
        """Send a signal to those that have had none: a second one would end them at once."""
        for process in running:
            if process.pid not in self._told:
                self._told.add(process.pid)
                process.send_signal(number)

    def close(self) -> None:
        """End what is left."""
        for process in self._processes:
            process.kill()  # nothing happens to one that has ended
            process.wait()
        self._lighthouse.close()

    def exit_code(self, interruption: Interruption) -> int:
        """0 when every group has finished; else the signal's where all ended as it asked for, or were killed by the
        second one; else the first failed group's, which is named.
        """
        codes = [
            0 if process.pid in self._sent_home and process.returncode in INTERRUPTED else process.returncode
            for process in self._processes
        ]
        if interruption.received is not None and any(codes):
            in_order = (0, *INTERRUPTED, -interruption.received)
            if interruption.is_urgent or all(code in in_order for code in codes):
                return interruption.exit_code
            codes = [0 if code in in_order else code for code in codes]
        for number, code in enumerate(codes):
            if code:
                say(
                    f"group {number} ended with exit code {code}; see {group_directory(self._command.run.path, number)}"
                )
        return next((code if code > 0 else 128 - code for code in codes if code), 0)
