"""A decode step of small models, compiled for the CPU by numba: all layers in one call that a team of threads makes.

A step of one token a row is some 400 small operators, and to call one costs more than it computes. Here the threads
share a step: of each part of it, each takes the next piece that nobody has taken, and all wait for each other before
the next part. fp32. Whatever a row gives depends on that row alone: every sum has one order, whoever computes it.

M rows, D hidden size, H heads, N = qk_nope_head_dim, R = qk_rope_head_dim, V = v_head_dim, L = kv_lora_rank, X = L + R,
E experts, K experts per token, F inner size of an expert, G of the shared ones or of a dense network. Matrices come in
panels of `LANES` outputs, [out / LANES, in, LANES]; sizes of outputs are filled up to whole panels.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import cfunc, types
from numba.np.numpy_support import carray

from crosschip.model.rows.attention import attend, keep
from crosschip.model.rows.intrinsics import memory_at
from crosschip.model.rows.networks import activate, choose_experts, normalise_rows, seated, sum_up
from crosschip.model.rows.numbers import (
    CACHE_LINE,
    COUNTERS_A_LAYER,
    LAYER_TYPE,
    OPTIONS,
    STEP_TYPE,
    Layer,
    Step,
    kernel,
)
from crosschip.model.rows.products import every, multiply, multiply_by_head, wait

__all__ = ["take_step"]

logger = logging.getLogger("crosschip.model")


@kernel
def _attention(step: Step, layer: Layer, counters: int) -> None:
    normed, first = every(step, step.normed_at, step.hidden), every(step, step.first_at, step.first_width)
    multiply(step, counters + 1 * CACHE_LINE, normed, layer.first_at, layer.first_bias_at, step.hidden, first)
    wait(step)
    keep(step, layer, counters + 2 * CACHE_LINE)
    wait(step)
    q = every(step, step.q_at, step.q_width)
    if step.low_rank:
        low = every(step, step.low_at, step.low_rank)
        multiply(step, counters + 3 * CACHE_LINE, low, layer.q_up_at, 0, step.low_rank, q)
        wait(step)
    query, apart = every(step, step.query_at, step.heads * step.query_width), step.query_width
    counter = counters + 4 * CACHE_LINE
    multiply_by_head(step, counter, q, step.plain, layer.key_up_at, step.plain, query, apart, step.latent_width)
    wait(step)
    attend(step, layer, counters + 5 * CACHE_LINE)
    wait(step)
    mixed, apart = every(step, step.mixed_at, step.heads * step.latent_width), step.latent_width
    seen, width = every(step, step.seen_at, step.heads * step.values_width), step.values_width
    counter = counters + 6 * CACHE_LINE
    multiply_by_head(step, counter, mixed, apart, layer.value_up_at, step.latent, seen, width, width)
    wait(step)
    out = every(step, step.out_at, step.hidden_width)
    multiply(step, counters + 7 * CACHE_LINE, seen, layer.out_at, layer.out_bias_at, seen.stride, out)
    wait(step)


@kernel
def _feed_forward(step: Step, layer: Layer, counters: int) -> None:
    choose_experts(step, layer, counters + 8 * CACHE_LINE)
    wait(step)
    starts, rows, shares = seated(step, layer)
    activate(step, layer, counters + 9 * CACHE_LINE, starts, rows, shares)
    wait(step)
    sum_up(step, layer, counters + 10 * CACHE_LINE, starts, rows)
    wait(step)


def _compiled(digest: str) -> Any:
    """`digest` is part of the cache's key: a change in another file is one of this function, too."""

    def take_step(numbers: Any) -> None:
        if digest == "":
            return
        step = carray(numbers, 1, dtype=STEP_TYPE)[0]
        for number in range(step.num_layers):
            counters = step.counters_at + CACHE_LINE * COUNTERS_A_LAYER * number
            layer = carray(memory_at(step.layers_at), step.num_layers, dtype=LAYER_TYPE)[number]
            normalise_rows(step, counters)
            wait(step)
            _attention(step, layer, counters)
            _feed_forward(step, layer, counters)
        normalise_rows(step, step.counters_at + CACHE_LINE * COUNTERS_A_LAYER * step.num_layers)

    return _kept(take_step)


def _kept(function: Callable[[Any], None]) -> Any:
    """Compiled, or read from the cache: beside this file or, where that cannot be written, in the user's."""
    signature = types.void(types.voidptr)
    try:
        return cfunc(signature, cache=True, **OPTIONS)(function)
    except Exception as error:  # no place for a cache, a full disk, a file that was cut: numba raises what it meets
        compiled = cfunc(signature, **OPTIONS)(function)  # what is wrong with the function comes again here
        logger.warning("the compiled decode step is not kept, so each start compiles it (%r)", error)
        return compiled


_sources = sorted(Path(__file__).parent.glob("*.py"))
take_step = _compiled(hashlib.sha256(b"".join(source.read_bytes() for source in _sources)).hexdigest())
"""A function in compiled code: the address of the numbers of a `Step` is its argument."""
