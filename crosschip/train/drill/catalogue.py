"""What a training is drilled with: each fault, how it is planted, and which events show that it was noticed. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from crosschip.errors import RecipeError

__all__ = ["FAULTS", "DrillFault", "Layout", "Means", "chosen"]

# "signal": a signal to a rank's process. "order": the rank does it to itself, at a given point of its step.
# "file": something is done to the newest checkpoint, and then the rank is killed so that it has to be read.
# "lighthouse": that is killed. "link": the process that exchanges is held still again and again.
Means = Literal["signal", "order", "file", "lighthouse", "link"]

# What a training must have for a fault to be planted and noticed; "averaging": several groups that average each step.
Needs = Literal["nothing", "groups", "averaging"]

_DEATHS = ("killed", "crash", "exception", "out-of-memory")


@dataclass(frozen=True)
class DrillFault:
    """One fault.

    `noticed_by` are the events of which one has to come, in the group that has the fault, or, with `by_others`, in
    any group.
    """

    name: str
    title: str
    means: Means
    noticed_by: tuple[str, ...]
    needs: Needs = "nothing"
    by_others: bool = False
    within_s: float = 120.0  # after which it counts as not noticed
    alone_s: float = 30.0  # left to be noticed in before the next fault may strike


FAULTS: dict[str, DrillFault] = {
    fault.name: fault
    for fault in (
        DrillFault("kill", "a rank is killed (kill -9)", "signal", ("killed",)),
        DrillFault("stop", "a rank is stopped (SIGSTOP)", "signal", ("hang",)),
        DrillFault("segfault", "a rank dies of a segmentation fault", "order", ("crash",)),
        DrillFault("exception", "a step raises an exception", "order", ("exception",)),
        DrillFault("lock-held", "a C call holds the interpreter's lock and does not come back", "order", ("hang",)),
        DrillFault("operator-hang", "an operator does not come back", "order", ("hang",)),
        DrillFault("collective-hang", "a collective does not come back", "signal", ("hang",), needs="groups"),
        # The first save after a start has the drill's start_allowance_s of 120 s.
        DrillFault("save-hang", "a save does not come back", "order", ("hang",), within_s=180.0),
        DrillFault(
            "slow",
            "a rank becomes three times slower",
            "order",
            ("straggler",),
            needs="averaging",
            by_others=True,
            alone_s=90.0,  # it is told after some 50 of its steps
        ),
        DrillFault("full-disk", "the disk is full during a save", "order", ("checkpoint-failed",)),
        DrillFault("truncated", "the newest checkpoint has been cut", "file", ("damaged-checkpoint",)),
        DrillFault("flipped-byte", "a byte of the newest checkpoint is another", "file", ("damaged-checkpoint",)),
        DrillFault(
            "wrong-save", "a checkpoint is saved before a tensor of it has arrived", "order", ("checkpoint-wrong",)
        ),
        DrillFault("nan-gradient", "a gradient is NaN in one step", "order", ("transient-fault", "non-finite")),
        DrillFault("loss-spike", "the data of a step are noise", "order", ("loss-spike", "gradient-spike")),
        DrillFault(
            "activation-flip",
            "a high bit of an activation flips in one step",
            "order",
            ("transient-fault", "loss-spike", "gradient-spike", "non-finite"),
        ),
        DrillFault(
            "gradient-flip",
            "a high bit of a gradient flips in one step",
            "order",
            ("transient-fault", "gradient-spike", "non-finite"),
        ),
        DrillFault(
            "weight-flip",
            "a high bit of a weight flips",
            "order",
            ("replicas-differ", "loss-spike", "gradient-spike", "non-finite", "checkpoint-wrong"),
        ),
        DrillFault("out-of-memory", "a step asks for more memory than there is", "order", _DEATHS),
        DrillFault("data", "the data cannot be read for one step", "order", ("exception",)),
        DrillFault(
            "link-cut",
            "a link is cut for 2.5 seconds",
            "link",
            ("link-stall", "step-not-committed"),
            needs="averaging",
            by_others=True,
        ),
        DrillFault(
            "slow-link", "a link is slow", "link", ("slow-link", "link-stall"), needs="averaging", by_others=True
        ),
        DrillFault(
            "lossy-link",
            "a link loses packets",
            "link",
            ("slow-link", "link-stall"),
            needs="averaging",
            by_others=True,
        ),
        DrillFault(
            "lighthouse",
            "the lighthouse is killed",
            "lighthouse",
            ("lighthouse-lost",),
            needs="groups",
            by_others=True,
        ),
    )
}


@dataclass(frozen=True)
class Layout:
    """How a training is spread. `averages_each_step` is whether its groups do; None where nobody knows yet."""

    num_groups: int
    averages_each_step: bool | None

    def lacks(self, fault: DrillFault) -> str | None:
        """Why a fault could not be planted here, or not be noticed; None where it can."""
        if fault.needs != "nothing" and self.num_groups == 1:
            return "one group trains alone, and it needs several"
        if fault.needs == "averaging" and self.averages_each_step is False:
            return "the groups train by DiLoCo, and only groups that average each step are watched so closely"
        return None


def chosen(names: Sequence[str] | None, layout: Layout) -> tuple[list[DrillFault], dict[str, list[str]]]:
    """The named faults, or all that can be noticed; and the names of those that were left out, by the reason.

    Raises:
        KeyError: a name that is no fault's.
        RecipeError: a named one could not be noticed.
    """
    found, left_out = [], dict[str, list[str]]()
    for fault in FAULTS.values() if names is None else [FAULTS[name] for name in names]:
        why = layout.lacks(fault)
        if why is None:
            found.append(fault)
        elif names is None:
            left_out.setdefault(why, []).append(fault.name)
        else:
            raise RecipeError(
                f"--faults {fault.name!r} could not be noticed: {why}",
                "leave it out, or set groups.num_groups=2 and groups.mode=every-step",
            )
    return found, left_out
