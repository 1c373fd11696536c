"""A plan's document as one HTML page: the date first, then on what it rests. No script, nothing fetched."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from crosschip import __version__
from crosschip.plan.page.drawings import draw_end_dates, draw_gantt, draw_goodput, draw_tornado
from crosschip.plan.page.parts import joined_rows, rollout_rows, serving_rows
from crosschip.report.figures import NARROW_SPACE, count, duration, percent
from crosschip.report.templating import TEMPLATES as REPORT_TEMPLATES

__all__ = ["plan_page"]

_TEMPLATES = Path(__file__).parent / "templates"
_CAUSES = {
    "useful": "useful work that stayed",
    "lost": "work that was lost",
    "restart": "detection and restart",
    "saving": "saving",
    "idle": "waiting for a host",
}


def plan_page(document: dict[str, Any]) -> str:
    """The page of a plan. Every section but `model` and `cluster` may be missing, and is then left out."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([_TEMPLATES, REPORT_TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    styles = [REPORT_TEMPLATES / "style.css", REPORT_TEMPLATES / "qualification.css", _TEMPLATES / "plan.css"]
    common = {
        "version": __version__,
        "written": time.strftime("%Y-%m-%d %H:%M %Z"),
        "style": "\n".join(path.read_text(encoding="utf-8") for path in styles),
    }
    return environment.get_template("plan.html").render(common | _view(document))


def _view(document: dict[str, Any]) -> dict[str, Any]:
    dates, failures = document.get("dates"), document.get("failures")
    effects, serving = document.get("sensitivity") or [], document.get("serving")
    return {
        "model": str(document["model"]),
        "cluster": str(document["cluster"]),
        "tiles": _tiles(document),
        "by": _by(dates),
        "charts": _charts(dates, failures, effects),
        "stages": _stage_rows(dates),
        "work": _work_rows(document.get("stages") or []),
        "engines": [(each["name"], rollout_rows(each["rollouts"])) for each in _having(document, "rollouts")],
        "groups": [(each["name"], joined_rows(each["joined"])) for each in _having(document, "joined")],
        "shares": _share_rows(failures),
        "effects": [each["words"] for each in effects],
        "fall_backs": document.get("fall_backs") or [],
        "corruption": failures["corruption"]["words"] if failures else "",
        "main_stage": str(document.get("main_stage", "")),
        "soak": (failures or {}).get("soak", ""),
        "serving": serving_rows(serving) if serving else [],
        "money": _money_rows(document.get("money")),
        "left_out": (document.get("money") or {}).get("left_out", []),
        "figures": _figure_rows(document),
        "units": [[each[key] for key in ("path", "unit", "origin", "source")] for each in document.get("units", [])],
        "notes": [str(each) for each in document.get("notes", [])],
    }


def _tiles(document: dict[str, Any]) -> list[tuple[str, str, str]]:
    tiles = []
    dates, failures, money = document.get("dates"), document.get("failures"), document.get("money")
    if dates:
        end = dates["end"]
        tiles.append((end["p50"], "done, P50", f"P10 {end['p10']}, P90 {end['p90']}; simulated"))
    if failures:
        hours, goodput = failures["between_stops_h"], failures["goodput"]
        spread = f"P10 {hours['p10']:.3g} h, P90 {hours['p90']:.3g} h; from published fleets"
        tiles.append((f"{hours['p50']:.3g}{NARROW_SPACE}h", "between stops", spread))
        low, high = percent(goodput["p10"]), percent(goodput["p90"])
        tiles.append((percent(goodput["p50"]), "goodput", f"P10 {low}, P90 {high}; simulated"))
    if money:
        cost, hours = money["money"], money["chip_hours"]
        if cost:
            text = f"{_short(cost['p50'])}{NARROW_SPACE}{money['currency']}"
            tiles.append((text, "cost, P50", f"P90 {_short(cost['p90'])} {money['currency']}; computed"))
        text = f"P90 {_short(hours['p90'])} h; paid spares included; computed"
        tiles.append((f"{_short(hours['p50'])}{NARROW_SPACE}h", "chip-hours, P50", text))
    if document.get("serving"):
        serving = document["serving"]
        tiles.append((count(serving["chips"]), "chips to serve", f"{serving['chip']}; computed"))
    return tiles


