"""This machine as a cluster of one chip, measured with numpy in about a second: no torch.

What training reaches is told better by a report of `qualify`; this is for a first answer without one.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable

import numpy as np

from crosschip.plan.cluster import Cluster
from crosschip.plan.figures import Figure
from crosschip.plan.hardware import CHIP_FIGURES, Hardware

__all__ = ["host_cluster"]

_SIZE = 1024
_STREAM_NUMBERS = 16_000_000
_REPEATS = 5


def _shortest_s(work: Callable[[], object]) -> float:
    times = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def product_flops() -> float:
    """The best rate of an fp32 product of 1024 cubed, in FLOP/s."""
    left = np.random.default_rng(0).standard_normal((_SIZE, _SIZE), dtype=np.float32)
    out = np.empty_like(left)
    return 2.0 * _SIZE**3 / _shortest_s(lambda: np.matmul(left, left, out=out))


def stream_bytes_s() -> float:
    """Bytes read and written a second by a sum of two arrays that no cache holds."""
    left, out = np.ones(_STREAM_NUMBERS, dtype=np.float32), np.empty(_STREAM_NUMBERS, dtype=np.float32)
    return 12.0 * _STREAM_NUMBERS / _shortest_s(lambda: np.add(left, left, out=out))


def memory_bytes() -> float:
    """This machine's memory, or 8 GB where the system does not tell."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError):
        return 8e9


def host_cluster(num_processes: int = 1) -> Cluster:
    """This machine; `num_processes` processes share its cores, its memory and its bandwidth equally."""
    name = platform.processor() or platform.machine()
    flops, stream, memory = product_flops(), stream_bytes_s(), memory_bytes()
    share = 1.0 / num_processes
    figures = {
        "bf16_tflops": Figure(flops * share / 1e12, "TFLOP/s", "measured", "numpy, fp32 products of 1024 cubed, now"),
        "memory_gb": Figure(memory * share / 1e9, "GB", "measured", "what the system tells"),
        "memory_gb_s": Figure(stream * share / 1e9, "GB/s", "measured", "numpy, a sum of 16 million numbers, now"),
        "link_gb_s": Figure(stream * share / 4e9, CHIP_FIGURES["link_gb_s"], "assumed", "a quarter of the memory's"),
    }
    hardware = Hardware(
        kind=f"this machine ({name})",
        bf16_flops=flops * share,
        fp8_flops=None,
        memory_bytes=memory * share,
        memory_bytes_s=stream * share,
        node_size=max(1, num_processes),
        link_bytes_s=stream * share / 4,
        network_bytes_s=stream * share / 4,
        efficiency=0.7,
        overlap=0.0,
        launch_s=1e-5,
        memory_share=1.0,
        tile=16,
        link_latency_s=1e-4,
        sources=tuple(figures.items()),
    )
    return Cluster("this machine", hardware, num_processes, fixed_bytes=5e8)
