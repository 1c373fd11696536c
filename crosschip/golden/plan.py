"""How much a golden bundle records."""

from __future__ import annotations

from dataclasses import dataclass, field

from crosschip.golden.training_curve import CurvePlan

__all__ = ["BATCH_PLACE", "BATCH_SIZE", "MAX_BYTES", "RecordPlan"]

MAX_BYTES = 50_000_000
BATCH_SIZE, BATCH_PLACE = 4, 2  # the other batch size, and the row's place in it


@dataclass(frozen=True)
class RecordPlan:
    """How much is recorded. `reorderings` is how many other orders of every sum the noise floor is measured with.

    `max_bytes` is of all but the records of the weights, of which there are as many as the model has tensors.
    """

    seed: int = 0
    max_tokens: int = 16384
    max_bytes: int = MAX_BYTES
    reorderings: int = 2
    curve: CurvePlan = field(default_factory=CurvePlan)