def _short(number: float) -> str:
    """`5.09 M`: three digits for a tile."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= factor:
            return f"{number / (1e3 if prefix == 'k' else factor):.3g}{NARROW_SPACE}{prefix}"
    return count(number)


def _by(dates: dict[str, Any] | None) -> tuple[str, str]:
    """(CSS class, sentence) on the date that was asked for."""
    asked = (dates or {}).get("by")
    if not asked:
        return "", ""
    chance = asked["chance"]
    state = "good" if chance >= 0.9 else "open" if chance >= 0.5 else "bad"
    return state, f"Done by {asked['date']} with a chance of {percent(chance, 0)}"


def _charts(
    dates: dict[str, Any] | None, failures: dict[str, Any] | None, effects: list[dict[str, Any]]
) -> list[tuple[str, str, str]]:
    """(title, key, SVG)."""
    charts = []
    if dates:
        charts.append(("Stages on the calendar", "bar: P50; line to P90; shaded: no cluster", draw_gantt(dates)))
        charts.append(("When it ends", "P10 dotted, P50 solid, P90 dashed", draw_end_dates(dates)))
    if effects:
        charts.append(("What moves the end", "days on the P50, one change at a time", draw_tornado(effects)))
    if failures:
        key = "% of the time, at the median rate; dot: chosen"
        charts.append(("Goodput against saving", key, draw_goodput(failures["interval"])))
    return charts


def _stage_rows(dates: dict[str, Any] | None) -> list[list[str]]:
    return [
        [
            each["name"],
            _chips(each),
            each["begin"]["p50"],
            each["end"]["p50"],
            each["end"]["p90"],
            percent(each["goodput_p50"]),
            f"{each['stops_mean']:.1f}",
        ]
        for each in (dates or {}).get("stages", [])
    ]


def _chips(stage: dict[str, Any]) -> str:
    """Such as `512 H800 and 64 Ascend 910B`."""
    beside = stage.get("beside", [])
    mine = stage["chips"] - sum(number for _, number in beside)
    return (
        " and ".join(f"{count(number)} {chip}".strip() for chip, number in ((stage["chip"], mine), *beside) if number)
        or "none"
    )


def _share_rows(failures: dict[str, Any] | None) -> list[tuple[str, str]]:
    if not failures:
        return []
    rows = [(words, percent(failures["time_shares"][name], 2)) for name, words in _CAUSES.items()]
    interval, spares = failures["interval"], failures["spares"]
    waiting = percent(spares["share_waiting"])
    return [
        *rows,
        ("stops expected", f"{failures['stops']['mean']:.1f}"),
        ("saves", f"every {duration(interval['chosen_s'])} (Young: {duration(interval['young_s'])})"),
        (
            "spare hosts",
            f"{count(spares['nodes'])} of {count(spares['chips_per_node'])} chips; {waiting} of the swaps find none",
        ),
    ]


def _having(document: dict[str, Any], key: str) -> list[dict[str, Any]]:
    return [each for each in document.get("stages") or [] if each.get(key)]


def _work_rows(stages: list[dict[str, Any]]) -> list[list[str]]:
    return [
        [
            each["name"],
            count(each["steps"]),
            f"{_short(each['tokens']['value'])} tokens",
            f"{each['step_s']['value']:.3g}{NARROW_SPACE}s",
            each["update"]["layout"]["text"],
            f"{each['update']['memory_bytes']['value'] / 1e9:.3g}{NARROW_SPACE}GB",
        ]
        for each in stages
    ]


def _money_rows(money: dict[str, Any] | None) -> list[list[str]]:
    """(what, P10, P50, P90)."""
    if not money:
        return []
    rows = [("chip-hours", "h", money["chip_hours"]), ("energy", "MWh", money["energy_mwh"])]
    rows.append(("cost", money["currency"], money["money"]))
    return [
        [f"{what}, {unit}", *(count(values[name]) for name in ("p10", "p50", "p90"))]
        for what, unit, values in rows
        if values
    ]


def _figure_rows(document: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(name, value with unit, origin, source) of every figure in the document's sections, sorted by name."""
    sections = [("", document.get(name)) for name in ("step", "failures", "dates", "serving", "money")]
    sections += [(each["name"], each["rollouts"]) for each in _having(document, "rollouts")]
    sections += list((document.get("other_clusters") or {}).items())
    rows = []
    for where, section in sections:
        for name, each in sorted((section or {}).get("figures", {}).items()):
            value = f"{each['value']:.6g}{NARROW_SPACE}{each['unit']}"
            words = name.replace("_", " ")
            rows.append((f"{words} ({where})" if where else words, value, each["origin"], each["source"]))
    return rows
