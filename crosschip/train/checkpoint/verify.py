"""The process that reads checkpoints back beside the training, at low priority and on the CPU.

    python -m crosschip.train.checkpoint.verify RUN/train/sft/checkpoints/step-00000200

compares one by hand. With `--serve` it answers jobs on standard input until that is closed: a line of JSON with the
checkpoint's path, the question about its loss, and the length in bytes of the batch, which follows in the safetensors
format. Each answer is a line of JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

from safetensors.torch import load

from crosschip.data import Batch
from crosschip.train.checkpoint.loss_check import LossQuestion, answer_question
from crosschip.train.checkpoint.readback import compare_tensors
from crosschip.train.checkpoint.verdict import Verdict, verdict_of

__all__ = ["main"]

_NICENESS = 10  # a tenth of a core that the training wants, too: with 19 it was starved beside a busy one


def main(arguments: list[str]) -> int:
    """Compare the checkpoint named on the command line, or serve."""
    if arguments == ["--serve"]:
        return _serve()
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m crosschip.train.checkpoint.verify CHECKPOINT", file=sys.stderr)
        return 2
    verdict = verdict_of(compare_tensors(Path(arguments[0])), None)
    print(f"{arguments[0]}: {verdict.verdict}: {verdict.detail}")
    return 0 if verdict.verdict == "right" else 1


def _serve() -> int:
    os.nice(_NICENESS)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    jobs: queue.Queue[tuple[dict[str, Any], bytes]] = queue.Queue()
    threading.Thread(target=_read_jobs, args=(sys.stdin.buffer, jobs), daemon=True).start()
    while True:
        job, batch = jobs.get()
        answers.write(json.dumps(dataclasses.asdict(_answer(job, batch))) + "\n")
        answers.flush()


def _read_jobs(stream: IO[bytes], jobs: queue.Queue[tuple[dict[str, Any], bytes]]) -> None:
    """Hand on the jobs; end the process, whatever it is doing, when the training is gone."""
    while line := stream.readline():
        job = json.loads(line)
        jobs.put((job, stream.read(job["num_bytes"])))
    os._exit(0)


def _answer(job: dict[str, Any], batch: bytes) -> Verdict:
    started = time.monotonic()
    path = Path(job["path"])
    try:
        problem = compare_tensors(path)
        answer = None
        if problem is None:
            tensors = load(batch)
            question = LossQuestion(**job["question"])
            answer = answer_question(path, question, Batch(tensors["input_ids_BT"], tensors["labels_BT"]))
        verdict = verdict_of(problem, answer)
        if not path.is_dir():
            verdict = Verdict("unknown", "it was set aside before it was read back", None, 0.0)
    except Exception as error:  # no memory, no such file: not a fault of the checkpoint, and to be told
        verdict = Verdict("unknown", f"it could not be read back: {error!r}", None, 0.0)
    return dataclasses.replace(verdict, seconds=round(time.monotonic() - started, 3))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
