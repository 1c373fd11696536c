"""Feed-forward networks of rows: the router, the experts that each row chose, and the one that all rows share."""

from __future__ import annotations

import numpy as np

from crosschip.model.rows.arithmetic import dot, exp, write_gated, write_unit_rms
from crosschip.model.rows.intrinsics import LANES, take_next
from crosschip.model.rows.numbers import Array, Layer, Step, address_of, floats, integers, kernel
from crosschip.model.rows.products import Rows, column, every

__all__ = ["activate", "choose_experts", "normalise_rows", "seated", "sum_up"]


@kernel
def _normalise(step: Step, m: int) -> Array:
    """Add to a row what the part before gave, and normalise it."""
    eps = floats(step.floats_at, 0, 3)[0]
    x_D = floats(step.x_at, m * step.hidden, step.hidden)
    normed_D = floats(step.normed_at, m * step.hidden, step.hidden)
    given_D = floats(step.out_at, m * step.hidden_width, step.hidden)
    for i in range(step.hidden):
        x_D[i] += given_D[i]
    write_unit_rms(x_D, eps, normed_D)
    return normed_D


@kernel
def normalise_rows(step: Step, counter: int) -> None:
    """`_normalise` of this thread's rows."""
    while True:
        m = take_next(counter)
        if m >= step.num_rows:
            return
        _normalise(step, m)


@kernel
def choose_experts(step: Step, layer: Layer, counter: int) -> None:
    """Rows after attention: normalised, and in a mixture the ids and shares of their experts."""
    scores, offers = np.empty(layer.experts, np.float32), np.empty(layer.experts, np.float32)
    while True:
        m = take_next(counter)
        if m >= step.num_rows:
            return
        normed_D = _normalise(step, m)
        if layer.experts:
            for e in range(layer.experts):
                router_D = floats(layer.router_at, e * step.hidden, step.hidden)
                scores[e] = np.float32(1) / (np.float32(1) + exp(-dot(normed_D, router_D)))
                offers[e] = scores[e] + floats(layer.router_bias_at, e, 1)[0]
            _drop_groups(step, offers)
            _choose_best(step, layer, m, scores, offers)


@kernel
def _drop_groups(step: Step, offers: Array) -> None:
    """Leave the groups whose two best offers have the greatest sums."""
    size = len(offers) // step.groups
    sums = np.empty(step.groups, np.float32)
    for group in range(step.groups):
        best, second = -np.float32(np.inf), -np.float32(np.inf)
        for offer in offers[group * size : (group + 1) * size]:
            if offer > best:
                best, second = offer, best
            elif offer > second:
                second = offer
        sums[group] = best + second
    for _ in range(step.groups - step.chosen_groups):
        worst = -1
        for group in range(step.groups):
            is_in = sums[group] < np.float32(np.inf)
            if is_in and (worst < 0 or sums[group] <= sums[worst]):
                worst = group
        sums[worst] = np.float32(np.inf)
        offers[worst * size : (worst + 1) * size] = -np.float32(np.inf)


@kernel
def _choose_best(step: Step, layer: Layer, m: int, scores: Array, offers: Array) -> None:
    """The experts with the greatest offers, and the shares that their scores give them."""
    ids = integers(layer.ids_at + 8 * m * step.chosen, step.chosen)
    shares = floats(step.shares_at, m * step.chosen, step.chosen)
    total = np.float32(0)
    for k in range(step.chosen):
        best = -1
        for e in range(len(offers)):
            is_free = True
            for earlier in range(k):
                is_free = is_free and ids[earlier] != e
            if is_free and (best < 0 or offers[e] > offers[best]):
                best = e
        ids[k] = best
        total += scores[best]
    factor = floats(step.floats_at, 0, 3)[2]
    scale = factor / (total + np.float32(1e-20)) if step.normalises else factor
    for k in range(step.chosen):
        shares[k] = scores[ids[k]] * scale


@kernel
def seated(step: Step, layer: Layer) -> tuple[Array, Array, Array]:
    """The rows that chose each expert, expert by expert, with their shares; expert e's are from `starts[e]` on."""
    num_choices = step.num_rows * step.chosen if layer.experts else 0
    ids, shares = integers(layer.ids_at, num_choices), floats(step.shares_at, 0, num_choices)
    starts = np.zeros(layer.experts + 2, np.int64)
    rows, own_shares = np.empty(num_choices, np.int64), np.empty(num_choices, np.float32)
    for choice in range(num_choices):
        starts[ids[choice] + 2] += 1
    for e in range(layer.experts):
        starts[e + 2] += starts[e + 1]
    for choice in range(num_choices):
        place = starts[ids[choice] + 1]
        rows[place], own_shares[place] = choice // step.chosen, shares[choice]
        starts[ids[choice] + 1] += 1
    return starts, rows, own_shares


@kernel
def activate(step: Step, layer: Layer, counter: int, starts: Array, rows: Array, shares: Array) -> None:
    """The inner numbers of networks: of the shared one for every row, of an expert for the rows that chose it."""
    scratch = np.empty((2, step.num_rows, LANES), np.float32)
    ones = np.ones(step.num_rows, np.float32)
    shared_panels, panels = layer.shared // LANES, layer.inner // LANES
    while True:
        unit = take_next(counter)
        if unit < shared_panels:
            weight = layer.shared_gate_up_at + 4 * LANES * step.hidden * unit
            out = step.shared_at + 4 * LANES * unit
            _activate_column(step, step.everyone_at, weight, layer.shared, ones, out, scratch)
            continue
        if unit >= shared_panels + layer.experts * panels:
            return
        e, panel = (unit - shared_panels) // panels, (unit - shared_panels) % panels
        first, last = starts[e], starts[e + 1]
        if first < last:
            weight = layer.gate_up_at + 4 * step.hidden * (2 * layer.inner * e + LANES * panel)
            out = step.routed_at + 4 * (layer.inner * first + LANES * panel)
            which = address_of(rows) + 8 * first
            _activate_column(step, which, weight, layer.inner, shares[first:last], out, scratch)


@kernel
def _activate_column(step: Step, which: int, weight: int, size: int, shares: Array, out: int, scratch: Array) -> None:
    """`LANES` inner numbers of as many rows as there are shares, of a network of `size`."""
    num_rows, hidden = len(shares), step.hidden
    gate, up = scratch[0], scratch[1]
    x = Rows(step.normed_at, which, hidden)
    column(num_rows, x, weight, hidden, every(step, address_of(gate), LANES), 0)
    column(num_rows, x, weight + 4 * hidden * size, hidden, every(step, address_of(up), LANES), 0)
    for i in range(num_rows):
        write_gated(gate[i], up[i], shares[i], floats(out, size * i, LANES))


@kernel
def sum_up(step: Step, layer: Layer, counter: int, starts: Array, rows: Array) -> None:
    """What the networks give: for each row the shared one's, then its experts' in their order."""
    width = step.hidden_width
    while True:
        panel = take_next(counter)
        if panel >= width // LANES:
            return
        out = step.out_at + 4 * LANES * panel
        x, weight = every(step, step.shared_at, layer.shared), layer.shared_down_at + 4 * LANES * layer.shared * panel
        column(step.num_rows, x, weight, layer.shared, every(step, out, width), 0)
        for e in range(layer.experts):
            first, last = starts[e], starts[e + 1]
            if first < last:
                x = every(step, step.routed_at + 4 * layer.inner * first, layer.inner)
                weight = layer.down_at + 4 * layer.inner * (width * e + LANES * panel)
                column(last - first, x, weight, layer.inner, Rows(out, address_of(rows) + 8 * first, width), 1)
