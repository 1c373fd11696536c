"""Ranks as processes that do the same work at the same time: one for each chip of the kind, or two on the only one."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.peers import chips_alike
from crosschip.qualify.exams.stability.rank_work import NUM_RANKS
from crosschip.qualify.journal import read_journal
from crosschip.qualify.proctor import PART_LIMIT_S, Ended, run_child
from crosschip.rundir import write_json

__all__ = ["RankResult", "chips_of_ranks", "run_ranks"]

_ANNOUNCE_S = 5.0
_GRACE_S = 90.0  # for starting, preparing and meeting on a slow machine


@dataclass(frozen=True)
class RankResult:
    """What one rank did: the times of its rounds, the hashes of its work at the beginning and the end."""

    chip: str
    rounds_s: list[float]
    hashes: dict[str, str]
    again: dict[str, str]
    ended: str = "complete"
    detail: str = ""
    now: str | None = None  # what it was doing when it ended


def chips_of_ranks(context: ExamContext) -> list[str]:
    """The chips of this kind and model that torch sees, or twice the one that there is."""
    alike = chips_alike(context)
    return alike if len(alike) > 1 else [context.chip_spec] * 2


def run_ranks(context: ExamContext, part: str, chips: list[str], work_s: float) -> list[RankResult]:
    """Run one process for each chip and give what they noted; `part` is announced meanwhile."""
    with tempfile.TemporaryDirectory(prefix="crosschip-ranks-") as name, ThreadPoolExecutor(len(chips)) as pool:
        meeting = Path(name)
        write_json(meeting / "trace.json", context.trace.document())
        started = [
            pool.submit(_run_rank, context, meeting, chip, rank, len(chips), work_s) for rank, chip in enumerate(chips)
        ]
        while wait(started, timeout=_ANNOUNCE_S).not_done:
            context.journal.now(part)  # this process lives; the ranks have a deadline of their own
        return [each.result() for each in started]


def _run_rank(context: ExamContext, meeting: Path, chip: str, rank: int, num_ranks: int, work_s: float) -> RankResult:
    directory = meeting / f"rank-{rank}"
    directory.mkdir()
    journal = directory / "journal.jsonl"
    job = {
        "task": "exam",
        "exam": context.exam,
        "module": "crosschip.qualify.exams.stability.rank_work",
        "chip_spec": chip,
        "role": context.role,
        "tier": context.tier,
        "origin": context.subject.origin,
        "trace": str(meeting / "trace.json"),
        "journal": str(journal),
        "budget_s": work_s,
        "part_limit_s": PART_LIMIT_S,
        "reproducers": str(meeting),
        "seed": context.seed,
        "skip": sorted(context.skip),
    }
    environment = {NUM_RANKS: str(num_ranks), "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // num_ranks))}
    ended: Ended = run_child(job, directory, work_s + _GRACE_S, environment)
    noted = [each for each in read_journal(journal, context.exam).record.measurements if "rounds_s" in each]
    found: dict[str, Any] = noted[-1] if noted else {"rounds_s": [], "hashes": {}, "again": {}}
    return RankResult(chip, found["rounds_s"], found["hashes"], found["again"], ended.how, ended.detail, ended.now)
