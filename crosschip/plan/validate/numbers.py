"""Numbers of a row in the spellings of papers: `~6000 NPUs`, `>90 %`, `2048-16384`, `8K`, `718B`, `2.38M GPU hours`."""

from __future__ import annotations

import math
import re

__all__ = ["MOST_COUNT", "Odd", "OutOfBounds", "number", "percentage", "reading", "whole"]

MOST_COUNT = 100_000_000  # of chips, and of tokens in a sequence
# Between these a number is taken for one: no run is as small or as large, and products of them stay finite.
_LEAST_NUMBER, _MOST_NUMBER = 1e-6, 1e12
_ABOUT = re.compile(
    r"^(?:[~≈]|about|around|approx(?:imately|\.)?|circa|ca\.?|[<>]=?|[≤≥]|(?:more|less|fewer) than|at (?:least|most)"
    r"|over|under|up to)\s*(?=[\d.])|(?<=\d)\+$",
    re.I,
)
_BETWEEN = r"\s*(?:[-–]|to)\s*"
_RANGE = re.compile(rf"([\d.]+){_BETWEEN}([\d.]+)")
_PLAIN = re.compile(r"[\d.,_]+(?:e[+-]?\d+)?", re.I)
_PRODUCT = re.compile(r"(\d[\d,]*)\s*(?:nodes?|hosts?|servers?)?\s*[x×*]\s*(\d+)\s*(?:[gnt]pus?|chips?)?", re.I)
_RAMP = re.compile(r"\s*(?:->|=>|→|\bthen\b)")
# Beside a share of time: `83-96 compute utilisation`, `97 (Gemini 1.0)`; `to` stands between two numbers.
_WORDS = re.compile(r"\([^)]*\)|\b(?!to\b)[a-z][a-z-]*(?![\w.])", re.I)
_BINARY = {"k": 1024.0, "m": 1024.0 * 1024.0}  # as in a batch: `8K` tokens of a sequence
_DECIMAL = {"k": 1e3, "thousand": 1e3, "m": 1e6, "million": 1e6, "b": 1e9, "billion": 1e9, "t": 1e12, "trillion": 1e12}
# The unit of a column, and what may stand for it behind a number.
_UNITS: dict[str, tuple[float, str]] = {
    "params_total_b": (1e9, r"(?:active |total )?param(?:eter)?s?"),
    "params_active_b": (1e9, r"(?:active )?param(?:eter)?s?"),
    "tokens_t": (1e12, r"tok(?:en)?s?"),
    "n_chips": (1.0, r"(?:gpu|npu|tpu|chip|card|device|accelerator)s?"),
    "seq_len": (1.0, r"tok(?:en)?s?"),
    "chip_hours": (1.0, r"(?:\b[a-z]\w*[ -]){0,2}(?:h|hrs?|hours?)"),
    "wall_days": (1.0, r"d|days?"),
    "tok_s_per_chip": (1.0, r"tok(?:en)?s?\s*/\s*s(?:ec)?(?:\s*/\s*\w+)?"),
    "tflops_per_chip_reported": (1.0, r"tf(?:lop)?s?(?:\s*/\s*s)?(?:\s*/\s*\w+)?"),
    "mfu_pct_reported": (1.0, r"%?\s*(?:mfu)?"),
    "step_time_s": (1.0, r"s|sec(?:ond)?s?"),
}
_BINARY_COLUMNS = ("n_chips", "seq_len")


class Odd(Exception):
    """A cell that cannot be read: the problem and its remedy."""

    def __init__(self, problem: str, remedy: str = "mend the cell, or leave it empty") -> None:
        super().__init__(problem)
        self.told = (problem, remedy)


class OutOfBounds(Odd):
    """A number that no run can have."""


def _letters(name: str) -> dict[str, float]:
    """Factors of letters and words in the column's unit; its own one is 1, so that `718B` in billions is 718."""
    if name in _BINARY_COLUMNS:
        return _BINARY
    scale, _ = _UNITS.get(name, (1.0, ""))
    return {letter: factor / scale for letter, factor in _DECIMAL.items()}


