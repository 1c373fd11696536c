"""The link between groups, from `[links]` of the recipe or from a report of the links exam or of `measure.py`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crosschip.errors import RecipeError
from crosschip.recipe import LinkSettings
from crosschip.rundir import read_json
from crosschip.thin_links.choice import Link

__all__ = ["link_from"]


def link_from(settings: LinkSettings) -> Link | None:
    """The link that the recipe describes; None when it says nothing of one.

    Of a report the slowest pair counts, its lowest bandwidth and its highest latency: groups wait for the slowest.

    Raises:
        RecipeError: a report without fitted pairs or with a fit that is none.
        RunDirectoryError: the report is missing or no JSON.
    """
    bandwidth, latency = settings.bandwidth_mbit_s, settings.latency_ms
    if settings.report is not None:
        fits = list(_pair_fits(read_json(Path(settings.report))))
        if not fits:
            raise RecipeError(
                f"links.report={settings.report!r} holds no pair of ranks with latency and bandwidth",
                "measure them with `python -m crosschip.qualify.exams.links.measure` (docs/links.md)",
            )
        measured = [_fitted(fit, settings.report) for fit in fits]
        bandwidth = min(gb_s for gb_s, _ in measured) * 8e3 if bandwidth is None else bandwidth
        latency = max(latency_s for _, latency_s in measured) * 1e3 if latency is None else latency
    if bandwidth is None:
        return None
    return Link(bandwidth * 1e6 / 8, (latency or 0.0) / 1e3)


def _fitted(fit: Any, report: str) -> tuple[float, float]:
    """Bandwidth in GB/s and latency in seconds of a pair's fit."""
    found = [fit.get(name) if isinstance(fit, dict) else None for name in ("bandwidth_gb_s", "latency_s")]
    numbers = [float(each) for each in found if isinstance(each, int | float) and math.isfinite(each)]
    if len(numbers) < 2 or numbers[0] <= 0 or numbers[1] < 0:
        raise RecipeError(
            f"links.report={report!r} holds a pair of ranks with bandwidth_gb_s={found[0]!r} and "
            f"latency_s={found[1]!r}; a link has a bandwidth above 0 and a latency of 0 or more",
            "measure again (docs/links.md), or give links.bandwidth_mbit_s and links.latency_ms in its place",
        )
    return numbers[0], numbers[1]


def _pair_fits(document: Any) -> Iterator[Any]:
    """Fits of pairs: in `measure.py`'s list of pairs, or among an exam's measurements with `check: pairs`."""
    if isinstance(document, list):
        for each in document:
            yield from _pair_fits(each)
    elif isinstance(document, dict):
        if document.get("check") == "pairs" and "bandwidth_gb_s" in document:
            yield document
        for key, value in document.items():
            if key == "pairs" and isinstance(value, list):
                yield from (each["fit"] for each in value if isinstance(each, dict) and each.get("fit"))
            else:
                yield from _pair_fits(value)
