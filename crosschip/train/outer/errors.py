"""What can go wrong between replica groups."""

from __future__ import annotations

from crosschip.errors import EXIT_FAIL, CrosschipError

__all__ = ["GivenUp", "GroupsError", "SidecarLost", "StepNotCommitted"]


class GroupsError(CrosschipError):
    """Groups that cannot train together: other settings, another layout, no lighthouse, no torchft."""


class SidecarLost(GroupsError):
    """The sidecar has died or left; the trainer's weights are untouched, and a new sidecar may be started."""

    exit_code = EXIT_FAIL  # it may not come again, so a supervisor may try again


class GivenUp(Exception):
    """The stage is to stop, and the other groups did not come: weights and position are as after the step before."""


class StepNotCommitted(Exception):
    """The groups did not agree on a step (one of them died in it): no weight was changed, the step is to be repeated.

    The position in the data has not moved, so no data is lost.
    """
