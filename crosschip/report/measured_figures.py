"""Measured entries of a qualification as figures; what no drawing is known for stays for a table.

An exam says `journal.measured(...)`. Known entries, by their keys:

- `operator`, `ratio`, `lower`, `upper`: an error ratio with its 95 % interval (exam `operators`, one row an operator);
  with `case` beside it, a cell of the attention ladder (`queries=`, `keys=`, `mask_kind=`, `causal=` are read from it).
- `kind="loss curve"`, `seed`, `steps`, `chip`, `reference`, `control` (optional): lists of one length.
- `kind="gradient norm ratio"`, `seed`, `steps`, `chip`.
- `plot="bandwidth"`, `collective`, `sizes_bytes`, `seconds`, and the fit `seconds = latency_s + bytes /
  bandwidth`: `latency_s`, `bandwidth_gb_s`; optional `num_ranks`.
- `plot="series"`, `title`, `unit`, `x_unit`, `x`, `y`; optional `slope` (units of y for a unit of x) and `intercept`
  of a fitted line, optional `limit` (a level of y).
- any value that is a list of `[seconds, value]` pairs: drawn over time; the unit is read from the key's or `what`'s
  end (`clock_mhz`), bytes for `check="memory"`, whose `bytes_per_hour` is the fitted slope.

A new drawing is one function in `DRAWINGS` that takes the entries it knows and returns figures. An entry that has the
keys and not the numbers is left for the table, with a note.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from crosschip.report.documents import Document, is_number
from crosschip.report.figures import bytes_text
from crosschip.report.measured_drawings import Line, Ratio, draw_heat_map, draw_lines, draw_ratios
from crosschip.report.stages import Figure

__all__ = ["MeasuredFigures", "measured_figures"]

RATIO_LIMIT = 2.5  # the judge's
_MOST_ROWS = 30
_MOST_FIGURES = 12  # of one kind
_MARK = "key key-mark"


@dataclass
class MeasuredFigures:
    """Figures, the entries that were not drawn, and notes on those that could not be."""

    figures: list[Figure] = field(default_factory=list)
    rest: list[tuple[str, Document]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


Entries = list[tuple[str, Document]]
Drawing = Callable[[Entries, str], Figure]  # entries, a name for the SVG that is unique in the page


def measured_figures(entries: Entries) -> MeasuredFigures:
    """Draw every entry for which a drawing is known."""
    found = MeasuredFigures()
    drawn: set[int] = set()
    over_time = [(exam, made) for exam, entry in entries for made in _over_time(entry)]
    for row in DRAWINGS:
        mine = [entry for entry in [*entries, *over_time] if row.knows(entry[1])]
        whole = [entry for entry in mine if row.is_whole(entry[1])]
        if len(whole) < len(mine):
            found.notes.append(f"{row.what}: {len(mine) - len(whole)} not drawn, because numbers are missing in them")
        groups = [whole] if row.at_once and whole else [[entry] for entry in whole]
        if len(groups) > _MOST_FIGURES:
            found.notes.append(f"{row.what}: the first {_MOST_FIGURES} of {len(groups)} are drawn; the report has all")
        name = re.sub(r"\W+", "-", row.what)
        found.figures += [row.draw(group, f"{name}-{place}") for place, group in enumerate(groups[:_MOST_FIGURES])]
        drawn |= set() if row.at_once else {id(entry) for _, entry in whole}
    found.rest = [pair for pair in entries if id(pair[1]) not in drawn]
    return found


def _numbers(*lists: Any) -> bool:
    """Whether these are lists of one length, not empty, of finite numbers."""
    return (
        all(isinstance(each, list) and each and all(map(is_number, each)) for each in lists)
        and len({len(each) for each in lists}) == 1
    )


def _ends(what: str, x: Sequence[float], y: Sequence[float], x_unit: str) -> str:
    return f"{what}: from {y[0]:.4g} at {x[0]:g} {x_unit} to {y[-1]:.4g} at {x[-1]:g} {x_unit}, highest {max(y):.4g}."


def _is_ratio(entry: Document) -> bool:
    return "ratio" in entry and "upper" in entry and "operator" in entry and "case" not in entry


def _is_attention(entry: Document) -> bool:
    return "ratio" in entry and "operator" in entry and "case" in entry


def _ratio_whole(entry: Document) -> bool:
    bounds = [entry.get(key) for key in ("ratio", "lower", "upper")]
    return all(is_number(each) and each > 0 for each in bounds)


def _ratio_figure(entries: Entries, name: str) -> Figure:
    """The worst call of each operator, the worst operator first."""
    worst: dict[str, Document] = {}
    for _, entry in entries:
        operator = str(entry["operator"])
        if operator not in worst or entry["ratio"] > worst[operator]["ratio"]:
            worst[operator] = entry
    ranked = sorted(worst.items(), key=lambda item: (item[1].get("verdict") != "fail", -item[1]["ratio"]))
    ratios = [
        Ratio(
            operator.removeprefix("aten.").removesuffix(".default"),
            entry["ratio"],
            entry["lower"],
            entry["upper"],
            entry.get("verdict") == "fail",
        )
        for operator, entry in ranked[:_MOST_ROWS]
    ]
    more = f"; the {_MOST_ROWS} largest of {len(ranked)} operators" if len(ranked) > _MOST_ROWS else ""
    title = f"Error of each operator over the worst honest implementation's{more}"
    described = "; ".join(f"{each.label} {each.ratio:.3g} ({each.lower:.3g} to {each.upper:.3g})" for each in ratios)
    svg = draw_ratios(name, title, f"{described}. Limit {RATIO_LIMIT}.", ratios, RATIO_LIMIT)
    return Figure(title, svg, [("", "the worst call of each, with its 95 % interval"), (_MARK, f"limit {RATIO_LIMIT}")])


def _attention_figure(entries: Entries, name: str) -> Figure:
    cells: dict[tuple[str, tuple[int, int]], float] = {}
    for _, entry in entries:
        words = dict(re.findall(r"(\w+)=(\S+)", str(entry["case"])))
        form = "causal" if words.get("causal") == "True" else f"{words.get('mask_kind', 'no')} mask"
        operator = str(entry["operator"]).replace("scaled_dot_product_attention", "sdpa")
        operator = operator.replace("attention from products and softmax", "products, softmax")
        lengths = _length(words.get("keys")), _length(words.get("queries"))
        key = f"{operator}, {form}", lengths
        cells[key] = max(cells.get(key, 0.0), entry["ratio"])
    rows = list(dict.fromkeys(row for row, _ in cells))
    columns = sorted({lengths for _, lengths in cells})
    values = [[cells.get((row, column)) for column in columns] for row in rows]
    title = "Attention: error ratio by form and length"
    described = "; ".join(f"{row}, {q} queries, {k} keys: {ratio:.3g}" for (row, (k, q)), ratio in cells.items())
    heads = [f"{queries}×{keys}" for keys, queries in columns]
    svg = draw_heat_map(name, title, described, rows, heads, values, RATIO_LIMIT)
    return Figure(title, svg, [("", "queries × keys; the worst head size of each"), (_MARK, f"above {RATIO_LIMIT} !")])


def _length(text: str | None) -> int:
    return int(text) if text is not None and re.fullmatch(r"\d{1,9}", text) else 0


def _loss_whole(entry: Document) -> bool:
    lists = [entry.get("steps"), entry.get("chip"), entry.get("reference")]
    return _numbers(*lists, *([entry["control"]] if "control" in entry else []))


def _loss_figure(entries: Entries, name: str) -> Figure:
    entry, seed = entries[0][1], str(entries[0][1].get("seed", "?"))
    steps = entry["steps"]
    lines = [Line(steps, entry["chip"]), Line(steps, entry["reference"], "dashed", second_colour=True)]
    keys = [("key key-line", "chip"), (_MARK, "CPU in fp32")]
    if "control" in entry:
        lines.append(Line(steps, entry["control"], "dots", second_colour=True))
        keys.append(("", "dots: CPU in the chip's dtype"))
    title = f"Loss of the rehearsal, seed {seed}"
    described = _ends("Chip", steps, entry["chip"], "steps") + " " + _ends("CPU", steps, entry["reference"], "steps")
    return Figure(title, draw_lines(name, title, described, lines, x_label="step"), keys)


def _norm_figure(entries: Entries, name: str) -> Figure:
    entry, seed = entries[0][1], str(entries[0][1].get("seed", "?"))
    title = f"Gradient norm, chip over CPU, seed {seed}"
    described = _ends("Ratio", entry["steps"], entry["chip"], "steps")
    lines = [Line(entry["steps"], entry["chip"])]
    svg = draw_lines(name, title, described, lines, x_label="step", level=1.0)
    return Figure(title, svg, [("", "1 is the same")])


def _bandwidth_whole(entry: Document) -> bool:
    sizes, seconds = entry.get("sizes_bytes", []), entry.get("seconds", [])
    return _numbers(sizes, seconds) and min(sizes) > 0 and min(seconds) > 0


def _bandwidth_figure(entries: Entries, name: str) -> Figure:
    entry = entries[0][1]
    sizes = entry["sizes_bytes"]
    achieved = [size / seconds / 1e9 for size, seconds in zip(sizes, entry["seconds"], strict=True)]
    lines = [Line(sizes, achieved, "dots")]
    keys = [("", "dots: measured, GB/s")]
    latency_s, top_gb_s = entry.get("latency_s"), entry.get("bandwidth_gb_s")
    if is_number(latency_s) and is_number(top_gb_s) and latency_s >= 0 and top_gb_s > 0:
        low, high = math.log10(min(sizes)), math.log10(max(sizes))
        at = [10 ** (low + (high - low) * place / 40) for place in range(41)]
        fit = [size / (latency_s + size / (top_gb_s * 1e9)) / 1e9 for size in at]
        lines.append(Line(at, fit, "dashed", second_colour=True))
        keys.append((_MARK, f"fit: {latency_s * 1e6:.3g} µs + bytes / {top_gb_s:.3g} GB/s"))
    ranks = f", {entry['num_ranks']} ranks" if "num_ranks" in entry else ""
    title = f"{entry.get('collective', '?')}{ranks}: bandwidth by size"
    first, last = (f"{achieved[end]:.3g} GB/s at {bytes_text(int(sizes[end]))}" for end in (0, -1))
    described = f"{first}, {last}."
    svg = draw_lines(name, title, described, lines, x_label="bytes", log_x=True, log_y=True)
    return Figure(title, svg, keys)


def _series_figure(entries: Entries, name: str) -> Figure:
    entry = entries[0][1]
    x, y, unit, x_unit = entry["x"], entry["y"], str(entry.get("unit", "")), str(entry.get("x_unit", ""))
    title = str(entry.get("title", "series"))
    lines, keys = [Line(x, y)], [("", unit)]
    slope, limit = entry.get("slope"), entry.get("limit")
    if is_number(slope):
        middle = sum(y) / len(y) - slope * sum(x) / len(x)
        start = entry["intercept"] if is_number(entry.get("intercept")) else middle
        ends = [min(x), max(x)]
        lines.append(Line(ends, [start + slope * each for each in ends], "dashed", second_colour=True))
        keys.append((_MARK, f"slope {slope:.3g} {unit} per {x_unit}"))
    if is_number(limit):
        keys.append(("", f"limit {limit:.4g}"))
    level = float(limit) if is_number(limit) else None
    svg = draw_lines(name, title, _ends(title, x, y, x_unit), lines, x_label=x_unit, level=level)
    return Figure(title, svg, keys)


def _over_time(entry: Document) -> list[Document]:
    """Series out of values that are lists of `[seconds, value]` pairs; a pair without its value is left out."""
    made = []
    for key, value in entry.items():
        is_pairs = (
            isinstance(value, list) and value and all(isinstance(each, list) and len(each) == 2 for each in value)
        )
        pairs = [each for each in value if _numbers(each)] if is_pairs else []
        if len(pairs) < 2:
            continue
        is_memory = entry.get("check") == "memory"
        scale, per_hour = (1e6, entry.get("bytes_per_hour")) if is_memory else (1.0, None)
        words = str(entry.get("what", key)) if key == "series" else key
        unit = "MB" if is_memory else words.rpartition("_")[2]
        series = {
            "plot": "series",
            "title": f"{entry.get('check', '')}: {words}".removeprefix(": "),
            "unit": unit,
            "x_unit": "s",
            "x": [each[0] for each in pairs],
            "y": [each[1] / scale for each in pairs],
        }
        made.append({**series, "slope": per_hour / scale / 3600} if is_number(per_hour) else series)
    return made


@dataclass(frozen=True)
class _Drawing:
    """Which entries it knows, whether one has its numbers; `at_once`: all in one figure, and in the table as well."""

    what: str
    knows: Callable[[Document], bool]
    is_whole: Callable[[Document], bool]
    draw: Drawing
    at_once: bool = False


def _is(key: str, value: str) -> Callable[[Document], bool]:
    return lambda entry: entry.get(key) == value


DRAWINGS = (
    _Drawing("error ratios", _is_ratio, _ratio_whole, _ratio_figure, at_once=True),
    _Drawing("attention", _is_attention, _ratio_whole, _attention_figure, at_once=True),
    _Drawing("loss curves", _is("kind", "loss curve"), _loss_whole, _loss_figure),
    _Drawing(
        "gradient norms",
        _is("kind", "gradient norm ratio"),
        lambda e: _numbers(e.get("steps"), e.get("chip")),
        _norm_figure,
    ),
    _Drawing("bandwidth", _is("plot", "bandwidth"), _bandwidth_whole, _bandwidth_figure),
    _Drawing("series", _is("plot", "series"), lambda e: _numbers(e.get("x"), e.get("y")), _series_figure),
)
