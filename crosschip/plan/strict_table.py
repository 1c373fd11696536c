"""What all tables of a cluster's file have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["StrictTable"]


class StrictTable(BaseModel):
    """A table of the file: unknown keys and values of another type are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
