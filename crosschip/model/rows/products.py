"""Products of rows with matrices in panels of `LANES` outputs, [out / LANES, in, LANES]; each thread takes panels.

A matrix is the address of its first number. `depth` are its inputs, `width` its outputs, filled up to whole panels.
"""

from __future__ import annotations

from typing import NamedTuple

from crosschip.model.rows.intrinsics import (
    LANES,
    MOST_TILE_ROWS,
    call,
    take_next,
    tile_1,
    tile_2,
    tile_3,
    tile_4,
    tile_5,
    tile_6,
)
from crosschip.model.rows.numbers import Step, floats, kernel

__all__ = ["Rows", "column", "every", "multiply", "multiply_by_head", "tile", "wait"]

PANEL_BYTES = 4 * LANES
"""Of one input of a panel, and from one panel's outputs to the next one's."""


class Rows(NamedTuple):
    """Rows of numbers: the address of row 0, that of the numbers of the rows in question, floats from row to row."""

    at: int
    which: int
    stride: int


@kernel
def every(step: Step, at: int, stride: int) -> Rows:
    """All of them, in their order."""
    return Rows(at, step.everyone_at, stride)


@kernel
def tile(n: int, x: Rows, weight: int, apart: int, depth: int, out: Rows, adds: int) -> None:
    """`LANES` outputs of `n` rows, whose sums stay in registers; `apart` are the floats from input to input."""
    if n == 1:
        tile_1(x.at, x.which, x.stride, weight, apart, depth, out.at, out.which, out.stride, adds)
    elif n == 2:
        tile_2(x.at, x.which, x.stride, weight, apart, depth, out.at, out.which, out.stride, adds)
    elif n == 3:
        tile_3(x.at, x.which, x.stride, weight, apart, depth, out.at, out.which, out.stride, adds)
    elif n == 4:
        tile_4(x.at, x.which, x.stride, weight, apart, depth, out.at, out.which, out.stride, adds)
    elif n == 5:
        tile_5(x.at, x.which, x.stride, weight, apart, depth, out.at, out.which, out.stride, adds)
    else:
        tile_6(x.at, x.which, x.stride, weight, apart, depth, out.at, out.which, out.stride, adds)


@kernel
def column(num_rows: int, x: Rows, panel: int, depth: int, out: Rows, adds: int) -> None:
    """`LANES` outputs of a product: row `x.which[i]` of x becomes row `out.which[i]` of out, or is added to it."""
    for first in range(0, num_rows, MOST_TILE_ROWS):
        own, to = Rows(x.at, x.which + 8 * first, x.stride), Rows(out.at, out.which + 8 * first, out.stride)
        tile(min(MOST_TILE_ROWS, num_rows - first), own, panel, LANES, depth, to, adds)


@kernel
def multiply(step: Step, counter: int, x: Rows, weight: int, bias: int, depth: int, out: Rows) -> None:
    """This thread's columns of a product of all rows; `out` is as wide as the product. A bias of 0 is none."""
    while True:
        panel = take_next(counter)
        if panel >= out.stride // LANES:
            return
        here = Rows(out.at + PANEL_BYTES * panel, out.which, out.stride)
        if bias:
            _fill(here, step.num_rows, bias + PANEL_BYTES * panel)
        column(step.num_rows, x, weight + PANEL_BYTES * depth * panel, depth, here, bias)


@kernel
def _fill(out: Rows, num_rows: int, numbers: int) -> None:
    own = floats(numbers, 0, LANES)
    for m in range(num_rows):
        row = floats(out.at, out.stride * m, LANES)
        for lane in range(LANES):
            row[lane] = own[lane]


@kernel
def multiply_by_head(
    step: Step, counter: int, x: Rows, x_apart: int, weight: int, depth: int, out: Rows, out_apart: int, width: int
) -> None:
    """This thread's columns of a product for each head; `x_apart` and `out_apart` floats lie from head to head."""
    panels = width // LANES
    while True:
        unit = take_next(counter)
        if unit >= step.heads * panels:
            return
        head, panel = unit // panels, unit % panels
        own = Rows(x.at + 4 * x_apart * head, x.which, x.stride)
        here = Rows(out.at + 4 * out_apart * head + PANEL_BYTES * panel, out.which, out.stride)
        column(step.num_rows, own, weight + PANEL_BYTES * depth * unit, depth, here, 0)


@kernel
def wait(step: Step) -> None:
    """Until all threads are here."""
    if step.barrier_at:
        call(step.barrier_at)
