"""What was found when a checkpoint was read back: `verified.json` beside its marker. Pure but for the one file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from crosschip.checkpoints import VERDICT_FILE
from crosschip.rundir import write_json

if TYPE_CHECKING:
    from crosschip.train.checkpoint.loss_check import LossAnswer

__all__ = ["Verdict", "verdict_of", "write_verdict"]

_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Verdict:
    """`unknown` is no statement about the checkpoint: the reader failed, or there is no loss to compare with.

    `loss`: expected, found and limit, in nats.
    """

    verdict: Literal["right", "wrong", "unknown"]
    detail: str
    loss: dict[str, float | None] | None
    seconds: float


def verdict_of(problem: str | None, answer: LossAnswer | None) -> Verdict:
    """The verdict on a checkpoint with a `problem` in its files (None: none), and the answer about its loss."""
    loss = None if answer is None else dataclasses.asdict(answer)
    if problem is not None:
        return Verdict("wrong", problem, loss, 0.0)
    told = "every tensor is what the device had"
    if answer is None:
        return Verdict("right", f"{told}; its loss was not compared", None, 0.0)
    if answer.expected is None:
        told = f"{told}; its loss is {answer.found!r}, and training has skipped the step to compare it with"
        return Verdict("unknown" if answer.is_reproduced else "wrong", told, loss, 0.0)
    difference = abs(answer.found - answer.expected)
    if not answer.is_reproduced:
        allowed = f"at most {answer.limit:.3g} is honest" if answer.limit else "every bit should be the same"
        problem = (
            f"its loss is {answer.found!r} and training had {answer.expected!r}: {difference:.3g} apart, {allowed}"
        )
        return Verdict("wrong", problem, loss, 0.0)
    how = f"within {answer.limit:.3g} ({difference:.3g} apart)" if answer.limit else "to the bit"
    return Verdict("right", f"{told}; its loss is training's {how}", loss, 0.0)


def write_verdict(path: Path, verdict: Verdict) -> None:
    """Put `verified.json` into the checkpoint at `path`."""
    document: dict[str, Any] = {"schema_version": _SCHEMA_VERSION, **dataclasses.asdict(verdict)}
    write_json(path / VERDICT_FILE, document)
