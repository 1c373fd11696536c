"""Rows' own latents and keys to the cache, and what rows read from it; in the latent space."""

from __future__ import annotations

import numpy as np

from crosschip.model.rows.arithmetic import dot, write_softmax, write_turned, write_unit_rms
from crosschip.model.rows.intrinsics import LANES, MOST_TILE_ROWS, dots_1, dots_2, dots_4, take_next
from crosschip.model.rows.numbers import Array, Layer, Step, address_of, floats, integers, kernel
from crosschip.model.rows.products import Rows, tile

__all__ = ["attend", "keep"]


@kernel
def _rotation(step: Step, m: int) -> tuple[Array, Array]:
    half = step.rotary // 2
    position = integers(step.start_at, step.num_rows)[m]
    table = floats(step.rope_at, position * step.rotary, step.rotary)
    return table[:half], table[half:]


@kernel
def keep(step: Step, layer: Layer, counter: int) -> None:
    """Rows' latents and rotated keys to the cache; and the norm of what the queries come from."""
    latent_eps = floats(step.floats_at, 0, 3)[1]
    latent, rotary = step.latent, step.rotary
    start, slots = integers(step.start_at, step.num_rows), integers(step.slots_at, step.num_rows)
    written = integers(step.written_at, step.num_rows)
    while True:
        m = take_next(counter)
        if m >= step.num_rows:
            return
        first = floats(step.first_at, m * step.first_width, step.first_width)
        table = integers(step.tables_at + 8 * step.table_width * slots[m], step.table_width)
        place = table[start[m] // step.block] * step.block + start[m] % step.block
        written[m] = place
        row_X = floats(layer.cache_at, place * (latent + rotary), latent + rotary)
        key, own = step.key_column, step.key_column + rotary
        write_unit_rms(first[own : own + latent], latent_eps, row_X[:latent])
        cos_r, sin_r = _rotation(step, m)
        write_turned(first[key:own], cos_r, sin_r, row_X[latent:])
        if step.low_rank:
            low = floats(step.low_at, m * step.low_rank, step.low_rank)
            write_unit_rms(first[: step.low_rank], latent_eps, low)


@kernel
def attend(step: Step, layer: Layer, counter: int) -> None:
    """Heads of rows over the cached positions up to their own, in the latent space."""
    own_heads = step.heads if step.num_rows > 1 else 1  # of one row each thread takes some
    units_a_row = step.heads // own_heads
    scores = np.empty((own_heads, step.longest), np.float32)
    while True:
        unit = take_next(counter)
        if unit >= step.num_rows * units_a_row:
            return
        _attend_from(step, layer, unit // units_a_row, unit % units_a_row * own_heads, own_heads, scores)


@kernel
def _attend_from(step: Step, layer: Layer, m: int, head: int, num_heads: int, scores: Array) -> None:
    """Some heads of a row; `scores` has room for theirs."""
    latent, width = step.latent, step.latent + step.rotary
    cos_r, sin_r = _rotation(step, m)
    for h in range(head, head + num_heads):
        turning = floats(step.q_at, m * step.q_width + step.first_turning + h * step.rotary, step.rotary)
        query = floats(step.query_at, (m * step.heads + h) * step.query_width, width)
        write_turned(turning, cos_r, sin_r, query[latent:])
    queries = step.query_at + 4 * (m * step.heads + head) * step.query_width
    length = integers(step.start_at, step.num_rows)[m] + 1
    slot = integers(step.slots_at, step.num_rows)[m]
    table = integers(step.tables_at + 8 * step.table_width * slot, step.table_width)
    for first in range(0, length, step.block):
        rows = layer.cache_at + 4 * width * step.block * table[first // step.block]
        for s in range(min(step.block, length - first)):
            _score(queries, step.query_width, num_heads, rows + 4 * width * s, width, scores, first + s)
    for h in range(num_heads):
        write_softmax(scores[h, :length])
    mixed = step.mixed_at + 4 * (m * step.heads + head) * step.latent_width
    for first in range(0, length, step.block):
        rows = layer.cache_at + 4 * width * step.block * table[first // step.block]
        _mix(step, scores, num_heads, first, min(step.block, length - first), rows, mixed)


@kernel
def _score(queries: int, stride: int, num_heads: int, row: int, width: int, scores: Array, s: int) -> None:
    """The product of a cached row with each head's query."""
    whole, apart = width // LANES * LANES, scores.shape[1]
    out = address_of(scores) + 4 * s
    h = 0
    while h < num_heads:
        own, to = queries + 4 * stride * h, out + 4 * apart * h
        if num_heads - h >= 4:
            dots_4(own, stride, row, whole, to, apart)
            h += 4
        elif num_heads - h >= 2:
            dots_2(own, stride, row, whole, to, apart)
            h += 2
        else:
            dots_1(own, stride, row, whole, to, apart)
            h += 1
    if whole < width:
        rest = floats(row, whole, width - whole)
        for h in range(num_heads):
            scores[h, s] += dot(floats(queries, stride * h + whole, width - whole), rest)


@kernel
def _mix(step: Step, scores: Array, num_heads: int, first: int, size: int, rows: int, mixed: int) -> None:
    """Add cached rows' latents, weighted, to each head's."""
    width, whole, everyone = step.latent + step.rotary, step.latent // LANES * LANES, step.everyone_at
    weights, apart = address_of(scores) + 4 * first, scores.shape[1]
    for h in range(0, num_heads, MOST_TILE_ROWS):
        n = min(MOST_TILE_ROWS, num_heads - h)
        for column in range(0, whole, LANES):
            own = Rows(weights + 4 * apart * h, everyone, apart)
            out = Rows(mixed + 4 * (step.latent_width * h + column), everyone, step.latent_width)
            tile(n, own, rows + 4 * column, width, size, out, first)
    for h in range(num_heads):
        for column in range(whole, step.latent):
            total = floats(mixed, step.latent_width * h + column, 1)
            if first == 0:
                total[0] = np.float32(0)
            for s in range(size):
                total[0] += scores[h, first + s] * floats(rows, s * width + column, 1)[0]