def _plain(cell: str, name: str) -> str:
    """The cell without words of its unit, and its letters as numbers: `2-3M hours` is `2000000.0-3000000.0`."""
    text = cell.strip()
    if name == "seq_len":  # most of a run is at its first length
        text = _RAMP.split(text)[0]
    if name == "n_chips" and (product := _PRODUCT.fullmatch(text)):
        return repr(float(product[1].replace(",", "")) * float(product[2]))
    if name in _UNITS:
        text = re.sub(rf"(?<=[\da-z%])\s*(?:{_UNITS[name][1]})$", "", text, flags=re.I) if text else text
    letters = _letters(name)
    any_letter = rf"({'|'.join(sorted(letters, key=len, reverse=True))})\b"
    both = rf"(?<![\w.])(\d+(?:\.\d+)?)(?={_BETWEEN}\d+(?:\.\d+)?\s*{any_letter})"
    text = re.sub(both, r"\1\2", text, flags=re.I)
    return re.sub(
        rf"(?<![\w.])(\d[\d,]*(?:\.\d+)?)\s*{any_letter}",
        lambda found: repr(float(found[1].replace(",", "")) * letters[found[2].lower()]),
        text,
        flags=re.I,
    )


def _value(text: str) -> float | None:
    """The number that a text says, nan where it says none, None where it is empty; of a range its middle."""
    text = _ABOUT.sub("", text.strip()).replace(",", "").replace("_", "")
    if not text:
        return None
    try:
        if between := _RANGE.fullmatch(text):
            return (float(between.group(1)) + float(between.group(2))) / 2
        return float(text)
    except ValueError:
        return math.nan


def _checked(value: float | None, cell: str, name: str) -> float | None:
    if value is None:
        return None
    if not math.isfinite(value) or value <= 0:
        raise Odd(f"{name} = {cell!r} is not a positive number")
    if not _LEAST_NUMBER <= value <= _MOST_NUMBER:
        raise OutOfBounds(f"{name} = {cell!r} is not between {_LEAST_NUMBER:g} and {_MOST_NUMBER:g}")
    return value


def number(cell: str, name: str) -> float | None:
    """The number of a cell in the unit of its column; None of an empty one.

    Raises:
        Odd: it is no positive number.
        OutOfBounds: it is one that no run can have.
    """
    return _checked(_value(_plain(cell, name)), cell, name)


def whole(cell: str, name: str) -> int | None:
    """The same of what is counted: chips, and tokens of a sequence.

    Raises:
        Odd: it is no positive number, or no whole one.
        OutOfBounds: it is one that no run can have.
    """
    value = number(cell, name)
    if value is None:
        return None
    if value != round(value) or value > MOST_COUNT:
        raise Odd(f"{name} = {cell!r} is no whole number up to {MOST_COUNT:,}")
    return round(value)


def percentage(cell: str, name: str) -> float | None:
    """A share of time in percent, whatever words stand beside it; up to 1 it is a part of one.

    Raises:
        Odd: it is no positive number, or more than 100 %.
        OutOfBounds: it is one that no run can have.
    """
    value = _checked(_value(_WORDS.sub(" ", cell.replace("%", ""))), cell, name)
    if value is not None and value > 100.0:
        raise Odd(f"{name} = {cell!r} is more than 100 %")
    return value if value is None or value > 1.0 else 100.0 * value


def reading(cell: str, name: str, value: float | None) -> str:
    """What a number that is not plain is read as; nothing of a plain one."""
    if value is None or (_PLAIN.fullmatch(cell) and _value(cell) == value):
        return ""
    is_range = _RANGE.search(_plain(cell.replace("%", ""), name)) is not None
    return f"{name} = {cell!r} is read as {value:,.10g}{', the middle of its range' if is_range else ''}"
