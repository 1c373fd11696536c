"""Rates from a report of `qualify`: a measured number counts more than a datasheet's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from crosschip.errors import RecipeError
from crosschip.plan.cluster import Cluster
from crosschip.plan.figures import Figure
from crosschip.rundir import read_json

__all__ = ["with_report"]


def _measurements(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for exam in report.get("exams") or []:
        if isinstance(exam, dict):
            yield from (each for each in exam.get("measurements") or [] if isinstance(each, dict))


def _positive(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) and value > 0 else None


def _product_rate(report: dict[str, Any]) -> float | None:
    """FLOP/s in bf16, from a measurement `kind="product rate"` or from a benchmark of this project."""
    rates = report.get("product_rate_flop_per_s")
    found = [rates.get("bfloat16")] if isinstance(rates, dict) else []
    found += [
        each.get("flop_per_s")
        for each in _measurements(report)
        if each.get("kind") == "product rate" and each.get("dtype", "bfloat16") == "bfloat16"
    ]
    return max(filter(None, map(_positive, found)), default=None)


def _links(report: dict[str, Any]) -> tuple[float, float] | None:
    """Bytes a second and latency in seconds of the links exam: the slowest collective counts."""
    fits = [
        (bandwidth, _positive(each.get("latency_s")) or 0.0)
        for each in _measurements(report)
        if each.get("plot") == "bandwidth" and (bandwidth := _positive(each.get("bandwidth_gb_s")))
    ]
    return (min(fits)[0] * 1e9, max(latency for _, latency in fits)) if fits else None


def with_report(cluster: Cluster, path: Path) -> tuple[Cluster, list[str]]:
    """The cluster with what the report measured in the place of datasheet figures, and notes of what it lacks.

    Raises:
        RecipeError: the report is none of a chip, or of another chip than the cluster's.
    """
    report = read_json(path)
    if not isinstance(report, dict) or not ("exams" in report or "product_rate_flop_per_s" in report):
        raise RecipeError(f"{path} is no report of `crosschip qualify`", "give qualify/CHIP-train.json of a run")
    hardware, figures, notes = cluster.hardware, dict(cluster.hardware.sources), []
    source = f"report {path.name}"
    if (rate := _product_rate(report)) is not None:
        figures["product_share"] = Figure(rate / hardware.bf16_flops, "of the datasheet's rate", "measured", source)
        hardware = replace(hardware, efficiency=min(1.0, rate / hardware.bf16_flops) * 0.8)
    else:
        notes.append(f"{path.name} has no product rate: the datasheet's counts, times the stated share")
    if (links := _links(report)) is not None:
        bandwidth, latency = links
        figures["link_gb_s"] = Figure(bandwidth / 1e9, "GB/s one way per chip", "measured", source)
        hardware = replace(hardware, link_bytes_s=bandwidth / hardware.link_share, link_latency_s=latency)
    else:
        notes.append(f"{path.name} has no links: the datasheet's count")
    return replace(cluster, hardware=replace(hardware, sources=tuple(figures.items()))), notes
