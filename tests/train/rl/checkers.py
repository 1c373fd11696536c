"""Checkers for tests, found by import path."""

from __future__ import annotations

from crosschip.rewards import Attempt


def short(attempt: Attempt) -> float:
    """Better the shorter."""
    return 1.0 - attempt.num_tokens / 16


def broken(attempt: Attempt) -> float:
    """A checker with a defect."""
    raise ValueError("no such unit")


def lettered(attempt: Attempt) -> float:
    """The share of letters."""
    return sum(character.isascii() and character.isalpha() for character in attempt.text) / max(1, len(attempt.text))
