"""Supervise `worker.py` from a process of its own: STATE NUM_RANKS [arguments of the worker]."""

import os
import sys
from pathlib import Path

from crosschip.recipe import GuardSettings
from crosschip.train.guard.attempt import Launch
from crosschip.train.guard.supervisor import SupervisedRun, supervise

state, num_ranks = Path(sys.argv[1]), int(sys.argv[2])
here = Path(__file__).parent
launcher = [str(here / "launcher.py"), str(num_ranks)] if num_ranks > 1 else []
argv = [sys.executable, *launcher, str(here / "worker.py"), "--state", str(state), *sys.argv[3:]]
assert "torch" not in sys.modules
sys.exit(
    supervise(
        SupervisedRun(
            launch=lambda attempt: Launch(argv, os.environ, num_ranks),
            heartbeats=state.parent / "heartbeats",
            committed=lambda: 0,
            tell=lambda stage, event: print(stage, event.line(), flush=True),
            settings=GuardSettings(start_allowance_s=30.0),
        )
    )
)
