"""Orders to the ranks of a drilled training: a file each, taken once. No torch."""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosschip.rundir import write_json

__all__ = ["DIRECTORY", "Order", "Taken", "give_order", "note_taken", "take_order", "taken", "withdraw"]

DIRECTORY = "CROSSCHIP_DRILL"  # the environment's name for the directory of orders; nothing is disturbed without it


@dataclass(frozen=True)
class Order:
    """`fault` is to be planted by the process itself, as strike number `number` of the drill."""

    number: int
    fault: str


@dataclass(frozen=True)
class Taken:
    """An order was carried out at `at`, in seconds of the machine's monotonic clock, in step `step`."""

    at: float
    step: int


def give_order(directory: Path, group: int, rank: int, order: Order) -> None:
    """Leave an order for a rank, in the place of one that it has not taken yet."""
    write_json(_path(directory, group, rank), {"number": order.number, "fault": order.fault})


def take_order(directory: Path, group: int, rank: int) -> Order | None:
    """The order that waits for this rank, which no later call gives again, also not after a restart."""
    path = _path(directory, group, rank)
    with contextlib.suppress(FileNotFoundError):
        found = json.loads(path.read_text())
        path.unlink()
        return Order(**found)
    return None


def note_taken(directory: Path, order: Order, step: int) -> bool:
    """Say that it happens now; False when the order was withdrawn, and nothing may happen.

    Written through to the disk: the process may not live much longer.
    """
    return _decide(directory, order.number, {"at": time.monotonic(), "step": step, "pid": os.getpid()})


def taken(directory: Path, number: int) -> Taken | None:
    """When an order was carried out; None while it was not."""
    with contextlib.suppress(FileNotFoundError):
        found = json.loads(_decision(directory, number).read_text())
        return Taken(found["at"], found["step"]) if "at" in found else None
    return None


def withdraw(directory: Path, group: int, rank: int, number: int) -> bool:
    """Take an order back, also one that the rank has read and waits to carry out; False when the rank was faster."""
    _path(directory, group, rank).unlink(missing_ok=True)
    return _decide(directory, number, {"withdrawn": True})


def _decide(directory: Path, number: int, document: dict[str, Any]) -> bool:
    """What becomes of an order is said by whoever is first, the rank or the drill; whether this was the first."""
    written = directory / f".decided-{number}-{os.getpid()}.json"
    write_json(written, document)
    try:
        os.link(written, _decision(directory, number))  # there whole or not at all, and only once
    except FileExistsError:
        return False
    finally:
        written.unlink()
    return True


def _decision(directory: Path, number: int) -> Path:
    return directory / f"taken-{number}.json"


def _path(directory: Path, group: int, rank: int) -> Path:
    return directory / f"order-{group}-{rank}.json"
