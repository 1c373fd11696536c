"""Training: the step, the loop, checkpoints; pre-training, fine-tuning, and the evaluation of what came out.

What is named here is imported when it is asked for: what starts and watches training processes lies in this room as
well, and must not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crosschip.train.evaluate import evaluate_recipe
    from crosschip.train.progress import LineProgress, StageProgress, open_progress
    from crosschip.train.stages import TrainOutcome, train_recipe

__all__ = ["LineProgress", "StageProgress", "TrainOutcome", "evaluate_recipe", "open_progress", "train_recipe"]

_PLACES = {
    "LineProgress": "progress",
    "StageProgress": "progress",
    "TrainOutcome": "stages",
    "evaluate_recipe": "evaluate",
    "open_progress": "progress",
    "train_recipe": "stages",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
