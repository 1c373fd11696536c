from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """How each scenario of `processes.py` ended: "" for well, else the traceback. One process forks them all."""
    script = Path(__file__).with_name("processes.py")
    directory = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[3])}
    command = [sys.executable, str(script), str(directory)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, env=environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    told: dict[str, str] = json.loads(ended.stdout.splitlines()[-1])
    return {name: f"{problem}\n{ended.stderr}" if problem else "" for name, problem in told.items()}
