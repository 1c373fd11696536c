"""The unit and the origin of every number of a plan's document: those that stand bare have theirs in a table.

The table is `data/units.toml`. A document carries the lines of it that its bare numbers need under `units`.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Meaning", "is_figure", "joined", "meaning_of", "meanings_under", "units_of"]

_TABLE = Path(__file__).parent / "data" / "units.toml"
_ANY = "*"


@dataclass(frozen=True)
class Meaning:
    """What the numbers at a path are; `*` in the path stands for any part."""

    path: tuple[str, ...]
    unit: str
    origin: str
    source: str

    def document(self) -> dict[str, str]:
        """For JSON."""
        return {"path": ".".join(self.path), "unit": self.unit, "origin": self.origin, "source": self.source}

    def fits(self, path: tuple[str, ...]) -> bool:
        """Whether it is of the numbers at this path."""
        return len(path) == len(self.path) and self.begins(path)

    def begins(self, path: tuple[str, ...]) -> bool:
        """Whether it is of numbers at this path or below it."""
        return len(path) <= len(self.path) and all(
            _ANY in (mine, each) or mine == each for mine, each in zip(self.path, path, strict=False)
        )


@functools.cache
def _table() -> tuple[Meaning, ...]:
    groups = tomllib.loads(_TABLE.read_text(encoding="utf-8"))["group"]
    return tuple(
        Meaning((*filter(None, place.split(".")), *path.split(".")), unit, origin, source)
        for group in groups
        for place in group["under"]
        for path, unit, origin, source in group["leaves"]
    )


def meaning_of(path: tuple[str, ...]) -> Meaning | None:
    """What the number at this path is; None if the table does not say."""
    return next((each for each in _table() if each.fits(path)), None)


def meanings_under(key: str) -> list[Meaning]:
    """What the numbers at or below a dotted key are in every plan; a number in it stands for any place of a list."""
    parts = tuple(_ANY if part.isdigit() else part for part in key.split("."))
    return [each for each in _table() if each.begins(parts)]


def is_figure(value: Any) -> bool:
    """Whether a part of a document is a number that carries its own unit and origin."""
    return isinstance(value, dict) and {"value", "unit", "origin"} <= set(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _bare(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of the numbers that carry no unit."""
    if is_figure(value):
        return
    if _is_number(value):
        yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in parts:
        yield from _bare(part, (*path, str(name)))


def units_of(document: dict[str, Any]) -> list[dict[str, str]]:
    """The lines of the table that the bare numbers of a document need; a number without one is our own mistake."""
    found: dict[Meaning, None] = {}
    for path in _bare(document):
        meaning = meaning_of(path)
        assert meaning is not None, f"{'.'.join(path)} has no unit in data/units.toml"
        found[meaning] = None
    return [each.document() for each in found]


def joined(value: Any, path: tuple[str, ...]) -> Any:
    """A part of a document with the unit and the origin of every bare number put beside it."""
    if is_figure(value):
        return value
    if _is_number(value) or (isinstance(value, list) and value and all(map(_is_number, value))):
        places = {meaning_of((*path, str(place))) for place in range(len(value))} if isinstance(value, list) else set()
        meaning = meaning_of(path) if not places else places.pop() if len(places) == 1 else None
        if meaning is not None:
            return {"value": value, "unit": meaning.unit, "origin": meaning.origin, "source": meaning.source}
    if isinstance(value, dict):
        return {name: joined(part, (*path, name)) for name, part in value.items()}
    if isinstance(value, list):
        return [joined(part, (*path, str(place))) for place, part in enumerate(value)]
    return value
