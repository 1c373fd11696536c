"""This machine as a cluster of one chip, measured with numpy in about a second: no torch.

What training reaches is told better by a report of `qualify`; this is for a first answer without one.
"""

from __future__ import annotations

import os
import platform
import socket
import threading
import time
from collections.abc import Callable

import numpy as np

from crosschip.plan.cluster import Cluster
from crosschip.plan.figures import Figure
from crosschip.plan.hardware import CHIP_FIGURES, EAGER_CALLS, Hardware

__all__ = ["host_cluster"]

_SIZE = 1024
_STATES, _NUM_STATES = (4096, 128), 32
_MESSAGE_BYTES = 32 << 20
_REPEATS = 5
# Torch's import, data and tokenizer, and what glibc pads two arenas with (64 MB each: the backward pass runs in a
# thread of its own). Freed memory is kept (`keep_freed_memory`), each arena its own: the peak grows by 2.1 times the
# activations that are alive. Measured on three small runs (docs/log.md).
_BASE_BYTES, _ALLOCATOR = 6.5e8, 2.1
_CALL_S = 5e-6  # a small call of torch on a CPU with what autograd adds; assumed


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
    """Bytes that element-wise passes of a layer read and write a second: three of five multiply, the others gather rows
    or take exponentials. Each has states of its own, which no cache holds any more, as in a step.
    """
    states = np.ones((_NUM_STATES, *_STATES), dtype=np.float32)
    rows, num_bytes = np.random.default_rng(0).integers(0, _STATES[0], _STATES[0]), float(states.nbytes)
    multiply = _shortest_s(lambda: [np.multiply(each, each) for each in states]) / (3 * num_bytes)
    gather = _shortest_s(lambda: [np.take(each, rows, axis=0) for each in states]) / (2 * num_bytes)
    exponential = _shortest_s(lambda: [np.exp(each) for each in states]) / (2 * num_bytes)
    return 1.0 / (0.6 * multiply + 0.2 * gather + 0.2 * exponential)


def loopback_bytes_s() -> float:
    """Bytes a second of TCP inside this machine: what gloo's messages between processes pass."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sender:
        receiver, _ = server.accept()
        with receiver:
            return _MESSAGE_BYTES / _shortest_s(lambda: _one_way(sender, receiver))


def _one_way(sender: socket.socket, receiver: socket.socket) -> None:
    """Both ends hold the interpreter's lock only between calls, so sending and receiving overlap."""
    thread = threading.Thread(target=sender.sendall, args=(bytes(_MESSAGE_BYTES),))
    thread.start()
    left, room = _MESSAGE_BYTES, bytearray(1 << 20)
    while left:
        left -= receiver.recv_into(room)
    thread.join()


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
    link = loopback_bytes_s()
    share = 1.0 / num_processes
    figures = {
        "bf16_tflops": Figure(flops * share / 1e12, "TFLOP/s", "measured", "numpy, fp32 products of 1024 cubed, now"),
        "memory_gb": Figure(memory * share / 1e9, "GB", "measured", "what the system tells"),
        "memory_gb_s": Figure(stream * share / 1e9, "GB/s", "measured", "numpy, passes over 4,096 states, now"),
        "link_gb_s": Figure(link / 1e9, CHIP_FIGURES["link_gb_s"], "measured", "TCP inside this machine, now"),
        "host_chips": Figure(float(num_processes), CHIP_FIGURES["host_chips"], "measured", "this machine is one host"),
    }
    hardware = Hardware(
        kind=f"this machine ({name})",
        bf16_flops=flops * share,
        fp8_flops=None,
        memory_bytes=memory * share,
        memory_bytes_s=stream * share,
        node_size=max(1, num_processes),
        host_size=max(1, num_processes),
        link_bytes_s=link,
        network_bytes_s=link,
        link_share=1.0,
        efficiency=0.7,
        overlap=0.0,
        launch_s=EAGER_CALLS * _CALL_S,
        memory_share=1.0,
        tile=16,
        link_latency_s=1e-4,
        sources=tuple(figures.items()),
    )
    return Cluster(
        "this machine",
        hardware,
        num_processes,
        fixed_bytes=_BASE_BYTES,
        allocator_factor=_ALLOCATOR,
        matches=("^cpu$",),
        fp32_rate=True,
    )
