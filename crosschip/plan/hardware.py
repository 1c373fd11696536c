"""Chips and the network between them as a planner sees them: rates, bandwidths and latencies, each with its source.

A collective on `n` chips costs latency plus bytes over bandwidth at each level of the network; the levels work at the
same time, so the slowest counts (Hockney's model, by level). There are two levels, links and network, or three: pods,
between which each chip has less of the network.
"""

from __future__ import annotations

import functools
import math
import re
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from crosschip.plan.figures import Figure

__all__ = [
    "CHIP_FIGURES",
    "EAGER_CALLS",
    "EAGER_CALL_S",
    "POD_FIGURES",
    "Hardware",
    "Spread",
    "all_to_all_s",
    "between_stages_bytes_s",
    "collective_s",
    "kind_named",
    "kinds",
    "names_of_kind",
    "spread_over",
    "usual_host",
    "with_rates",
]

CHIP_FIGURES = {
    "bf16_tflops": "TFLOP/s",
    "fp8_tflops": "TFLOP/s",
    "memory_gb": "GB",
    "memory_gb_s": "GB/s",
    "link_gb_s": "GB/s one way per chip",
    "network_gb_s": "GB/s one way per chip",
    "product_share": "of the datasheet's rate",
    "host_chips": "chips of a host, which a repair takes away together",
}
# Of a cluster and of no chip: both or none. Without them every chip reaches every other node at `network_gb_s`.
POD_FIGURES = {
    "pod_chips": "chips of a pod, within which the network is whole",
    "spine_gb_s": "GB/s one way per chip between pods, where all send",
}
_LARGEST_HOST = 16  # chips; a larger node is a domain of fast links over many hosts
# Calls of torch for what is one operator here: a traced step of recipes/first.toml has 2,399 where 350 operators are
# counted (docs/results/qualify-h100-train.json), and that step took 51.5 ms on an H100 with next to nothing to compute.
EAGER_CALLS = 2399 / 350
EAGER_CALL_S = 0.0515 / 2399
_TABLE = Path(__file__).parent / "data" / "chips.toml"


@dataclass(frozen=True)
class Hardware:
    """One kind of chip in its nodes. Rates in FLOP/s, bandwidths in bytes/s one way per chip, times in seconds.

    `efficiency` is the share of the datasheet's product rate that a large product reaches, `overlap` the share of the
    collectives that could run beside computation and does. `launch_s` is what one more operator costs, `call_s` how
    long the host of an eager trainer takes to issue one: the chip waits where its own work is shorter. `host_size`
    chips go out together where one of them is repaired; a node, the domain of fast links, may hold many hosts.
    `pod_size` chips, whole nodes, share a network that carries what all of them send; between pods each chip has
    `spine_bytes_s`. None: the network has two levels.
    """

    kind: str
    bf16_flops: float
    fp8_flops: float | None
    memory_bytes: float
    memory_bytes_s: float
    node_size: int
    link_bytes_s: float
    network_bytes_s: float
    pod_size: int | None = None
    spine_bytes_s: float | None = None
    efficiency: float = 0.7
    overlap: float = 0.8
    launch_s: float = 5e-6
    call_s: float = 0.0
    host_size: int = 8
    link_latency_s: float = 3e-6
    network_latency_s: float = 1e-5
    link_share: float = 0.8  # of the datasheet's bandwidth that collectives reach
    memory_share: float = 0.85
    tile: int = 128
    sources: tuple[tuple[str, Figure], ...] = ()


@dataclass(frozen=True)
class Spread:
    """Where a group's members sit: `per_node` of them in each of `nodes` nodes, which lie in `pods` pods."""

    per_node: int
    nodes: int
    pods: int = 1

    @property
    def size(self) -> int:
        """Members."""
        return self.per_node * self.nodes

    @property
    def per_pod(self) -> float:
        """Members in a pod, as if they lay there evenly."""
        return self.size / self.pods


def _pods_of(span: int, hardware: Hardware, num_chips: int) -> int:
    """Pods that the worst placed group meets, where `num_chips` are cut into groups of `span` neighbours.

    A group that is no divisor of a pod straddles the border of two somewhere, however small it is.
    """
    if hardware.pod_size is None or num_chips <= hardware.pod_size:
        return 1
    furthest = hardware.pod_size - math.gcd(span, hardware.pod_size)  # into its pod, at which a group begins
    met = math.ceil((furthest + span) / hardware.pod_size)
    return min(met, math.ceil(num_chips / hardware.pod_size))


