"""A comparison of answers as lines for the terminal."""

from __future__ import annotations

from typing import Any

__all__ = ["answers_lines"]

_HEADINGS = ("task", "A", "B", "difference", "interval", "p", "could see", "verdict")
_HEALTH = (
    ("num_reasoning_open", "reasoning without an end"),
    ("num_without_one_answer", "not one answer"),
    ("num_loops", "loops"),
    ("num_not_utf8", "not UTF-8"),
    ("num_refused", "refused"),
)


def answers_lines(document: dict[str, Any]) -> list[str]:
    """What `handoff compare` prints of its document."""
    settings = document["settings"]
    level = f"{100 * (1 - 2 * settings['alpha']):g} %"
    rows = [_HEADINGS, *(_cells(task) for task in document["tasks"])]
    widths = [max(len(row[place]) for row in rows) for place in range(len(_HEADINGS))]
    lines = [f"{document['verdict']}: B against A on the same {settings['num_questions']} questions"]
    lines += [f"  {name}: {document[name.lower()]['target']}" for name in "AB"]
    lines += [
        "",
        *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows),
    ]
    lines += [
        "",
        f"interval: {level}, two one-sided tests at alpha = {settings['alpha']:g}; p: corrected for the number of "
        f"tasks; could see: the smallest change found with {100 * settings['power']:g} % power",
    ]
    lines += [
        f"  {each['task']}: {each['words']}{_one_point(each)}" for each in document["tasks"] if not each["no_power"]
    ]
    lines += ["", *(f"{name}: {_health(document[name.lower()]['health'])}" for name in "AB")]
    if document["problems"]:
        lines += ["", *document["problems"]]
    if document["not_covered"]:
        lines += ["", "Not covered:", *(f"  {line}" for line in document["not_covered"])]
    return lines


def _cells(task: dict[str, Any]) -> tuple[str, ...]:
    interval = task["interval"]
    verdict = "no power" if task["no_power"] else task["verdict"]
    if task["num_pairs"] == 0 or interval["low"] is None:
        return (task["task"], "-", "-", "-", "-", "-", "-", verdict)
    is_share = task["unit"] == "share"
    scale = 100 if is_share else 1
    unit = " %" if is_share else ""
    seen = task["smallest_detectable"]
    return (
        task["task"],
        f"{scale * task['a']:.1f}{unit}",
        f"{scale * task['b']:.1f}{unit}",
        f"{scale * task['difference']:+.1f}",
        f"{scale * interval['low']:+.1f} to {scale * interval['high']:+.1f}",
        f"{task['corrected_p']:.2g}",
        "-" if seen is None else f"{scale * seen:.1f}",
        verdict,
    )


def _one_point(task: dict[str, Any]) -> str:
    if task["problems_for_one_point"] is None:
        return ""
    what = "one point" if task["unit"] == "share" else "one per cent"
    return f"; to see {what}: {task['problems_for_one_point']} problems"


def _health(health: dict[str, Any]) -> str:
    wrong = [f"{words} {health[key]}" for key, words in _HEALTH if health[key]]
    if health["num_refused"]:
        wrong.append(f"the first refusal: {health['first_refusal']}")
    stops = ", ".join(f"{reason} {count}" for reason, count in health["stop_reasons"].items()) or "none"
    tokens = "" if health["mean_tokens"] is None else f"; {health['mean_tokens']:.1f} tokens on average"
    return f"{health['num_replies']} answers; ended by: {stops}{tokens}; {', '.join(wrong) or 'nothing unhealthy'}"
