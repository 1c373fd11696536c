"""A rank that has lost the others says so in one line, instead of blaming itself with a traceback."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from crosschip.errors import EXIT_FAIL, CrosschipError

__all__ = ["WAITED_IN_VAIN", "LostRankError", "telling_of_lost_ranks"]

WAITED_IN_VAIN = "waited in vain for another rank of its group"

# How gloo, torch's store and NCCL tell that a peer is gone or silent; they have no exception of their own for it.
_SIGNS = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "timed out",
    "timeout",
    "remote process exited",
    "socket",
)


class LostRankError(CrosschipError):
    """Another rank of the group ended, or did not answer in time; this one is well."""

    exit_code = EXIT_FAIL


@contextmanager
def telling_of_lost_ranks(rank: int) -> Iterator[None]:
    """Turn what a collective raises when another rank is gone into a `LostRankError`."""
    from torch import distributed

    try:
        yield
    except RuntimeError as error:
        told = str(error)
        if not isinstance(error, distributed.DistError) and not any(sign in told.lower() for sign in _SIGNS):
            raise
        # "[.../pair.cc:553] Connection closed by peer [127.0.0.1]:37029. This is typically caused by ..."
        first_sentence = re.sub(r"^\[[^]]*\] ", "", told.strip().splitlines()[0]).split(". ")[0]
        is_silent = "timed out" in told.lower() or "timeout" in told.lower()
        what = WAITED_IN_VAIN if is_silent else "lost another rank of its group"
        raise LostRankError(
            f"rank {rank} {what}: {first_sentence}",
            "look for the rank that failed first; then go on from the last checkpoint with --resume",
        ) from error