def spread_over(size: int, stride: int, hardware: Hardware, num_chips: int | None = None) -> Spread:
    """The place of `size` chips that are `stride` apart in the order of ranks, node by node and pod by pod.

    All `num_chips` are cut into such groups, and the worst placed one counts; None: there is one, from the first chip.
    """
    per_node = max(1, min(size, hardware.node_size // max(1, stride)))
    nodes, span = math.ceil(size / per_node), size * max(1, stride)
    return Spread(per_node, nodes, min(nodes, _pods_of(span, hardware, num_chips or span)))


def _spine_s(num_bytes: float, hardware: Hardware) -> float:
    """Seconds that a chip's share of the spine takes for bytes that leave their pod."""
    assert hardware.spine_bytes_s is not None
    return num_bytes / (hardware.spine_bytes_s * hardware.link_share)


def collective_s(num_bytes: float, spread: Spread, hardware: Hardware) -> float:
    """Seconds of an all-gather or reduce-scatter of `num_bytes` in all, or of an all-to-all of as much per chip.

    Inside a node the slices of the others pass each chip's link; between nodes, the part of other nodes passes the
    network cards of the members there; between pods, the part of other pods passes these members' shares of the spine.
    An all-reduce is two of them.
    """
    size = spread.size
    if size <= 1 or num_bytes <= 0:
        return 0.0
    inside = num_bytes * (spread.per_node - 1) / spread.per_node / (hardware.link_bytes_s * hardware.link_share)
    inside += hardware.link_latency_s * math.log2(max(2, spread.per_node))
    if spread.nodes == 1:
        return inside
    passed = num_bytes * (spread.nodes - 1) / spread.nodes
    across = passed / (spread.per_node * hardware.network_bytes_s * hardware.link_share)
    if spread.pods > 1:
        across = max(across, _spine_s(num_bytes * (spread.pods - 1) / spread.pods / spread.per_pod, hardware))
    return max(inside, across) + hardware.network_latency_s * 2 * math.log2(spread.nodes)


def all_to_all_s(num_bytes: float, spread: Spread, hardware: Hardware) -> float:
    """Seconds until every chip has sent `num_bytes` in equal parts to all members, itself included."""
    size = spread.size
    if size <= 1:
        return 0.0
    inside = num_bytes * (spread.per_node - 1) / size / (hardware.link_bytes_s * hardware.link_share)
    across = num_bytes * (size - spread.per_node) / size / (hardware.network_bytes_s * hardware.link_share)
    if spread.pods > 1:
        across = max(across, _spine_s(num_bytes * (size - spread.per_pod) / size, hardware))
    latency = hardware.link_latency_s if spread.nodes == 1 else hardware.network_latency_s
    return max(inside, across) + latency * math.log2(size)


def between_stages_bytes_s(stage_chips: int, group_chips: int, hardware: Hardware, num_chips: int) -> float:
    """Bandwidth from a chip to its place in the next stage of a pipeline, in bytes/s.

    Stages of `stage_chips` neighbours follow one another, `group_chips` in all. Where a stage and the next lie in two
    pods, its chips share what the spine has for the whole pod.
    """
    if stage_chips < hardware.node_size:
        return hardware.link_bytes_s
    if _pods_of(group_chips, hardware, num_chips) == 1:
        return hardware.network_bytes_s
    assert hardware.pod_size is not None
    assert hardware.spine_bytes_s is not None
    shared = hardware.spine_bytes_s * hardware.pod_size / min(stage_chips, hardware.pod_size)
    return min(hardware.network_bytes_s, shared)


def _figure(row: dict[str, Any], key: str) -> Figure | None:
    if key not in row:
        return None
    value, origin, source = row[key]
    return Figure(float(value), CHIP_FIGURES[key], origin, source)


def usual_host(node_size: int) -> Figure:
    """The chips of a host where nobody has said: a whole node of usual size, else a server of eight."""
    unit = CHIP_FIGURES["host_chips"]
    if node_size <= _LARGEST_HOST:
        return Figure(float(node_size), unit, "assumed", "the whole node")
    return Figure(8.0, unit, "assumed", f"a server of eight in a node of {node_size}")


def _hardware(row: dict[str, Any]) -> Hardware:
    figures = {key: figure for key in CHIP_FIGURES if (figure := _figure(row, key)) is not None}
    figures.setdefault("host_chips", usual_host(row["node_size"]))

    def of(key: str, scale: float) -> float:
        return figures[key].value * scale

    return Hardware(
        kind=row["kind"],
        bf16_flops=of("bf16_tflops", 1e12),
        fp8_flops=of("fp8_tflops", 1e12) if "fp8_tflops" in figures else None,
        memory_bytes=of("memory_gb", 1e9),
        memory_bytes_s=of("memory_gb_s", 1e9),
        node_size=row["node_size"],
        link_bytes_s=of("link_gb_s", 1e9),
        network_bytes_s=of("network_gb_s", 1e9),
        efficiency=of("product_share", 1.0),
        host_size=round(of("host_chips", 1.0)),
        sources=tuple(figures.items()),
    )


@functools.cache
def kinds() -> tuple[tuple[tuple[str, ...], Hardware], ...]:
    """Every kind of chip with the patterns of its names."""
    table = tomllib.loads(_TABLE.read_text(encoding="utf-8"))
    return tuple((tuple(row["matches"]), _hardware(row)) for row in table["chip"])


def kind_named(name: str) -> Hardware | None:
    """The kind that a chip's label names; the first pattern of the table that fits counts."""
    return next((each for patterns, each in kinds() if any(re.search(one, name, re.I) for one in patterns)), None)


def names_of_kind(name: str) -> tuple[str, ...]:
    """Regular expressions for the names of the kind that a chip's label names; of an unknown chip its label alone."""
    for patterns, _ in kinds():
        if any(re.search(one, name, re.I) for one in patterns):
            return patterns
    return (re.escape(name),)


def with_rates(hardware: Hardware, efficiency: float, overlap: float) -> Hardware:
    """The same chip with other parameters."""
    return replace(hardware, efficiency=efficiency, overlap=overlap)
