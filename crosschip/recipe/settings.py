"""What all tables of a recipe have in common."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["ComputeDtype", "Fraction", "NonEmpty", "PositiveInt", "Settings"]

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonEmpty = Annotated[str, Field(min_length=1)]  # an empty path would be the present directory
ComputeDtype = Literal["auto", "float32", "bfloat16"]


class Settings(BaseModel):
    """A table of the recipe: unknown keys and values of another type are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())
