"""Plans beside the reports: which chip's dates they are, and whether dates may be held against each other. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import date
from typing import Any

from crosschip.report.documents import Document, is_number

__all__ = ["add_plans"]


def add_plans(chips: dict[str, Document], plans: Sequence[Document], subject: str) -> tuple[list[str], set[str]]:
    """Put each plan to its chip: notes, and the roles whose plans are of unlike work, so that no date decides.

    A plan that fits no chip here is no evidence, which its note says.
    """
    notes: list[str] = []
    tokens: dict[str, dict[str, float]] = {}
    for plan in plans:
        notes += _add_plan(chips, plan, subject, tokens)
    unlike = {role: sorted(each.items()) for role, each in tokens.items() if len(set(each.values())) > 1}
    for role, each in unlike.items():
        told = ", ".join(f"{title} {number:.4g}" for title, number in each)
        notes.append(
            f"the plans to {role} are of different numbers of tokens ({told}), so their dates decide nothing; make "
            "them again from one recipe"
        )
    return notes, set(unlike)


def _add_plan(
    chips: dict[str, Document], plan: Document, subject: str, tokens: dict[str, dict[str, float]]
) -> list[str]:
    name = f"the plan of {plan.get('model', '?')} on {plan.get('cluster', plan.get('chip'))}"
    ready = _dates(plan.get("ready"))
    if ready is None:
        return [f"{name} has no dates under `ready`; make it again with this crosschip"]
    if plan.get("model", subject) != subject:
        return [f"{name} is left out: the reports are of {subject}"]
    role, number = str(plan.get("role", "train")), _tokens(plan)
    mine = [chip for chip in chips.values() if _is_planned(chip, plan)]
    if not mine:
        return [f"{name} is for {plan.get('chip')}, of which there is no report: it is left out"]
    notes = []
    for chip in mine:
        if role in chip["plans"]:
            notes.append(f"{chip['title']} has two plans; {name} is used")
            tokens.get(role, {}).pop(chip["title"], None)
        chip["plans"][role] = {**ready, "cluster": plan.get("cluster")}
        if number is not None:
            tokens.setdefault(role, {})[chip["title"]] = number
    return notes


def _dates(ready: Any) -> dict[str, str] | None:
    """The dates of a plan, P50 not after P90, in one form; None where they are none."""
    try:
        p50, p90 = (date.fromisoformat(ready[key]) for key in ("p50", "p90"))
    except (KeyError, TypeError, ValueError):
        return None
    return {"p50": p50.isoformat(), "p90": p90.isoformat()} if p50 <= p90 else None


def _tokens(plan: Document) -> float | None:
    """How many tokens the plan trains on, where it says so."""
    counts = plan.get("counts")
    figure = counts.get("tokens") if isinstance(counts, dict) else None
    value = figure.get("value") if isinstance(figure, dict) else None
    return float(value) if is_number(value) else None


def _is_planned(chip: Document, plan: Document) -> bool:
    """A plan names its chip as torch does, by its title, or by expressions for what the chip calls itself."""
    names = [str(chip[key]) for key in ("chip", "title", "model_name") if chip[key]]
    if plan.get("chip") in names:
        return True
    expressions = plan.get("chip_matches")
    if not isinstance(expressions, list):
        return False
    try:
        return any(re.search(each, name, re.I) for each in expressions if isinstance(each, str) for name in names)
    except (re.error, OverflowError, RecursionError):  # of no use, like a name that fits nothing
        return False
