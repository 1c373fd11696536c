"""Collectives of the simulated chip between real processes, honest and with faults planted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(("case", "world"), [("reductions", 3), ("exchanges", 3), ("faults", 2), ("training", 2)])
def test_processes(case: str, world: int, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.chips.simulated.ranks", case, str(rank), str(world), str(tmp_path / "store")],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        for rank, process in enumerate(ranks):
            output, errors = process.communicate(timeout=120)
            assert (process.returncode, output.strip()) == (0, "done"), f"rank {rank}: {errors}"
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
                process.wait()
