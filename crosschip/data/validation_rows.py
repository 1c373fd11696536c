"""The documents of a run's validation data, as they were tokenised for its training."""

from __future__ import annotations

import numpy as np

from crosschip.data.token_store import TokenStore
from crosschip.rundir import RunDirectory, is_complete

__all__ = ["validation_rows"]


def validation_rows(run: RunDirectory) -> list[list[int]]:
    """Token ids, those of the run's last stage first; none where nothing was trained.

    Raises:
        RunDirectoryError: they are not what was written.
    """
    rows: list[list[int]] = []
    for directory in sorted(run.data.glob("*-validation")):  # chat-validation, packed-validation
        if is_complete(directory):
            store = TokenStore(directory)
            store.check(lambda: None)
            rows += [part.tolist() for part in np.split(np.asarray(store.tokens), np.asarray(store.ends))]
    return rows
