"""A number with its unit and where it comes from: measured, published or assumed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Figure", "Origin"]

Origin = Literal["measured", "published", "assumed", "computed", "given"]


@dataclass(frozen=True)
class Figure:
    """One number that a plan rests on. `source` says who measured or published it, or why it is assumed."""

    value: float
    unit: str
    origin: Origin
    source: str

    def document(self) -> dict[str, Any]:
        """The figure for JSON."""
        return {"value": self.value, "unit": self.unit, "origin": self.origin, "source": self.source}
