"""The plan's charts, from its document to SVG: the Gantt chart, the end date, what moves it, goodput against saving."""

from __future__ import annotations

from datetime import date, timedelta
from itertools import pairwise
from typing import Any

from crosschip.report.measured_drawings import Line, draw_lines
from crosschip.report.plots import GRID, INK, LINE, MARK, paint_svg

__all__ = ["draw_end_dates", "draw_gantt", "draw_goodput", "draw_tornado"]

_LABEL_CHARACTERS = 30
_ROW_IN = 0.3


def draw_gantt(dates: dict[str, Any]) -> str:
    """A bar for each stage from its P50 begin to its P50 end, a thin line on to the P90 end; blackouts are shaded."""
    stages, start = dates["stages"], date.fromisoformat(dates["start"])
    words = "; ".join(f"{each['name']} from {each['begin']['p50']} to {each['end']['p50']}" for each in stages)

    def paint(axes: Any) -> None:
        _bare(axes, "x")
        for window in dates["blackouts"]:
            first, last = ((date.fromisoformat(window[key]) - start).days for key in ("first", "last"))
            axes.axvspan(first, last + 1, color=GRID, alpha=0.7, linewidth=0)
        for row, each in enumerate(stages):
            begin, end = each["begin_days"][1], each["end_days"][1]
            axes.plot([end, each["end_days"][2]], [row, row], color=MARK, linewidth=1.6)
            axes.plot([each["end_days"][2]], [row], color=MARK, marker="|", markersize=9)
            axes.barh(row, max(end - begin, 1e-9), left=begin, height=0.55, color=LINE, linewidth=0)
        axes.set_yticks(range(len(stages)), [_cut(each["name"]) for each in stages])
        axes.set_ylim(len(stages) - 0.4, -0.6)
        axes.set_xlim(0, max(each["end_days"][2] for each in stages) * 1.03 or 1.0)
        _days_as_dates(axes, start)

    height_in = 0.55 + _ROW_IN * max(2, len(stages))
    return paint_svg("gantt", "Stages on the calendar", words, paint, height_in=height_in, math_text=False)


def draw_end_dates(dates: dict[str, Any]) -> str:
    """The distribution of the end date with P10, P50 and P90."""
    start, found, end = date.fromisoformat(dates["start"]), dates["end_histogram"], dates["end"]
    total = sum(found["counts"])

    def paint(axes: Any) -> None:
        _bare(axes, "y")
        edges = found["edges_days"]
        widths = [high - low for low, high in pairwise(edges)]
        shares = [100 * each / total for each in found["counts"]]
        axes.bar(edges[:-1], shares, width=widths, align="edge", color=LINE, linewidth=0)
        for name, style in (("p10", ":"), ("p50", "-"), ("p90", "--")):
            at = (date.fromisoformat(end[name]) - start).days + 0.5
            axes.axvline(at, color=MARK, linewidth=1.4, linestyle=style)
        axes.set_ylabel("% of trials", color=INK)
        _days_as_dates(axes, start)

    words = f"P10 {end['p10']}, P50 {end['p50']}, P90 {end['p90']} over {dates['num_trials']} trials"
    return paint_svg("end-dates", "When it ends", words, paint, math_text=False)


def draw_tornado(effects: list[dict[str, Any]]) -> str:
    """A bar for each change: the days that it moves the P50 of the end; words where some trials do not end."""

    def paint(axes: Any) -> None:
        _bare(axes, "x")
        for row, each in enumerate(effects):
            days = each["days_p50"]
            if days is None:
                axes.text(0, row, " does not end ", ha="left", va="center", fontsize=8.5, color=INK)
                continue
            axes.barh(row, days, height=0.6, color=MARK if days > 0 else LINE, linewidth=0)
            side = "left" if days >= 0 else "right"
            axes.text(days, row, f" {days:+.1f} ", ha=side, va="center", fontsize=8.5, color=INK)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(effects)), [_cut(each["change"]) for each in effects])
        axes.tick_params(axis="y", labelsize=8.5)
        axes.set_ylim(len(effects) - 0.4, -0.6)
        reach = max((abs(each["days_p50"] or 0.0) for each in effects), default=0.0) or 1.0
        axes.set_xlim(-1.45 * reach, 1.45 * reach)
        axes.set_xlabel("days later", color=INK, loc="right", labelpad=1)

    words = "; ".join(each["words"] for each in effects)
    height_in = 0.6 + 0.24 * max(2, len(effects))
    return paint_svg("tornado", "What moves the end", words, paint, height_in=height_in, math_text=False)


def draw_goodput(interval: dict[str, Any]) -> str:
    """Expected goodput against the interval of saving, with the chosen one as a dot."""
    curve = interval["curve"]
    chosen = interval["chosen_s"]
    nearest = min(curve, key=lambda point: abs(point[0] - chosen))
    lines = [
        Line([point[0] / 60 for point in curve], [100 * point[1] for point in curve]),
        Line([chosen / 60], [100 * nearest[1]], style="dots", second_colour=True),
    ]
    words = f"Saving every {chosen / 60:.3g} min leaves {100 * nearest[1]:.1f} % of the time for useful work"
    return draw_lines("goodput", "Goodput against saving", words, lines, x_label="minutes between saves", log_x=True)


def _days_as_dates(axes: Any, start: date) -> None:
    """The horizontal axis in days since `start`, written as dates."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    def written(value: float, _: int) -> str:
        try:
            return f"{start + timedelta(days=value):%-d %b %y}"
        except OverflowError:
            return ""

    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(written))


def _bare(axes: Any, grid: str) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)


def _cut(label: str) -> str:
    label = "".join(each if each.isprintable() else "·" for each in label)
    return label if len(label) <= _LABEL_CHARACTERS else f"{label[: _LABEL_CHARACTERS - 1]}…"
