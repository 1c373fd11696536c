"""The first set of ranks: conformance, messages between pairs, collectives, a sustained run, in one go."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosschip.qualify.exams.links.collective_cases import Case, PlanRequest, plan_rounds
from crosschip.qualify.exams.links.message_sizes import Layout, Message, sizes_for
from crosschip.qualify.exams.links.ranks import Death, Ranks
from crosschip.qualify.exams.links.schedule import Schedule
from crosschip.qualify.finding import Tier

__all__ = ["START_LIMIT_S", "Session", "run_session", "subject_rounds"]

START_LIMIT_S = 120.0  # for a process to import torch and find its chip on a busy machine
_TIMEOUT_S = 30.0  # of these collectives: none of them takes seconds
_GRACE_S = 20.0
_WIDEST = 1024
_LARGEST_ELEMENTS = 1 << 18  # of the large message in conformance: enough for another algorithm, quick to compare


@dataclass(frozen=True)
class Session:
    """What the ranks noted, and how they ended. `hung` says what each was doing when the time was over."""

    notes: list[dict[str, Any]]
    deaths: list[Death]
    hung: dict[int, str]
    started_s: float
    num_rounds: int
    messages: list[Message]


def subject_rounds(layout: Layout, num_ranks: int) -> list[list[Case]]:
    """The conformance plan for what the subject sends; widths are multiples of the ranks."""
    width = max(16, min(_WIDEST, layout.width))
    largest = max(each.num_bytes for each in layout.messages) // 4
    large = max(4 * width, min(_LARGEST_ELEMENTS, largest))
    return plan_rounds(PlanRequest(num_ranks, layout.dtypes, width, num_ranks * math.ceil(large / num_ranks)))


def run_session(
    directory: Path,
    chips: Sequence[str],
    layout: Layout,
    tier: Tier,
    planned: Callable[[float], Schedule],
    seed: int,
    tick: Callable[[str], None],
) -> Session:
    """Start the ranks and let them do it all; `planned` gives the schedule once it is known how long a start takes."""
    rounds = subject_rounds(layout, len(chips))
    messages = sizes_for(layout, tier)
    started = time.monotonic()
    with Ranks(directory, chips, START_LIMIT_S + 3600.0) as ranks:
        ready = ranks.wait(
            lambda: ranks.all_have("ready") or ranks.is_over(), START_LIMIT_S, lambda: tick("starting the ranks")
        )
        started_s = time.monotonic() - started
        hung: dict[int, str] = {}
        if ready and not ranks.deaths():
            steps = _steps(planned(started_s), rounds, messages, len(chips), seed)
            ranks.go(steps, _TIMEOUT_S)
            limit_s = sum(step["limit_s"] for step in steps) * 1.5 + _TIMEOUT_S + _GRACE_S
            ended = ranks.wait(ranks.is_over, limit_s, lambda: tick(ranks.doing(0)))
            if ranks.deaths():  # the others notice it in their turn; who was first is to be known
                ranks.wait(lambda: len(ranks.deaths()) == len(chips), 2.0)
            if not ended:
                hung = {rank: ranks.doing(rank) for rank in range(len(chips))}
        elif not ready:
            hung = {rank: ranks.doing(rank) for rank in range(len(chips)) if not ranks.having("ready")}
        notes = [{**note, "rank": rank} for rank in range(len(chips)) for note in ranks.notes(rank)]
        return Session(notes, ranks.deaths(), hung, started_s, len(rounds), messages)


def _steps(
    plan: Schedule, rounds: Sequence[Sequence[Case]], messages: Sequence[Message], num_ranks: int, seed: int
) -> list[dict[str, Any]]:
    sizes = [each.num_bytes for each in messages]
    documents = [[case.document() for case in cases] for cases in rounds]
    steps: list[dict[str, Any]] = [
        {"do": "conformance", "rounds": documents, "seed": seed, "limit_s": plan.conformance_s}
    ]
    if num_ranks > 1:
        # Each pair is visited twice, at different times, so that a passing burden is not taken for a bad cable.
        visit = {"do": "pairs", "sizes": sizes, "limit_s": plan.links_s / 4}
        steps += [visit, {"do": "collectives", "sizes": sizes, "limit_s": plan.links_s / 2}, visit]
    if num_ranks > 1 and plan.sustained_s > 0.0:
        steps.append({"do": "sustained", "num_bytes": sizes[-1], "limit_s": plan.sustained_s, "end_s": plan.session_s})
    return steps
