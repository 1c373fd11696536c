"""The tables of a cluster's file that say when it is there, how it comes back from a stop, and what was seen on it."""

from __future__ import annotations

from datetime import date
from typing import Annotated

from pydantic import Field, model_validator

from crosschip.plan.dates import Blackout, Ramp
from crosschip.plan.failures import Observation
from crosschip.plan.strict_table import StrictTable

__all__ = ["BlackoutTable", "PauseTable", "RecoveryTable", "ScheduleTable", "SeenTable"]


_MOST_S = 10 * 365 * 86400.0  # ten years, of one repair or restart: more is a slip of the pen
_Pair = Annotated[tuple[float, float], Field(strict=False)]


class BlackoutTable(StrictTable):
    """`[[schedule.blackouts]]`: a window without the cluster, both days included."""

    first: date
    last: date
    why: Annotated[str, Field(min_length=1)] = "no cluster"

    @model_validator(mode="after")
    def _in_order(self) -> BlackoutTable:
        if self.last < self.first:
            raise ValueError(f"it ends on {self.last}, before it begins on {self.first}; swap its dates")
        return self


class PauseTable(StrictTable):
    """`[[schedule.pauses]]`: days without any chip behind a stage: a review, an evaluation, the transport of data."""

    after: Annotated[str, Field(min_length=1)]
    days: Annotated[float, Field(gt=0.0)]
    why: Annotated[str, Field(min_length=1)] = "pause"


class ScheduleTable(StrictTable):
    """`[schedule]`: `ramp` is pairs of a day since the start and the share of the chips that is there from then on."""

    ramp: Annotated[tuple[_Pair, ...], Field(strict=False)] = ()
    blackouts: Annotated[tuple[BlackoutTable, ...], Field(strict=False)] = ()
    pauses: Annotated[tuple[PauseTable, ...], Field(strict=False)] = ()

    def ramps(self) -> tuple[Ramp, ...]:
        """The ramp-up as the simulation takes it."""
        return tuple(Ramp(day, share) for day, share in self.ramp)

    def windows(self) -> tuple[Blackout, ...]:
        """The blackouts as the calendar takes them."""
        return tuple(Blackout(each.first, each.last, each.why) for each in self.blackouts)


class RecoveryTable(StrictTable):
    """`[recovery]`: what is known of this cluster's way back from a stop; what is left out is as published or assumed.

    `store_gb_s` is what the store of checkpoints takes from all chips together; `blocking_save` keeps the chips waiting
    until a save is on it.
    """

    store_gb_s: Annotated[float, Field(gt=0.0)] | None = None
    blocking_save: bool = False
    num_spares: Annotated[int, Field(ge=0)] | None = None
    restart_s: Annotated[float, Field(ge=0.0, le=_MOST_S)] | None = None
    repair_s: Annotated[float, Field(ge=0.0, le=_MOST_S)] | None = None

    def given(self) -> dict[str, float]:
        """The numbers that stand in the place of shipped ones."""
        found = {"restart_s": self.restart_s, "repair_s": self.repair_s}
        return {name: value for name, value in found.items() if value is not None}


class SeenTable(StrictTable):
    """`[[seen]]`: stops that jobs on this very cluster had; evidence beside the published fleets."""

    num_stops: Annotated[int, Field(ge=0)]
    days: Annotated[float, Field(gt=0.0)]
    num_chips: Annotated[int, Field(gt=0)]

    def observation(self) -> Observation:
        """As the rates take it."""
        return Observation(self.num_stops, self.days, self.num_chips)
