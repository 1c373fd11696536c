"""The published facts about failures that ship with the planner (`plan/data/failures.csv`), each with its source."""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from pathlib import Path

from crosschip.plan.figures import Figure

__all__ = ["Fact", "fact", "facts", "figure_of"]

_FILE = Path(__file__).parents[1] / "data" / "failures.csv"


@dataclass(frozen=True)
class Fact:
    """One row: `use` says what it serves for, `attested` how well it is known."""

    id: str
    use: str
    system: str
    num_chips: int | None
    chips_per_node: int | None
    value: float
    unit: str
    attested: str
    source: str
    note: str


@functools.cache
def facts(use: str | None = None) -> tuple[Fact, ...]:
    """All facts, or those of one use: `chip rate`, `job rate`, `corruption rate`, `recovery`, `check`, `claim`."""
    with _FILE.open(encoding="utf-8", newline="") as file:
        rows = [_fact(row) for row in csv.DictReader(file)]
    return tuple(row for row in rows if use is None or row.use == use)


def _fact(row: dict[str, str]) -> Fact:
    def number(name: str) -> int | None:
        return int(row[name]) if row[name] else None

    chips, per_node, value = number("num_chips"), number("chips_per_node"), float(row["value"])
    words = (row["unit"], row["attested"], row["source"], row["note"])
    return Fact(row["id"], row["use"], row["system"], chips, per_node, value, *words)


def fact(id: str) -> Fact:
    """The fact of this id; an unknown id is our own mistake."""
    found = [row for row in facts() if row.id == id]
    assert len(found) == 1, id
    return found[0]


def figure_of(row: Fact) -> Figure:
    """A fact as a figure of the plan: what a vendor claims and what is quoted from memory says so in its source."""
    return Figure(row.value, row.unit, "published", f"{row.system}, {row.source} ({row.attested}): {row.note}")
