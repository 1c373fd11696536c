"""Published figures of chips (`published.toml`): claims with their certainty, for planning and beside measurements."""

from __future__ import annotations

import functools
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

__all__ = ["FIGURES", "PublishedChip", "PublishedFigure", "published_chip", "published_chips"]

# Key -> what it is called, with its unit.
FIGURES = {
    "bf16_tflops": "bf16, dense, TFLOP/s",
    "fp8_tflops": "fp8, dense, TFLOP/s",
    "memory_gb": "memory, GB",
    "memory_gb_s": "memory bandwidth, GB/s",
    "scale_up": "links inside a node",
    "scale_out": "links between nodes",
}


@dataclass(frozen=True)
class PublishedFigure:
    """One figure. `text` is None where none was found; `value` is its number if it is one number that is confirmed."""

    text: str | None
    confirmed: bool

    @property
    def value(self) -> float | None:
        """The number, or None where the figure is unconfirmed, a range, or words."""
        is_number = self.text is not None and re.fullmatch(r"\d+(\.\d+)?", self.text)
        return float(self.text or 0) if self.confirmed and is_number else None


@dataclass(frozen=True)
class PublishedChip:
    """A chip's published figures, by the keys of `FIGURES`; `from_memory` ones must be confirmed before use."""

    name: str
    matches: tuple[str, ...]
    figures: dict[str, PublishedFigure]
    from_memory: bool
    note: str


@functools.cache
def published_chips() -> tuple[PublishedChip, ...]:
    """Every chip of the table."""
    table = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    chips = []
    for row in table["chip"]:
        from_memory, unconfirmed = bool(row.get("from_memory")), set(row.get("unconfirmed", ()))
        figures = {
            key: PublishedFigure(row.get(key), key not in unconfirmed and not from_memory)
            for key in FIGURES
            if key in row or key in unconfirmed
        }
        chips.append(PublishedChip(row["name"], tuple(row["matches"]), figures, from_memory, row.get("note", "")))
    return tuple(chips)


def published_chip(model_name: str) -> PublishedChip | None:
    """The chip of the table whose name this is, as the chip itself gives it (`NVIDIA H100 80GB HBM3`)."""
    found = [chip for chip in published_chips() if any(re.search(each, model_name) for each in chip.matches)]
    assert len(found) < 2, f"{model_name} matches {[chip.name for chip in found]}"
    return found[0] if found else None
