"""Failures between ranks as checks that start their own: a rank that is lost, one that is late, a slow pair.

Needs torch only: reproducers hold these functions' source.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist

from crosschip.qualify.exams.links.own_ranks import START_LIMIT_S, exit_codes, join_ranks, meet, ranks_running

__all__ = ["late_rank_is_lost", "loss_goes_unnoticed", "pair_is_slow"]

_EXCHANGES = 12  # messages to and fro of a pair, the fastest of which counts
_ROUNDS_BEFORE = 5  # all-reduces that went well before a rank is struck


def loss_goes_unnoticed(
    device: str, how: str, num_ranks: int, timeout_s: float, grace_s: float
) -> tuple[bool, str, str]:
    """Kill (`killed`) or stop (`stopped`) the last rank while all are in all_reduces with a time-out.

    Wrong: another rank still waits for it when the time-out and the grace are over.
    """
    struck, limit_s = num_ranks - 1, timeout_s + grace_s
    expected = f"the others end within {limit_s:g} s of rank {struck} being {how}"
    with ranks_running(reduce_for_ever, device, num_ranks, timeout_s) as (processes, directory):
        others = processes[:struck]
        started = time.monotonic()
        while not all(Path(directory, f"reducing-{rank}").exists() for rank in range(num_ranks)):
            if time.monotonic() - started > START_LIMIT_S or not all(each.is_alive() for each in processes):
                return True, "ranks that reduce together", "they do not even without any loss"
            time.sleep(0.05)
        os.kill(processes[struck].pid, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        began = time.monotonic()
        while any(each.is_alive() for each in others) and time.monotonic() - began < limit_s:
            time.sleep(0.05)
        took_s = time.monotonic() - began
        waiting = [str(rank) for rank, each in enumerate(others) if each.is_alive()]
    if waiting:
        return True, expected, f"rank {', '.join(waiting)} still waited after {took_s:.1f} s"
    return False, expected, f"they ended after {took_s:.1f} s"


def reduce_for_ever(rank: int, device: str, num_ranks: int, timeout_s: float, directory: str) -> None:
    """One rank of it: it ends when a collective raises."""
    own = join_ranks(rank, device, num_ranks, timeout_s, directory)
    token = torch.ones(1 << 14, device=own)
    number = 0
    try:
        while True:
            dist.all_reduce(token)
            token[:1].cpu()  # the collective may still be under way when the call comes back
            number += 1
            if number == _ROUNDS_BEFORE:
                Path(directory, f"reducing-{rank}").touch()
    except RuntimeError:
        os._exit(1)  # to leave a broken group in order could wait for the others


def late_rank_is_lost(device: str, num_ranks: int, skew_s: float, timeout_s: float) -> tuple[bool, str, str]:
    """Let the last rank meet the others late, well within the time-out; wrong when they do not get together."""
    expected = f"{num_ranks} ranks that meet, the last {skew_s:g} s late"
    with ranks_running(reduce_once, device, num_ranks, skew_s, timeout_s) as (processes, _):
        codes = exit_codes(processes, START_LIMIT_S + skew_s + timeout_s)
    if all(code == 0 for code in codes):
        return False, expected, "they met"
    return True, expected, f"exit codes of the ranks: {codes} (None: it still waited)"


def reduce_once(rank: int, device: str, num_ranks: int, skew_s: float, timeout_s: float, directory: str) -> None:
    """One rank of it."""
    own = join_ranks(rank, device, num_ranks, timeout_s, directory, skew_s if rank == num_ranks - 1 else 0.0)
    token = torch.ones(1, device=own)
    dist.all_reduce(token)
    token.cpu()
    dist.destroy_process_group()


def pair_is_slow(
    device: str, pair: list[int], pairs: list[list[int]], num_ranks: int, num_bytes: int, most_ratio: float
) -> tuple[bool, str, str]:
    """Send a message to and fro between some pairs of ranks; wrong when `pair` takes too long beside their median.

    The fastest of a pair's messages counts: a passing burden slows some of them, a bad link all.
    """
    with ranks_running(exchange_in_pairs, device, num_ranks, pairs, num_bytes) as (processes, directory):
        codes = exit_codes(processes, 2 * START_LIMIT_S)
        if any(code != 0 for code in codes):
            return True, "messages between all pairs", f"exit codes of the ranks: {codes} (None: it still waited)"
        times: dict[tuple[int, int], float] = {}
        for rank in range(num_ranks):
            for other, seconds in json.loads(Path(directory, f"times-{rank}.json").read_text()).items():
                times[rank, int(other)] = seconds
    typical, own = statistics.median(times.values()), times[pair[0], pair[1]]
    expected = f"at most {most_ratio:g} times the median pair's {typical * 1e3:.3g} ms, with {num_bytes} bytes one way"
    return own > most_ratio * typical, expected, f"ranks {pair[0]} and {pair[1]}: {own * 1e3:.3g} ms"


def exchange_in_pairs(
    rank: int, device: str, num_ranks: int, pairs: list[list[int]], num_bytes: int, directory: str
) -> None:
    """One rank of it; the first of a pair notes the time."""
    own = join_ranks(rank, device, num_ranks, 2 * START_LIMIT_S, directory)
    message = torch.zeros(num_bytes, dtype=torch.uint8, device=own)
    dist.all_reduce(torch.ones(1, device=own))
    times: dict[int, float] = {}
    for first, second in pairs:
        meet(directory, f"pair-{first}-{second}", rank, num_ranks)
        for _ in range(_EXCHANGES if rank in (first, second) else 0):
            started = time.perf_counter()
            for sender in (first, second):
                if rank == sender:
                    dist.send(message, second if rank == first else first)
                else:
                    dist.recv(message, sender)
            message[:1].cpu()
            if rank == first:
                once = (time.perf_counter() - started) / 2
                times[second] = min(times.get(second, once), once)
    Path(directory, f"times-{rank}.json").write_text(json.dumps(times))
    meet(directory, "end", rank, num_ranks)
    dist.destroy_process_group()
