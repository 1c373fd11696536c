"""What a report of `qualify` measured, in the place of a datasheet's figures.

It has the links' fit, the chip's memory and how long the host takes for a call. A product rate
(`kind="product rate"`, `dtype`, `flop_per_s`) and a memory rate (`kind="memory rate"`, `bytes_per_s`) are taken where
an exam writes them; what is not in the report is said.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from crosschip.errors import RecipeError
from crosschip.plan.cluster import KERNELS_SHARE, Cluster
from crosschip.plan.failures import PlanError, Soak, read_soak
from crosschip.plan.figures import Figure
from crosschip.plan.hardware import CHIP_FIGURES, EAGER_CALLS, Hardware
from crosschip.rundir import read_json

__all__ = ["soak_of", "with_report"]


def _bus_share(collective: str, num_ranks: int) -> float | None:
    """Bytes that pass each chip's link for each byte that a rank gives, on a ring; None of an unknown collective."""
    others = num_ranks - 1
    return {
        "all_reduce": 2 * others / num_ranks,
        "all_gather": float(others),
        "reduce_scatter": others / num_ranks,
        "all_to_all": others / num_ranks,
        "broadcast": 1.0,
    }.get(collective)


@dataclass
class _Measured:
    """The hardware with what was measured so far, and notes on what was not."""

    hardware: Hardware
    name: str
    notes: list[str] = field(default_factory=list)

    def put(self, key: str, value: float, unit: str, **changes: Any) -> None:
        figures = dict(self.hardware.sources)
        figures[key] = Figure(value, unit, "measured", f"report {self.name}")
        self.hardware = replace(self.hardware, sources=tuple(figures.items()), **changes)

    def lacks(self, what: str, instead: str) -> None:
        self.notes.append(f"{self.name} has no {what}: {instead}")


