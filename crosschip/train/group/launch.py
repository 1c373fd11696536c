"""What starts several ranks on this machine: the agent's command and the environment. No torch.

    the supervisor (see `train.guard`) -> agent (torch's elastic agent, see `agent.py`) -> ranks (`crosschip train`)

Each of the three ends when the one before it is gone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

__all__ = ["NUM_RANKS", "agent_command", "rank_environment", "share_of_cores"]

NUM_RANKS = "CROSSCHIP_NPROC"  # tells a rank how it was started, so that it can say how to go on


def agent_command(num_ranks: int, arguments: Sequence[str]) -> list[str]:
    """The command of an agent that runs `crosschip ARGUMENTS` in each of `num_ranks` processes."""
    return [sys.executable, "-m", "crosschip.train.group.agent", str(num_ranks), *arguments]


def rank_environment(num_ranks: int, environment: Mapping[str, str]) -> dict[str, str]:
    """What the ranks find around them: their share of the cores, and the loopback device to meet on."""
    chosen = share_of_cores(num_ranks, environment)
    chosen[NUM_RANKS] = str(num_ranks)
    # Gloo would look its own host's name up and listen to the network; all ranks are on this machine.
    chosen.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    return chosen


def share_of_cores(num_processes: int, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with a thread count for one of several processes that compute on this machine, unless it has one.

    Threads that outnumber the cores wait for each other by spinning: steps then take twenty times as long now and then.
    """
    return {"OMP_NUM_THREADS": str(max(1, _num_cores() // num_processes)), **environment}


def _num_cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1
