"""The process that starts the ranks and watches them: `python -m crosschip.train.group.agent N ARGUMENTS...`.

Torch's elastic agent does it; here its outcome becomes one message and an exit code: that of the ranks, or 128 plus
the number of the signal that killed one.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from crosschip.errors import EXIT_DEFECT, EXIT_FAIL
from crosschip.orphans import PARENT, end_with_launcher
from crosschip.train.group.lost import WAITED_IN_VAIN
from crosschip.train.guard.restarts import INTERRUPTED
from crosschip.train.saying import say
from crosschip.train.signals import catch_stop_signals

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

__all__ = ["first_failure", "main", "tell_failure"]


def main(arguments: list[str]) -> int:
    """Start the ranks, wait for them, and return the exit code; the first argument is their number."""
    end_with_launcher()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # before there are ranks, it ends this process without a traceback
    os.environ[PARENT] = str(os.getpid())
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it is told below, in one message
    with tempfile.TemporaryDirectory(prefix="crosschip-ranks-") as directory:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=int(arguments[0]),
            logs_specs=DefaultLogsSpecs(log_dir=directory),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            run_id=Path(directory).name,
            max_restarts=0,
            local_addr="localhost",
            signals_to_handle="SIGQUIT",
        )
        received: list[int] = []

        def hand_on(number: int, frame: FrameType | None) -> None:
            received.append(number)
            _give_to_ranks(number)

        catch_stop_signals(hand_on)
        try:
            elastic_launch(config, sys.executable)("-m", "crosschip", *arguments[1:])
        except ChildFailedError as error:
            killed_by = {-failure.exitcode for failure in error.failures.values()}
            if killed_by & set(received):  # ranks that were still beginning, and had nothing to save
                return 128 + received[0]
            return _told(error.failures)
    return 0


def _give_to_ranks(number: int) -> None:
    """Give a signal to every rank. The elastic agent itself would kill those that take long to save."""
    ranks = _children()
    if not ranks:
        raise SystemExit(128 + number)
    for rank in ranks:
        with suppress(ProcessLookupError):  # it may have ended just now
            os.kill(rank, number)


def _children() -> list[int]:
    """The processes that this one has started and that still run."""
    if sys.platform != "linux":
        import subprocess

        listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        pairs = [tuple(map(int, line.split())) for line in listed.splitlines()]
        return [pid for pid, parent in pairs if parent == os.getpid()]
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has just ended
        if parent == os.getpid():
            found.append(int(stat.parent.name))
    return found


def _told(failures: Mapping[int, ProcessFailure]) -> int:
    """Tell what failed; returns the exit code."""
    rank, failure = first_failure(failures)
    waited_for = any(WAITED_IN_VAIN in _message(each) for each in failures.values())
    told = tell_failure(rank, failure, waited_for)
    if told is not None:
        say(told)
    return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode


def _message(failure: ProcessFailure) -> str:
    """The last words of a rank, where it left any."""
    return str(failure.message.get("message", "")) if isinstance(failure.message, dict) else ""


def first_failure(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The failure that the others follow from, with its rank.

    A stop that was asked for comes before all; then a signal that was not the agent's own SIGTERM, and last those who
    only lost the others. Torch's own choice is by timestamps of whole seconds.
    """

    def order(item: tuple[int, ProcessFailure]) -> int:
        code = item[1].exitcode
        if code in INTERRUPTED:
            return 0
        if code < 0:
            return 1 if code != -signal.SIGTERM else 4
        return 3 if code == EXIT_FAIL else 2

    return min(failures.items(), key=order)


def tell_failure(rank: int, failure: ProcessFailure, waited_for: bool) -> str | None:
    """What to say of a failure that its rank has not said itself; `waited_for`: others have waited for it in vain."""
    if failure.exitcode in INTERRUPTED:
        return None
    if failure.exitcode == -signal.SIGKILL and waited_for:
        return (
            f"crosschip: rank {rank} (process {failure.pid}) did not answer the others, nor when it was asked to end; "
            "it was killed\n"
            "  what to do: look what it was doing (events.jsonl, its chip); then go on with --resume"
        )
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        return (
            f"crosschip: rank {rank} (process {failure.pid}) was killed by {name}; the other ranks were ended\n"
            "  what to do: go on from the last checkpoint with --resume; if it was the system's, look for memory"
        )
    if rank > 0 and _message(failure):
        return f"crosschip: rank {rank}: {_message(failure)}"
    if failure.exitcode == EXIT_DEFECT or rank > 0:
        return f"crosschip: rank {rank} (process {failure.pid}) ended with exit code {failure.exitcode}"
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
