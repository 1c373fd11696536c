"""The overwrite check from directories: an engine started on one takes the weights of another while it runs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from crosschip.errors import ModelError, ServeError
from crosschip.serve.engine.loading import load_engine
from crosschip.serve.engine.overwrite import check_overwrite

__all__ = ["overwritten"]


def overwritten(
    other: Path, directory: Path, prompts: list[list[int]], chip: str, dtype: torch.dtype
) -> dict[str, Any]:
    """Start on `other`, update to `directory`, compare with a cold start; both engines are in memory together.

    Returns the fields of `Overwritten` with `passed`, or `refused` with the reason why the running engine does not take
    the weights.

    Raises:
        ServeError, ModelError: an engine does not load.
    """
    live = load_engine(other, max_batch_size=1, dtype=dtype, device=chip)
    try:
        try:
            live.update_weights(directory)
        except (ServeError, ModelError) as error:
            return {"passed": False, "refused": error.problem}
        cold = load_engine(directory, max_batch_size=1, dtype=dtype, device=chip)
        try:
            found = check_overwrite(live, cold, prompts)
        finally:
            cold.close()
    finally:
        live.close()
    return {**asdict(found), "passed": found.passed}
