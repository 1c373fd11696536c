"""Several real processes that train together, and what they found."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from crosschip.engines import free_port
from tests.train.group.ranks import CASES_OF

ROOT = Path(__file__).parents[3]
Trained = dict[str, dict[str, Any]]


def run_together(num_ranks: int, arguments: list[str], timeout_s: float = 500.0) -> list[tuple[int, str]]:
    """Start one process for each rank, as torchrun would; returns exit codes and what each said."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(num_ranks),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    started = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    try:
        said = [process.communicate(timeout=timeout_s)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Trained]:
    """`trained(2)`: what two ranks found in each of their cases; they run once."""

    @lru_cache
    def run(num_ranks: int) -> tuple[Path, list[tuple[int, str]]]:
        out = tmp_path_factory.mktemp(f"ranks-{num_ranks}")
        return out, run_together(num_ranks, ["-m", "tests.train.group.ranks", str(out), *CASES_OF[num_ranks]])

    def of(num_ranks: int) -> Trained:
        out, ended = run(num_ranks)
        assert all(code == 0 for code, _ in ended), "\n".join(text for _, text in ended)
        return {name: torch.load(out / f"{name}.pt") for name in CASES_OF[num_ranks]}

    return of
