"""Rows of published runs: what a prediction may see of a row, and its outcome apart."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass
from pathlib import Path

from crosschip.errors import RecipeError

__all__ = ["OUTCOMES", "QUANTITIES", "SHIPPED_ROWS", "Outcome", "Row", "read_rows"]

SHIPPED_ROWS = Path(__file__).parent.parent / "data" / "published_runs.csv"

# Columns that hold results. A `Row` has none of them; `Outcome` holds the one that its row names.
OUTCOMES = (
    "chip_hours",
    "wall_days",
    "tok_s_per_chip",
    "tflops_per_chip_reported",
    "mfu_pct_reported",
    "effective_time_or_goodput_pct",
    "step_time_s",
)
QUANTITIES = (
    "chip_hours",
    "wall_days",
    "tok_s_per_chip",
    "tflops_per_chip_reported",
    "mfu_pct_reported",
    "step_time_s",
)
_MOST_COUNT = 100_000_000  # of chips, and of tokens in a sequence
_NEEDED = ("id", "quantity", "model", "chip")


@dataclass(frozen=True)
class Row:
    """What is known of a run before it is run. Numbers that the file lacks are None."""

    id: str
    kind: str
    is_calibration: bool
    quantity: str
    model: str
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


@dataclass(frozen=True)
class Outcome:
    """The published value of a row's quantity; None where the cell is empty."""

    value: float | None


def _number(cell: str, name: str, where: str) -> float | None:
    text = cell.strip().replace(",", "").replace("_", "")
    if not text:
        return None
    if between := re.fullmatch(r"([\d.]+)\s*[-–]\s*([\d.]+)", text):  # a published range counts by its middle
        return (float(between.group(1)) + float(between.group(2))) / 2
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value <= 0:
        raise RecipeError(f"{where}: {name} = {cell!r} is not a positive number", "mend the cell, or leave it empty")
    return value


def _whole(cell: str, name: str, where: str) -> int | None:
    value = _number(cell, name, where)
    if value is None:
        return None
    if value != round(value) or value > _MOST_COUNT:
        raise RecipeError(
            f"{where}: {name} = {cell!r} is no whole number up to {_MOST_COUNT:,}", "mend the cell, or leave it empty"
        )
    return round(value)


def _word(cell: str, name: str, where: str, words: tuple[str, ...]) -> str:
    """One of these words, or nothing."""
    if cell.lower() not in ("", *words):
        raise RecipeError(
            f"{where}: {name} = {cell!r} is none of {', '.join(words)}", "mend the cell, or leave it empty"
        )
    return cell.lower()


def _size_of_batch(cell: str, where: str) -> str:
    """A batch as `_batch` of `cases` reads it: `1024 seqs`, `4M tokens`, a number."""
    found = re.fullmatch(r"~?\s*([\d.,]+)\s*[kKmM]?\s*(seq|tok|sample)?\w*", cell)
    if cell and (found is None or not found.group(1).strip(".,")):
        raise RecipeError(
            f"{where}: global_batch = {cell!r} is no size of a batch",
            "write it as `1024 seqs` or `4M tokens`, or leave it empty",
        )
    if found is not None:
        _number(found.group(1), "global_batch", where)
    return cell


def _row(cells: dict[str, str], where: str) -> tuple[Row, Outcome]:
    def number(name: str, scale: float = 1.0) -> float | None:
        value = _number(cells.get(name, ""), name, where)
        return None if value is None else value * scale

    def text(name: str) -> str:
        return cells.get(name, "").strip()

    if not text("id"):
        raise RecipeError(f"{where}: id is empty", "give each row its own id")
    quantity = text("quantity")
    total, active = number("params_total_b", 1e9), number("params_active_b", 1e9)
    if total is not None and active is not None and active > total:
        raise RecipeError(
            f"{where}: params_active_b = {text('params_active_b')!r} is more than params_total_b = "
            f"{text('params_total_b')!r}",
            "mend the two cells",
        )
    row = Row(
        id=text("id"),
        kind=text("kind"),
        is_calibration=_word(text("calibration"), "calibration", where, ("yes", "no")) == "yes",
        quantity=quantity,
        model=text("model"),
        is_moe=_word(text("arch"), "arch", where, ("dense", "moe")) == "moe",
        params_total=total,
        params_active=active,
        tokens=number("tokens_t", 1e12),
        chip=text("chip"),
        num_chips=_whole(text("n_chips"), "n_chips", where),
        precision=text("precision").lower(),
        seq_len=_whole(text("seq_len"), "seq_len", where),
        global_batch=_size_of_batch(text("global_batch"), where),
        parallelism=text("parallelism"),
        convention=text("mfu_convention").lower(),
        source=text("source"),
        balanced="balanced routing" in text("notes").lower(),
        without_stops="ideal continuous time" in text("notes").lower(),
    )
    return row, Outcome(number(quantity) if quantity in QUANTITIES else None)


def read_rows(path: Path = SHIPPED_ROWS) -> list[tuple[Row, Outcome]]:
    """Every row with its outcome.

    Raises:
        RecipeError: no such file, no CSV, a column that is missing, a number that is none; names line and cell.
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
        found.append(_row(cells, f"{path}, line {line}"))
    twice = {row.id for row, _ in found if sum(other.id == row.id for other, _ in found) > 1}
    if twice:
        raise RecipeError(f"{path} has the id {sorted(twice)[0]!r} twice", "give each row its own id")
    return found
