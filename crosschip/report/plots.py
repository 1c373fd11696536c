"""Plots as inline SVG that take their colours from the page, so that one drawing serves light, dark and paper.

matplotlib draws with placeholder colours that are afterwards replaced by CSS variables; text stays text. It is imported
only when a plot is drawn, because the import takes about a second.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from crosschip.report.curves import Curve, Series

__all__ = ["GRID", "INK", "LINE", "MARK", "Plot", "draw", "paint_svg"]

WIDTH_IN, HEIGHT_IN = 4.6, 2.45  # at 72 points an inch, about the width of a phone, so labels stay legible there
FONT_SIZE = 11

# matplotlib needs real colours; these stand for CSS variables and occur nowhere else.
INK, GRID, LINE, MARK = "#010203", "#010204", "#010205", "#010206"
PLACEHOLDERS = {INK: "var(--soft)", GRID: "var(--rule)", LINE: "var(--line)", MARK: "var(--mark)"}


@dataclass(frozen=True)
class Plot:
    """One small chart. `marks` is a second, sparser series drawn as dots joined by a line."""

    name: str  # unique in the page; becomes the prefix of every id
    title: str
    description: str  # for those who cannot see the drawing
    curve: Curve
    marks: Series | None = None
    log_scale: bool = False
    from_zero: bool = False


def draw(plot: Plot) -> str:
    """Draw `plot` as one `<svg>` element without ids of its own that could meet another plot's."""

    def paint(axes: Any) -> None:
        _dress(axes, plot)
        _draw_series(axes, plot)

    return paint_svg(plot.name, plot.title, plot.description, paint)


def paint_svg(
    name: str,
    title: str,
    description: str,
    paint: Callable[[Any], None],
    *,
    height_in: float = HEIGHT_IN,
    math_text: bool = True,
) -> str:
    """What `paint` draws on matplotlib's axes, as one `<svg>` element; it may use only the four placeholder colours.

    `name` must be unique in the page. Without `math_text` a dollar sign in a label is a dollar sign.
    """
    import matplotlib

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": FONT_SIZE,
        "path.simplify": True,
        "text.parse_math": math_text,
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's own settings, as text by LaTeX, are for their figures
        matplotlib.rcParams.update(settings)
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure.add_subplot())
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True)
    return _fit_into_page(written.getvalue(), name, title, description)


def _dress(axes: Any, plot: Plot) -> None:
    from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullFormatter

    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)
    axes.set_xlabel("step", color=INK, loc="right", labelpad=1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if plot.log_scale:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
        largest = max(plot.curve.high, default=0.0)
        if largest >= 1000:
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        elif 0 < largest < 0.01:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short_exponent(value)))


def _short_exponent(value: float) -> str:
    """`2.5e-4`, as recipes write learning rates."""
    if abs(value) < 1e-12:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _draw_series(axes: Any, plot: Plot) -> None:
    curve = plot.curve
    if curve.stride > 1:
        axes.fill_between(curve.steps, curve.low, curve.high, color=LINE, alpha=0.3, linewidth=0)
    single = "o" if len(curve.steps) == 1 else None
    axes.plot(curve.steps, curve.mean, color=LINE, linewidth=1.6, marker=single, markersize=4)
    if plot.marks is not None and plot.marks.steps:
        axes.plot(plot.marks.steps, plot.marks.values, color=MARK, linewidth=1.2, marker="o", markersize=3.5)
    if plot.from_zero and not plot.log_scale:
        marked = plot.marks.values if plot.marks is not None else []
        axes.set_ylim(bottom=min(0.0, *curve.low, *marked), top=max(*curve.high, *marked, 0.0) * 1.06 or 1.0)


def _fit_into_page(svg: str, name: str, title: str, description: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it would reach the whole page
    svg = re.sub(r">\s+<", "><", svg).replace("\n", " ")
    for placeholder, variable in PLACEHOLDERS.items():
        svg = svg.replace(placeholder, variable)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 var(--font)", svg)  # matplotlib before 3.10
    svg = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", svg)
    svg = _own_ids(svg, name)
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box is not None, "matplotlib always writes a viewBox"
    title_id, description_id = f"{name}-title", f"{name}-desc"
    head = (
        f'<svg {view_box.group()} role="img" aria-labelledby="{title_id} {description_id}">'
        f'<title id="{title_id}">{html.escape(title)}</title>'
        f'<desc id="{description_id}">{html.escape(description)}</desc>'
    )
    return head + svg[svg.index(">") + 1 :]


def _own_ids(svg: str, prefix: str) -> str:
    """Keep only ids that something refers to, and put the plot's name before them."""
    used = set(re.findall(r"url\(#([^)]+)\)", svg)) | set(re.findall(r'href="#([^"]+)"', svg))

    def rename(match: re.Match[str]) -> str:
        return f' id="{prefix}-{match.group(1)}"' if match.group(1) in used else ""

    svg = re.sub(r'\sid="([^"]+)"', rename, svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)
    return re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', svg)
