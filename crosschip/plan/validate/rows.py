"""Rows of published runs: what a prediction may see of a row, and its outcome apart."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from crosschip.errors import RecipeError
from crosschip.plan.validate.numbers import Odd, OutOfBounds, number, percentage, reading, whole

__all__ = ["OUTCOMES", "SHIPPED_ROWS", "TIME_SHARE", "Outcome", "Row", "read_rows"]

SHIPPED_ROWS = Path(__file__).parent.parent / "data" / "published_runs.csv"

TIME_SHARE = "effective_time_or_goodput_pct"
# Columns that hold results. A `Row` has none of them; `Outcome` holds the one that its row names as its quantity.
OUTCOMES = (
    "chip_hours",
    "wall_days",
    "tok_s_per_chip",
    "tflops_per_chip_reported",
    "mfu_pct_reported",
    TIME_SHARE,
    "step_time_s",
)
_ROUNDED = 1.02  # active over all parameters that are the same but for rounding, at most
_IS_MIXTURE = 0.95  # active over all parameters, below which a token does not meet them all
_T = TypeVar("_T")
_ARCHITECTURES = {"dense": r"\bdense\b", "moe": r"(?<!non-)(?<!non )\bmoe\b|mixture|\bsparse\b"}
_NEEDED = ("id", "quantity", "model", "chip")


@dataclass(frozen=True)
class Row:
    """What is known of a run before it is run. Numbers that the file lacks are None."""

    id: str
    kind: str
    is_calibration: bool
    quantity: str
    model: str
    arch: str  # `dense`, `moe`, or nothing where the row does not say
    is_moe: bool
    params_total: float | None
    params_active: float | None
    tokens: float | None
    chip: str
    num_chips: int | None
    precision: str
    seq_len: int | None
    global_batch: str
    parallelism: str
    convention: str  # how its operations are counted, for a reported utilisation
    source: str
    balanced: bool
    without_stops: bool  # its hours are what the run would have taken without a stop
    readings: tuple[str, ...] = ()  # cells that are no plain number, each with what it is read as
    faults: tuple[tuple[str, str], ...] = ()  # cells that cannot be read, each with the remedy: no prediction


@dataclass(frozen=True)
class Outcome:
    """The published value of a row's quantity; None where the cell is empty, or no number, which `note` says."""

    value: float | None
    note: str = ""


def _word(cell: str, name: str, words: tuple[str, ...]) -> str:
    """One of these words, or nothing."""
    if cell.lower() not in ("", *words):
        raise Odd(f"{name} = {cell!r} is none of {', '.join(words)}")
    return cell.lower()


class _Cells:
    """A line's cells, stripped; `faults` collects those that cannot be read, and they count as empty. `readings` says
    what is read of numbers that are not plain."""

    def __init__(self, cells: dict[str, str]) -> None:
        self._cells = cells
        self.faults: list[tuple[str, str]] = []
        self.readings: list[str] = []

    def text(self, name: str) -> str:
        return self._cells.get(name, "").strip()

    def _read(self, read: Callable[[], _T]) -> _T | None:
        try:
            return read()
        except Odd as odd:
            self.faults.append(odd.told)
            return None

    def _said(self, name: str, value: float | None) -> None:
        if said := reading(self.text(name), name, value):
            self.readings.append(said)

    def number(self, name: str, scale: float) -> float | None:
        value = self._read(lambda: number(self.text(name), name))
        self._said(name, value)
        return None if value is None else value * scale

    def whole(self, name: str) -> int | None:
        value = self._read(lambda: whole(self.text(name), name))
        self._said(name, value)
        return value

    def word(self, name: str, *words: str) -> str:
        return self._read(lambda: _word(self.text(name), name, words)) or ""


def _parameters(cells: _Cells) -> tuple[float | None, float | None]:
    """All and active ones; of two that agree but for rounding, the active ones are all."""
    total, active = cells.number("params_total_b", 1e9), cells.number("params_active_b", 1e9)
    if total is None or active is None:
        return total, active
    if active > _ROUNDED * total:
        told = [f"{name} = {cells.text(name)!r}" for name in ("params_active_b", "params_total_b")]
        cells.faults.append((" is more than ".join(told), "mend the two cells"))
    return total, min(active, total)


