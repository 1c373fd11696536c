"""What one rank does to time messages: between each pair of ranks in turn, and for each collective."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import combinations
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from crosschip.qualify.exams.links.group import Group
from crosschip.qualify.exams.links.notes import Notes
from crosschip.qualify.exams.links.one_collective import run_collective

__all__ = ["TIMED", "time_collectives", "time_pairs"]

TIMED = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast")
_MOST_REPEATS = 200
_LEAST_REPEATS = 5
_REPEATS_ANYWAY = 3  # of what is so slow that more would take the whole time
_MOST_PAIRS_RANKS = 16  # all pairs of more would take too long: then each with the next


def time_pairs(step: dict[str, Any], group: Group, notes: Notes) -> None:
    """Send each size to and fro between two ranks while the others wait; notes the time one way."""
    pairs = [tuple(each) for each in step.get("pairs") or _all_pairs(group.num_ranks)]
    sizes = step["sizes"]
    for pair in pairs:
        share_s = step["limit_s"] / (len(pairs) * len(sizes))
        notes.add(now=f"messages between the ranks {pair[0]} and {pair[1]}")
        for size in sizes:
            _meet(group)
            if group.rank in pair:
                times_s = _to_and_fro(group, pair[0], pair[1], size, share_s)
                if group.rank == pair[0]:
                    notes.add(pair=list(pair), num_bytes=size, times_s=times_s)
    _meet(group)


def _all_pairs(num_ranks: int) -> list[tuple[int, int]]:
    if num_ranks <= _MOST_PAIRS_RANKS:
        return list(combinations(range(num_ranks), 2))
    return [(rank, (rank + 1) % num_ranks) for rank in range(num_ranks)]


def _meet(group: Group) -> None:
    token = torch.zeros(1, device=group.device)
    dist.all_reduce(token)
    group.synchronize()


def _to_and_fro(group: Group, first: int, second: int, num_bytes: int, limit_s: float) -> list[float]:
    """Times of one way in seconds, half of there and back; counted on the first rank, empty on the second."""
    message = torch.zeros(num_bytes, dtype=torch.uint8, device=group.device)
    count = torch.zeros(1, dtype=torch.int64, device=group.device)
    leads = group.rank == first
    other = second if leads else first

    def once() -> float:
        started = time.perf_counter()
        if leads:
            dist.send(message, other)
            dist.recv(message, other)
        else:
            dist.recv(message, other)
            dist.send(message, other)
        group.synchronize()
        return time.perf_counter() - started

    once()
    trial_s = once()
    if leads:
        count.fill_(_repeats(limit_s, trial_s))
        dist.send(count, other)
    else:
        dist.recv(count, other)
    once()  # the other side begins a message later, when it knows the number: not counted
    times_s = [once() / 2 for _ in range(int(count.item()))]
    return times_s if leads else []


def _repeats(limit_s: float, trial_s: float) -> int:
    fitting = int(limit_s / max(trial_s, 1e-6))
    least = _LEAST_REPEATS if _LEAST_REPEATS * trial_s < 2 * limit_s else _REPEATS_ANYWAY
    return max(least, min(_MOST_REPEATS, fitting))


def time_collectives(step: dict[str, Any], group: Group, notes: Notes) -> None:
    """Time each collective on each size; the size is what a rank gives to it."""
    share_s = step["limit_s"] / (len(TIMED) * len(step["sizes"]))
    for collective in TIMED:
        for size in step["sizes"]:
            notes.add(now=f"{collective} of {size} bytes")
            times_s = _timed(group, collective, size, share_s)
            notes.add(collective=collective, num_bytes=size, times_s=times_s)


def _timed(group: Group, collective: str, num_bytes: int, limit_s: float) -> list[float]:
    once = _collective_of(group, collective, num_bytes)
    once()
    _meet(group)
    repeats = group.agree_number(_repeats(limit_s, once()))
    once()  # the ranks begin when they know the number, not at the same time: not counted
    return [once() for _ in range(repeats)]


def _collective_of(group: Group, collective: str, num_bytes: int) -> Callable[[], float]:
    """A function that makes the collective once and gives its time on this rank."""
    num_ranks = group.num_ranks
    width = max(1, num_bytes // 4 // num_ranks)
    parted = collective in ("reduce_scatter", "all_to_all")
    rows = 1 if parted else num_ranks
    case = {"collective": collective, "operation": "sum", "rows": rows, "width": width}
    mine: Tensor = torch.ones(num_ranks if parted else rows, width, device=group.device)

    def once() -> float:
        started = time.perf_counter()
        run_collective(case, mine, group.rank, num_ranks)
        group.synchronize()
        return time.perf_counter() - started

    return once
