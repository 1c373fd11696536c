"""What the threads of a step share: its sizes, and where everything lies. Addresses are 64-bit integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np
from numba import njit
from numba.np.numpy_support import carray
from numpy.typing import NDArray

from crosschip.model.rows.intrinsics import memory_at

__all__ = [
    "CACHE_LINE",
    "COUNTERS_A_LAYER",
    "LAYER_TYPE",
    "OPTIONS",
    "STEP_TYPE",
    "Array",
    "Layer",
    "Step",
    "address_of",
    "floats",
    "integers",
    "kernel",
]

Array = NDArray[Any]
_P = ParamSpec("_P")
_R = TypeVar("_R")

CACHE_LINE = 64
"""Bytes between two counters."""

COUNTERS_A_LAYER = 11

# Sums in any order, so that they fill vectors; infinities and NaN are what they are.
OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}


def kernel(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Compiled into the step, which is what is kept in a cache; no call from Python is prepared."""
    without: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    compiled: Any = njit(**OPTIONS, **without)(function)
    return compiled


class Step(NamedTuple):
    """Integers of a step, in the order in which `take_step` reads them; what ends in `_at` are addresses."""

    # The model's sizes, and where in a row of the first product the parts are that turn.
    num_rows: int
    num_layers: int
    hidden: int
    heads: int
    plain: int
    rotary: int
    latent: int
    low_rank: int
    chosen: int
    groups: int
    chosen_groups: int
    normalises: int
    first_turning: int
    key_column: int
    block: int
    table_width: int
    longest: int
    # Numbers from row to row, or from head to head, of what the parts hand on; whole panels.
    first_width: int
    q_width: int
    query_width: int
    latent_width: int
    values_width: int
    hidden_width: int
    # What is read, and where routes and places are written.
    layers_at: int
    rope_at: int
    start_at: int
    slots_at: int
    tables_at: int
    written_at: int
    shares_at: int
    everyone_at: int
    # What the parts of a layer hand on.
    x_at: int
    normed_at: int
    first_at: int
    low_at: int
    q_at: int
    query_at: int
    mixed_at: int
    seen_at: int
    out_at: int
    shared_at: int
    routed_at: int
    # What the threads share.
    counters_at: int
    floats_at: int  # eps of norms, eps of the latent's norm, factor of routed experts
    barrier_at: int  # a function that waits for all threads; 0: there is one thread


class Layer(NamedTuple):
    """Addresses of a layer's matrices and its rows of the cache, and its sizes; 0 is an address of nothing."""

    first_at: int
    first_bias_at: int
    q_up_at: int
    key_up_at: int
    value_up_at: int
    out_at: int
    out_bias_at: int
    router_at: int
    router_bias_at: int
    gate_up_at: int
    down_at: int
    shared_gate_up_at: int
    shared_down_at: int
    cache_at: int
    ids_at: int
    experts: int
    inner: int
    shared: int


STEP_TYPE = np.dtype([(name, np.int64) for name in Step._fields])
LAYER_TYPE = np.dtype([(name, np.int64) for name in Layer._fields])
"""Kernels get a record in memory where it says `Step` and `Layer`."""


@kernel
def floats(address: int, start: int, size: int) -> Array:
    """`size` numbers from `start` on."""
    return carray(memory_at(address + 4 * start), size, dtype=np.float32)


@kernel
def integers(address: int, size: int) -> Array:
    """`size` integers."""
    return carray(memory_at(address), size, dtype=np.int64)


@kernel
def address_of(array: Array) -> Any:
    """Signed: numba makes a sum of signed and unsigned integers a float."""
    return np.int64(array.ctypes.data)
