"""Drawings of what exams measured: ratios with their confidence, a heat map, curves over an axis. Pure: numbers to SVG.

Colours are the page's own variables (see `plots`), and no meaning rests on colour alone: what fails has another shape
of mark, a cell of the heat map has its number written in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from crosschip.report.plots import GRID, INK, LINE, MARK, paint_svg

__all__ = ["Line", "Ratio", "draw_heat_map", "draw_lines", "draw_ratios"]

_ROW_IN = 0.21
_LABEL_CHARACTERS = 34


@dataclass(frozen=True)
class Ratio:
    """An error ratio with the bounds of its confidence interval."""

    label: str
    ratio: float
    lower: float
    upper: float
    failed: bool


@dataclass(frozen=True)
class Line:
    """One line of a drawing: `solid`, `dashed`, or `dots` without a line."""

    x: Sequence[float]
    y: Sequence[float]
    style: str = "solid"
    second_colour: bool = False


def draw_ratios(name: str, title: str, description: str, ratios: Sequence[Ratio], limit: float) -> str:
    """Dots with bars on a logarithmic axis, one row each; a dashed line at the limit, crosses for what failed."""

    def paint(axes: Any) -> None:
        _bare(axes, grid="x")
        axes.set_xscale("log")
        _plain_logarithms(axes.xaxis)
        rows = range(len(ratios) - 1, -1, -1)
        for row, each in zip(rows, ratios, strict=True):
            colour = MARK if each.failed else LINE
            axes.plot([each.lower, each.upper], [row, row], color=colour, linewidth=1.6)
            axes.plot([each.ratio], [row], color=colour, marker="X" if each.failed else "o", markersize=5, linestyle="")
        axes.axvline(limit, color=MARK, linewidth=1.2, linestyle="--")
        axes.set_yticks(list(rows), [_cut(each.label) for each in ratios])
        axes.set_ylim(-0.7, len(ratios) - 0.3)
        axes.tick_params(axis="y", labelsize=8.5)
        axes.set_xlabel("error ratio", color=INK, loc="right", labelpad=1)

    height_in = 0.62 + _ROW_IN * len(ratios)
    return paint_svg(name, title, description, paint, height_in=height_in, math_text=False)


def draw_heat_map(
    name: str,
    title: str,
    description: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    limit: float,
) -> str:
    """Cells whose shade grows with the value and reaches the mark's colour at `limit`, the number in each."""

    def paint(axes: Any) -> None:
        _bare(axes, grid=None)
        axes.spines["bottom"].set_visible(False)
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                if value is None:
                    continue
                beyond = value > limit
                shade = min(1.0, max(0.08, value / limit)) * 0.38
                colour = MARK if beyond else LINE
                axes.fill_between([column - 0.48, column + 0.48], row - 0.46, row + 0.46, color=colour, alpha=shade,
                                  linewidth=0)  # fmt: skip
                text = f"{value:.2g}" + ("!" if beyond else "")
                axes.text(column, row, text, ha="center", va="center", fontsize=9, color=INK)
        axes.set_xticks(range(len(columns)), list(columns))
        axes.set_yticks(range(len(rows)), [_cut(each) for each in rows])
        axes.tick_params(axis="both", labelsize=8.5)
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)

    return paint_svg(name, title, description, paint, height_in=0.5 + 0.36 * len(rows), math_text=False)


def draw_lines(
    name: str,
    title: str,
    description: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    log_x: bool = False,
    log_y: bool = False,
    level: float | None = None,
) -> str:
    """Lines over an axis; `level` is a dashed horizontal line."""

    def paint(axes: Any) -> None:
        from matplotlib.ticker import EngFormatter, MaxNLocator

        _bare(axes, grid="y")
        for line in lines:
            marker = "o" if line.style == "dots" or len(line.x) == 1 else None
            drawn = {"solid": "-", "dashed": "--", "dots": ""}[line.style]
            colour = MARK if line.second_colour else LINE
            axes.plot(line.x, line.y, color=colour, linewidth=1.6, linestyle=drawn, marker=marker, markersize=4)
        if level is not None:
            axes.axhline(level, color=INK, linewidth=1, linestyle=":")
        for axis, scale, is_log in ((axes.xaxis, axes.set_xscale, log_x), (axes.yaxis, axes.set_yscale, log_y)):
            if is_log:
                scale("log")
                _plain_logarithms(axis)
            else:
                axis.set_major_locator(MaxNLocator(nbins=5, integer=axis is axes.xaxis))
        largest = max((abs(value) for line in lines for value in line.y), default=0.0)
        if not log_y and (largest >= 1e4 or 0 < largest < 0.01):
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel(_cut(x_label), color=INK, loc="right", labelpad=1)

    return paint_svg(name, title, description, paint, math_text=False)


def _bare(axes: Any, grid: str | None) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    if grid is not None:
        axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)


def _plain_logarithms(axis: Any) -> None:
    """`0.5`, `1`, `10k`: powers of ten as people say them, no formulas."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    low, high = axis.get_view_interval()
    wide = low > 0 and high > 0 and math.log10(high / low) > 2
    axis.set_major_locator(LogLocator(base=10, subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=7))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _prefixed(value)))
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(NullLocator())


def _prefixed(value: float) -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:g}{prefix}"
    return f"{value:g}"


def _cut(label: str) -> str:
    label = "".join(each if each.isprintable() else "·" for each in label)
    return label if len(label) <= _LABEL_CHARACTERS else f"{label[: _LABEL_CHARACTERS - 1]}…"
