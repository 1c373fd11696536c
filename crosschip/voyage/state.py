"""A voyage under way, and what a step of it is."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crosschip.recipe import Recipe
from crosschip.rundir import RunDirectory, write_json

__all__ = ["DOCUMENT", "Step", "Voyage", "differences"]

DOCUMENT = "voyage.json"


@dataclass
class Voyage:
    """A voyage under way. `document` is what voyage.json holds: steps, chips, agreement."""

    recipe: Recipe
    recipe_path: Path
    overrides: list[str]
    run: RunDirectory
    command: list[str]  # what follows `crosschip run`, to say how to go on
    steps: tuple[Step, ...]
    document: dict[str, Any] = field(default_factory=dict)

    def record_of(self, name: str) -> dict[str, Any] | None:
        """What is recorded about a step, or `None`."""
        return next((step for step in self.document["steps"] if step["name"] == name), None)

    def save(self) -> None:
        """Write voyage.json."""
        write_json(self.run.path / DOCUMENT, self.document)

    def again(self) -> str:
        """The command that goes on with it."""
        return shlex.join(["crosschip", "run", *self.command])


@dataclass(frozen=True)
class Step:
    """A named part of the voyage. `act` does it and returns its outcome in words.

    `is_there` tells whether what a finished step made still exists; without it the step is taken on every call.
    """

    name: str
    title: str
    act: Callable[[Voyage], str]
    is_there: Callable[[Voyage], bool] | None = None


def differences(before: Any, now: Any, key: str = "") -> list[str]:
    """`train.steps was 600 and is now 700` for each leaf that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = list(dict.fromkeys([*before, *now]))
        inside = ((name, f"{key}.{name}" if key else name) for name in names)
        return [found for name, path in inside for found in differences(before.get(name), now.get(name), path)]
    return [] if before == now else [f"{key} was {before!r} and is now {now!r}"]
