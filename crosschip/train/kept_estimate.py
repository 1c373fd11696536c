"""The time of a step by which groups choose how to train together, kept in the run directory. Pure but for that file.

It is measured, and takes longer on a chip that somebody else uses as well: a group that is started again would choose
otherwise than those that it left, and a whole run otherwise than before. So the first measurement counts, for all
groups of a machine and at each start, as long as what the choice depends on is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from crosschip.errors import RunDirectoryError
from crosschip.rundir import read_json, write_json_once
from crosschip.train.identity import digest

__all__ = ["SHARED_DIRECTORY", "kept_step_s"]

SHARED_DIRECTORY = "CROSSCHIP_GROUPS_SHARE"  # the environment's name for the run directory of all groups of a machine


def kept_step_s(run: Path, stage: str, measured_for: Mapping[str, Any], measure: Callable[[], float]) -> float:
    """Seconds of a step of `stage`: what was measured first in the run directory `run` for the same `measured_for`.

    Raises:
        RunDirectoryError: the file with it is damaged.
    """
    path = run / "groups" / f"{stage}-{digest(measured_for)[:12]}.json"
    if path.exists():
        kept = read_json(path)
    else:
        kept = write_json_once(path, {"step_s": measure(), "measured_for": measured_for})
    seconds = kept.get("step_s") if isinstance(kept, dict) else None
    if not isinstance(seconds, float) or not 0.0 < seconds < math.inf:
        raise RunDirectoryError(f"{path} holds no time of a step: step_s={seconds!r}", "delete it, in all groups")
    return seconds
