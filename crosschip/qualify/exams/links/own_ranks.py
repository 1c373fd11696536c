"""Ranks that a check starts by itself, in processes of their own. Needs torch only: reproducers hold these functions.

What a rank has to say it writes into a directory that all of them share.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

__all__ = ["START_LIMIT_S", "exit_codes", "join_ranks", "meet", "need_devices", "ranks_running"]

START_LIMIT_S = 120.0  # a rank imports torch and the chip's plug-in


def need_devices(device: str, num_ranks: int) -> None:
    """End this process with exit code 2 where there is not a device for each rank; several share a host's memory."""
    if device.partition(":")[0] not in ("cpu", "sim") and torch.accelerator.device_count() < num_ranks:
        print(f"{num_ranks} devices are needed, and there are {torch.accelerator.device_count()}")
        raise SystemExit(2)


def join_ranks(
    rank: int, device: str, num_ranks: int, timeout_s: float, directory: str, late_s: float = 0.0
) -> torch.device:
    """Enter the process group of all ranks, whose collectives have this time-out; the rank's device comes back.

    The ranks wait for each other first, as starting may take longer than the time-out, and then `late_s` seconds.
    """
    kind = device.partition(":")[0]
    own = torch.device(device if kind in ("cpu", "sim") else f"{kind}:{rank}")
    if kind not in ("cpu", "sim"):
        torch.accelerator.set_device_index(rank)
    torch.ones(1, device=own)
    meet(directory, "ready", rank, num_ranks)
    time.sleep(late_s)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo" if own.type == "cpu" else dist.get_default_backend_for_device(own),
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=timeout_s),
    )
    return own


@contextmanager
def ranks_running(
    run: Callable[..., None], device: str, num_ranks: int, *arguments: Any
) -> Iterator[tuple[list[Any], str]]:
    """A process for each rank that makes `run(rank, device, num_ranks, *arguments, directory)`, and their directory.

    In the end none of them is left, stopped ones neither.
    """
    need_devices(device, num_ranks)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        given = (device, num_ranks, *arguments, directory)
        processes = [context.Process(target=run, args=(rank, *given), daemon=True) for rank in range(num_ranks)]
        for each in processes:
            each.start()
        try:
            yield processes, directory
        finally:
            for each in processes:
                each.kill()
                each.join()


def exit_codes(processes: list[Any], limit_s: float) -> list[int | None]:
    """How the ranks have ended, within so many seconds; None for one that has not."""
    deadline = time.monotonic() + limit_s
    for each in processes:
        each.join(max(0.0, deadline - time.monotonic()))
    return [each.exitcode for each in processes]


def meet(directory: str, what: str, rank: int, num_ranks: int) -> None:
    """Wait until all ranks have come to this place, without any collective.

    Raises:
        TimeoutError: one has not come within `START_LIMIT_S`.
    """
    Path(directory, f"{what}-{rank}").touch()
    deadline = time.monotonic() + START_LIMIT_S
    while not all(Path(directory, f"{what}-{other}").exists() for other in range(num_ranks)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not all of {num_ranks} ranks came to {what!r} within {START_LIMIT_S:.0f} s")
        time.sleep(0.01)