def _measurements(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for exam in report.get("exams") or []:
        if isinstance(exam, dict):
            yield from (each for each in exam.get("measurements") or [] if isinstance(each, dict))


def _positive(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) and value > 0 else None


def _chip(report: dict[str, Any]) -> dict[str, Any]:
    fingerprint = report.get("fingerprint")
    chip = fingerprint.get("chip") if isinstance(fingerprint, dict) else None
    return chip if isinstance(chip, dict) else {}


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


def _of_kind(report: dict[str, Any], kind: str, key: str) -> float | None:
    found = [each.get(key) for each in _measurements(report) if kind in (each.get("kind"), each.get("what"))]
    return max(filter(None, map(_positive, found)), default=None)


def _call_s(report: dict[str, Any]) -> float | None:
    """Seconds that the host takes for a call: no more than the smallest one that is waited for, and no more than a
    whole step over its calls.
    """
    found = [_of_kind(report, "speed", "launch_s")]
    calls = _positive((report.get("trace") or {}).get("num_calls"))
    steps_s = max(
        (_positive(each.get("value")) or 0.0 for each in _measurements(report) if _is_step(each)), default=0.0
    )
    if calls is not None and steps_s > 0:
        found.append(1.0 / (steps_s * calls))
    return min((each for each in found if each is not None), default=None)


def _is_step(entry: dict[str, Any]) -> bool:
    return entry.get("kind") == "speed" and str(entry.get("what", "")).endswith("steps")


def _links(report: dict[str, Any]) -> tuple[float, float, int] | None:
    """Bytes a second through a chip's link, latency in seconds, ranks: of the slowest collective, else of pairs."""
    fits = []
    for each in _measurements(report):
        bandwidth = _positive(each.get("bandwidth_gb_s"))
        if each.get("plot") != "bandwidth" or bandwidth is None:
            continue
        given = each.get("num_ranks")
        ranks = given if isinstance(given, int) and given > 1 else 0  # 0: a pair, to and fro
        share = _bus_share(str(each.get("collective", "")).partition(" ")[0], ranks) if ranks else 1.0
        if share is not None:
            fits.append((ranks == 0, bandwidth * 1e9 * share, _positive(each.get("latency_s")) or 0.0, ranks or 2))
    if not fits:
        return None
    of_collectives = [each for each in fits if not each[0]] or fits
    slowest = min(of_collectives, key=lambda each: each[1])
    return slowest[1], max(latency for _, _, latency, _ in of_collectives), slowest[3]


def _refuse_another_chip(report: dict[str, Any], cluster: Cluster, path: Path) -> None:
    """A report names its chip as torch calls it and as the chip calls itself; the cluster's names must fit one."""
    name, model = str(report.get("chip", "")), _chip(report).get("model_name")
    named = [each for each in (name, model) if isinstance(each, str) and each]
    is_known = isinstance(model, str) or name.partition(":")[0] in ("cpu", "sim")
    if not is_known or any(re.search(one, each, re.I) for one in cluster.matches for each in named):
        return
    raise RecipeError(
        f"{path.name} is of {model or name}, and {cluster.name} has {cluster.hardware.kind}",
        "give the report of that chip, or the cluster of this one (--cluster)",
    )


def with_report(cluster: Cluster, path: Path) -> tuple[Cluster, list[str]]:
    """The cluster with what the report measured in the place of datasheet figures, and notes of what it lacks.

    Raises:
        RecipeError: the report is none of a chip, or of another chip than the cluster's.
    """
    report = read_json(path)
    if not isinstance(report, dict) or not ("exams" in report or "product_rate_flop_per_s" in report):
        raise RecipeError(f"{path} is no report of `crosschip qualify`", "give qualify/CHIP-train.json of a run")
    _refuse_another_chip(report, cluster, path)
    found = _Measured(cluster.hardware, path.name)
    _put_rates(found, report)
    _put_links(found, report)
    _put_verdict(found, report)
    return replace(cluster, hardware=found.hardware), found.notes


def _put_verdict(found: _Measured, report: dict[str, Any]) -> None:
    """Say where a qualification gives no leave to train on the chip; a benchmark's rates have no verdict to say."""
    if "exams" not in report:
        return
    verdict, role = report.get("verdict"), report.get("role")
    if verdict not in ("PASS", "PASS WITH LIMITS"):
        told = f"its verdict is {verdict}" if isinstance(verdict, str) else "it has no verdict"
        found.notes.append(f"{found.name}: {told}, and its figures are taken as they stand: see why before training")
    if isinstance(role, str) and role != "train":
        found.notes.append(f"{found.name} is of the role {role}: it does not say whether the chip may train")


def _put_rates(found: _Measured, report: dict[str, Any]) -> None:
    peak = found.hardware.bf16_flops
    if (rate := _product_rate(report)) is not None:
        share = rate / peak  # above 1 where a chip is faster than its datasheet
        found.put("product_share", share, CHIP_FIGURES["product_share"], efficiency=share * KERNELS_SHARE)
    else:
        found.lacks("product rate", "the datasheet's counts, times the stated share")
    if (stream := _of_kind(report, "memory rate", "bytes_per_s")) is not None:
        found.put("memory_gb_s", stream / 1e9, CHIP_FIGURES["memory_gb_s"], memory_bytes_s=stream, memory_share=1.0)
        found.put("memory_share", 1.0, "of the bandwidth")
    else:
        found.lacks("memory rate", "the datasheet's counts, times the stated share")
    if (call := _call_s(report)) is not None:
        is_cpu = str(report.get("chip")) == "cpu"  # which computes after it was called, not meanwhile
        found.put(
            "call_us", call * 1e6, "µs for a call of torch", **{"launch_s" if is_cpu else "call_s": call * EAGER_CALLS}
        )
    else:
        found.lacks("time of a call", "the assumed one counts")
    if (memory := _positive(_chip(report).get("memory_bytes"))) is not None:
        found.put("memory_gb", memory / 1e9, CHIP_FIGURES["memory_gb"], memory_bytes=memory)


def _put_links(found: _Measured, report: dict[str, Any]) -> None:
    """Ranks beyond a node have measured the network: what a node's cards carry together is the collective's."""
    hardware = found.hardware
    if (links := _links(report)) is None:
        found.lacks("fit of links", "the datasheet's counts, times the stated share")
        return
    bandwidth, latency_s, ranks = links
    if ranks <= hardware.node_size:
        changes = {"link_bytes_s": bandwidth / hardware.link_share, "link_latency_s": latency_s}
        found.put("link_gb_s", bandwidth / 1e9, CHIP_FIGURES["link_gb_s"], **changes)
        found.put("link_latency_us", latency_s * 1e6, "µs")
        return
    each = bandwidth / hardware.node_size
    changes = {"network_bytes_s": each / hardware.link_share, "network_latency_s": latency_s}
    found.put("network_gb_s", each / 1e9, CHIP_FIGURES["network_gb_s"], **changes)
    found.put("network_latency_us", latency_s * 1e6, "µs")


def soak_of(path: Path, num_chips: int) -> tuple[Soak | None, list[str]]:
    """The report's soak, evidence of how often the chip stops; None with the reason where it holds none.

    The note says what the soak leaves open for so many chips.
    """
    try:
        soak = read_soak(read_json(path))
    except PlanError as error:
        return None, [error.problem]
    return soak, [soak.words(num_chips)]
