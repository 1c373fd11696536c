"""One of the ranks that train the small subject together: `python -m crosschip.qualify.exams.rehearsal.sharded_rank`.

RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say where it belongs, its arguments are the job as JSON and the file for
its answer. It ends with its parent.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from crosschip.orphans import end_with_parent
from crosschip.rundir import write_json

__all__ = ["main"]


def main() -> None:
    """Take the steps; the answer holds their losses, or what was raised and where."""
    job, answer = json.loads(sys.argv[1]), Path(sys.argv[2])
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, job["limit_s"])  # whatever the process is in
    end_with_parent(job["parent"])
    try:
        write_json(answer, {"losses": _train(job)})
    except BaseException as error:
        write_json(answer, {"raised": type(error).__name__, "message": str(error).strip(), "place": _place(error)})
        os._exit(1)  # leaving a broken group in order could wait for the others


def _train(job: dict[str, Any]) -> list[float]:
    import torch

    from crosschip.chips import find_chip
    from crosschip.qualify.subjects.subject import load_subject
    from crosschip.qualify.subjects.transformer_workload import TransformerWorkload
    from crosschip.train.group.world import Ranks, join_world

    torch.set_num_threads(1)
    chip = find_chip(job["chip_spec"], computes=False)
    subject = load_subject(job["origin"])
    if chip.device.index is not None and chip.device.type not in ("cpu", "sim"):
        torch.accelerator.set_device_index(chip.device.index)
    with join_world(chip.device, job["timeout_s"]) as world:
        assert isinstance(world, Ranks)
        workload = subject.workload(chip.device, getattr(torch, job["dtype"]), job["seed"], small=True)
        assert isinstance(workload, TransformerWorkload)
        workload.shard(world)
        return [workload.train_step(index).loss for index in range(job["num_steps"])]


def _place(error: BaseException) -> str:
    """The innermost line that is not torch's."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/torch/" not in frame.filename]
    return f"{'/'.join(frames[-1].filename.split('/')[-3:])}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""


if __name__ == "__main__":
    main()
