"""One rank as a process: `python -m crosschip.qualify.exams.links.rank_process JOB.json`.

It finds its chip, notes that it is ready, waits for the word to begin, meets the others and does its steps. It ends
with its parent (Linux: at once, also while it is stopped), and by an alarm when its time is over, whatever it is in.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosschip.orphans import end_with_parent
from crosschip.qualify.exams.links.notes import Notes

if TYPE_CHECKING:
    from crosschip.qualify.exams.links.group import Group

__all__ = ["EXIT_RAISED", "GO", "STORE", "main"]

EXIT_RAISED = 70
GO = "go.json"  # written by the parent when all ranks are ready; holds the steps
STORE = "store"
_POLL_S = 0.02


def _end_with(parent: int, limit_s: float) -> None:
    """End when the parent ends and when the time is over; also where the system has no such signal."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process also while torch holds the interpreter
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    end_with_parent(parent)


def _await_go(path: Path) -> dict[str, Any]:
    while not path.exists():
        time.sleep(_POLL_S)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _loop(step: dict[str, Any], group: Group, notes: Notes) -> None:
    """All-reduce until something happens: for the drill."""
    import torch
    import torch.distributed as dist

    token = torch.ones(step["num_bytes"] // 4, device=group.device)
    number = 0
    while True:
        dist.all_reduce(token)
        group.synchronize()
        number += 1
        if number == step["announce_after"]:
            notes.add(looping=number)


def _touch(step: dict[str, Any], group: Group, notes: Notes) -> None:
    """A first collective: back ends that connect late connect now."""
    import torch
    import torch.distributed as dist

    token = torch.ones(1, device=group.device)
    dist.all_reduce(token)
    notes.add(met=float(token.item()))


def _steps() -> dict[str, Callable[[dict[str, Any], Group, Notes], None]]:
    from crosschip.qualify.exams.links.conformance import conform
    from crosschip.qualify.exams.links.sustained import sustain
    from crosschip.qualify.exams.links.timing import time_collectives, time_pairs

    return {
        "conformance": conform,
        "pairs": time_pairs,
        "collectives": time_collectives,
        "sustained": sustain,
        "loop": _loop,
        "touch": _touch,
    }


def _take_part(job: dict[str, Any], notes: Notes) -> None:
    import torch
    from torch._C._distributed_c10d import FileStore

    from crosschip.chips import find_chip
    from crosschip.qualify.exams.links.group import join, leave, stay_on_this_machine

    torch.set_num_threads(1)
    steps, directory = _steps(), Path(job["directory"])
    stay_on_this_machine()
    chip = find_chip(job["chip_spec"], computes=False)
    notes.add(ready=str(chip.device))
    go = _await_go(directory / GO)
    time.sleep(go["delays_s"][job["rank"]])
    notes.add(now="meeting the other ranks")
    store = FileStore(str(directory / STORE), job["num_ranks"])
    group = join(chip, job["rank"], job["num_ranks"], store, go["timeout_s"])
    notes.add(joined=True)
    for step in go["steps"]:
        steps[step["do"]](step, group, notes)
        notes.add(done=step["do"])
    leave()


def main() -> None:
    """Be the rank that the job describes."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    _end_with(job["parent"], job["limit_s"])
    notes = Notes(Path(job["notes"]))
    try:
        _take_part(job, notes)
    except Exception as error:
        notes.add(raised=type(error).__name__, message=str(error).strip()[:2000])
        os._exit(EXIT_RAISED)  # leaving a broken group in order could wait for the others
    notes.add(ended=True)


if __name__ == "__main__":
    main()
