"""What is wrong with what a plan was asked about failures, dates, load or money."""

from __future__ import annotations

import math

from crosschip.errors import CrosschipError

__all__ = ["PlanError", "at_least", "is_share", "positive"]


class PlanError(CrosschipError):
    """A plan that cannot be made from what was given."""


def positive(name: str, value: float) -> None:
    """Refuse `value` unless it is a finite number above zero."""
    if not (math.isfinite(value) and value > 0):
        raise PlanError(f"{name} is {value}", f"give a finite {name} above 0")


def at_least(name: str, value: float, least: float) -> None:
    """Refuse `value` unless it is a finite number of at least `least`."""
    if not (math.isfinite(value) and value >= least):
        raise PlanError(f"{name} is {value}", f"give a finite {name} of at least {least:g}")


def is_share(name: str, value: float) -> None:
    """Refuse `value` unless it lies in [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise PlanError(f"{name} is {value}", f"give {name} as a share between 0 and 1")