def _outcome(cells: _Cells, quantity: str) -> Outcome:
    """An outcome that is no number is none, whether or not its row is predicted; one that is none a run can have makes
    the row faulty: its error would be no number.
    """
    if quantity not in OUTCOMES:
        return Outcome(None)
    cell = cells.text(quantity)
    try:
        value = (percentage if quantity == TIME_SHARE else number)(cell, quantity)
        return Outcome(value, reading(cell, quantity, value))
    except OutOfBounds as odd:
        cells.faults.append(odd.told)
        return Outcome(None)
    except Odd as odd:
        return Outcome(None, f"{odd}: taken as not published")


def _arch(cells: _Cells) -> str:
    """`dense`, `moe` or nothing; of other words (`fine-grained MoE`) the one of the two that they name."""
    cell = cells.text("arch")
    named = [word for word, known in _ARCHITECTURES.items() if re.search(known, cell, re.I)]
    if len(named) != 1 or cell.lower() == named[0]:
        return cells.word("arch", "dense", "moe")
    cells.readings.append(f"arch = {cell!r} is read as {named[0]}")
    return named[0]


def _is_mixture(cells: _Cells, arch: str, total: float | None, active: float | None) -> bool:
    """Whether the row is of a mixture of experts: as it says, else by its active parameters."""
    by_size = total is not None and active is not None and active < _IS_MIXTURE * total
    if arch == "dense" and by_size:
        cells.faults.append(
            (
                f"arch = 'dense' with params_active_b = {cells.text('params_active_b')!r} of params_total_b = "
                f"{cells.text('params_total_b')!r}",
                "mend one of the three cells: a dense model uses all of its parameters for every token",
            )
        )
    return arch == "moe" or by_size


def _is_for_calibration(cells: _Cells, quantity: str) -> bool:
    is_marked = cells.word("calibration", "yes", "no") == "yes"
    if is_marked and quantity == TIME_SHARE:
        cells.readings.append("calibration = 'yes' of a share of time: nothing is fitted on it")
        return False
    return is_marked


def _row(line: int, raw: dict[str, str]) -> tuple[Row, Outcome]:
    cells = _Cells(raw)
    text = cells.text
    if not text("id"):
        cells.faults.append(("id is empty", "give each row its own id"))
    total, active = _parameters(cells)
    arch, quantity = _arch(cells), text("quantity")
    is_moe, outcome = _is_mixture(cells, arch, total, active), _outcome(cells, quantity)
    row = Row(
        id=text("id") or f"line {line}",
        kind=text("kind"),
        is_calibration=_is_for_calibration(cells, quantity),
        quantity=quantity,
        model=text("model"),
        arch=arch,
        is_moe=is_moe,
        params_total=total,
        params_active=active,
        tokens=cells.number("tokens_t", 1e12),
        chip=text("chip"),
        num_chips=cells.whole("n_chips"),
        precision=text("precision").lower(),
        seq_len=cells.whole("seq_len"),
        global_batch=text("global_batch"),
        parallelism=text("parallelism"),
        convention=text("mfu_convention").lower(),
        source=text("source"),
        balanced="balanced routing" in text("notes").lower(),
        without_stops="ideal continuous time" in text("notes").lower(),
        readings=tuple(cells.readings),
        faults=tuple(cells.faults),
    )
    return row, outcome


def read_rows(path: Path = SHIPPED_ROWS) -> list[tuple[Row, Outcome]]:
    """Every row with its outcome. A row with a cell that cannot be read has it among its `faults`.

    Raises:
        RecipeError: no such file, no CSV, no row, a column that is missing, a line of another length, an id twice.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            names = reader.fieldnames or []
            lines = [(reader.line_num, cells) for cells in reader]
    except (FileNotFoundError, IsADirectoryError):
        raise RecipeError(
            f"no file of rows at {path}", "give a CSV file with the columns of published_runs.csv"
        ) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise RecipeError(f"{path} is no CSV in UTF-8: {error}", "save it as CSV again") from None
    missing = [name for name in _NEEDED if name not in names]
    if missing:
        raise RecipeError(f"{path} lacks the columns {', '.join(missing)}", "take the header of published_runs.csv")
    if not lines:
        raise RecipeError(f"{path} has a header and no row", "give a row for each run")
    found = []
    for line, cells in lines:
        if None in cells or None in cells.values():
            raise RecipeError(f"{path}, line {line} has another number of cells than the header", "mend that line")
        found.append(_row(line, cells))
    twice = {row.id for row, _ in found if sum(other.id == row.id for other, _ in found) > 1}
    if twice:
        raise RecipeError(f"{path} has the id {sorted(twice)[0]!r} twice", "give each row its own id")
    return found
