"""Which inputs an operator call is examined on: shapes, strides and values. No torch.

The recorded call comes first, as it is. Draws that are pooled for the judge are smaller along free dimensions only;
among them are an offset (zero-mean data hides wrong sums), a larger scale, and the edges: sizes beside powers of two
and tile sizes, length 1, empty, other strides.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from crosschip.qualify.exams.operators.index_range import to_the_last_place
from crosschip.qualify.exams.operators.shapes import (
    Dimensions,
    Encoded,
    is_contraction,
    num_elements,
    strided_otherwise,
    with_each_tensor,
)
from crosschip.qualify.judging.judge import MIN_OUTPUTS
from crosschip.qualify.tracing.trace import TracedCall, tensor_specs

__all__ = [
    "NUM_POOLED",
    "PlannedDraw",
    "capped",
    "edges",
    "integer_draws",
    "pooled",
    "recorded",
    "shorter_lists",
    "slopes",
]

NUM_POOLED = 32
_OUTPUTS_EACH = MIN_OUTPUTS // NUM_POOLED
_MOST_OUTPUTS = 65_536
_MOST_PRODUCTS = 1 << 23  # of a contraction whose every honest order is computed
_LARGEST_DRAW = 1 << 18  # elements of a draw whose every honest implementation is computed
_SLOPE_SIZES = (32, 128, 512, 2048)
_DRAWS_EACH_SIZE = 6
_LARGEST_EDGE = 1 << 17
_LONGEST_LIST = 6


@dataclass(frozen=True)
class PlannedDraw:
    """One set of inputs: the encoded call, the seed of its values, and in words where it comes from.

    `repeats` calls with seeds one after the other count as one draw, where a single call has few outputs.
    """

    label: str
    encoded: Encoded
    seed: int
    repeats: int = 1
    size: int = 0  # K, where it is one of several
    other: frozenset[str] = frozenset()  # dimensions that have another size than in the recorded call
    empty: frozenset[str] = frozenset()  # those of them that have size 0


def recorded(call: TracedCall, seed: int) -> PlannedDraw:
    """The call as it was recorded."""
    return PlannedDraw("as recorded", (call.args, call.kwargs), seed)


def shorter_lists(call: TracedCall) -> TracedCall:
    """The call with long lists of tensors cut to a few, the longest and the shortest tensors among them."""
    lists = [value for value in [*call.args, *call.kwargs.values()] if _is_list_of_tensors(value)]
    lengths = {len(each) for each in lists if len(each) > _LONGEST_LIST}
    if len(lengths) != 1 or call.operator.startswith(("aten.cat", "aten.stack")):
        return call
    by_size = sorted(range(lengths.pop()), key=lambda n: math.prod(lists[0][n]["tensor"]["shape"]))
    last = len(by_size) - 1
    kept = sorted({by_size[last * n // (_LONGEST_LIST - 1)] for n in range(_LONGEST_LIST)})

    def cut(value: Any) -> Any:
        long = _is_list_of_tensors(value) and len(value) > _LONGEST_LIST
        return [value[n] for n in kept] if long else value

    kwargs = {name: cut(value) for name, value in call.kwargs.items()}
    return replace(call, args=[cut(value) for value in call.args], kwargs=kwargs)


def _is_list_of_tensors(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) and "tensor" in v for v in value)


def capped(call: TracedCall, dims: Dimensions, most_outputs: int, most_elements: int) -> dict[str, int]:
    """Sizes of the call with free dimensions halved, the longest first, until it is as small as asked."""
    sizes = dict(dims.sizes)
    encoded = (call.args, call.kwargs)
    contraction = is_contraction(call.operator)
    while True:
        free = [name for name in dims.free if sizes[name] > 1]
        outputs = _num_outputs(dims, sizes, contraction)
        work = outputs * sizes.get("K", 1) if contraction else 0
        small = outputs <= most_outputs and work <= _MOST_PRODUCTS
        if not free or (small and (contraction or num_elements(dims.resized(encoded, sizes)) <= most_elements)):
            return sizes
        longest = max(free, key=lambda name: sizes[name])
        sizes[longest] = -(-sizes[longest] // 2)


def _num_outputs(dims: Dimensions, sizes: dict[str, int], contraction: bool) -> int:
    """About how many independent outputs the call has."""
    counted = set(dims.free) if dims.reduces else set(sizes)
    if contraction:
        return math.prod(sizes[name] for name in dims.free)
    counts = [math.prod(sizes[name] for name in names if name in counted) for names in dims.of_tensors]
    return sum(counts) // dims.num_lists if dims.num_lists else max(counts, default=1)


def pooled(
    call: TracedCall, dims: Dimensions, first: int, number: int, seed: int, most_repeats: int
) -> Iterator[PlannedDraw]:
    """Draws `first` to `first + number`: two in every 32 as large as allowed, the others as small as suffices."""
    large = capped(call, dims, _MOST_OUTPUTS, _LARGEST_DRAW)
    small = capped(call, dims, _OUTPUTS_EACH * 5 // 4, _LARGEST_DRAW)
    outputs = _num_outputs(dims, small, is_contraction(call.operator))
    repeats = min(most_repeats, max(1, math.ceil(_OUTPUTS_EACH / max(1, outputs))))
    for place in range(first, first + number):
        is_large = place % NUM_POOLED in (0, 17) and large != small
        encoded = dims.resized((call.args, call.kwargs), large if is_large else small)
        kind, values = _kind_of_values(place)
        label = f"{kind}{', large' if is_large else ''}"
        yield PlannedDraw(label, with_each_tensor(encoded, values), seed + 131 * place, 1 if is_large else repeats)


def _kind_of_values(place: int) -> tuple[str, Any]:
    if place % 4 == 1:
        return "with an offset", _with_offset
    if place % 8 == 3:
        return "four times as large", lambda spec: _scaled(spec, 4.0)
    if place % 8 == 7:
        return "spread", _spread
    return "as recorded", lambda spec: spec


def _with_offset(spec: dict[str, Any]) -> dict[str, Any]:
    spec = _spread(spec)
    quantiles = spec["values"].get("quantiles")
    if not quantiles:
        return spec
    middle = quantiles[4:-4]
    offset = math.sqrt(sum(each * each for each in middle) / len(middle))
    return _with_quantiles(spec, [each + offset for each in quantiles])


def _scaled(spec: dict[str, Any], factor: float) -> dict[str, Any]:
    quantiles = _spread(spec)["values"].get("quantiles")
    return _with_quantiles(spec, [each * factor for each in quantiles]) if quantiles else spec


def _spread(spec: dict[str, Any]) -> dict[str, Any]:
    """Values of one constant become values around it: a constant shows one rounding only."""
    values = spec["values"]
    constant = values.get("constant", values["quantiles"][0] if values.get("quantiles") else None)
    if not isinstance(constant, int | float) or not spec["dtype"].startswith(("float", "bfloat")):
        return spec
    if constant == 0 or ("quantiles" in values and values["quantiles"][-1] != constant):
        return spec
    return _with_quantiles(spec, [constant * (0.5 + n / 32) for n in range(33)])


def _with_quantiles(spec: dict[str, Any], quantiles: Sequence[float]) -> dict[str, Any]:
    values = {name: value for name, value in spec["values"].items() if name not in ("constant", "literal")}
    return {**spec, "values": {**values, "quantiles": sorted(quantiles)}}


def edges(call: TracedCall, dims: Dimensions, seed: int, most: int) -> list[PlannedDraw]:
    """Calls beside the recorded one: other strides, and at most `most` odd sizes, length 1 and empty among them. Some
    may be no valid calls.
    """
    small = capped(call, dims, _OUTPUTS_EACH * 5 // 4, _LARGEST_DRAW)
    encoded = (call.args, call.kwargs)
    found = []
    for number, sizes in enumerate(_odd_sizes(call, dims, small)):
        words = ", ".join(f"{name.removeprefix('size ')} is {size}" for name, size in sizes.items())
        changed = frozenset(name for name, size in sizes.items() if size != dims.sizes[name])
        empty = frozenset(name for name, size in sizes.items() if size == 0)
        resized = dims.resized(encoded, {**small, **sizes})
        found.append(PlannedDraw(f"where {words}", resized, seed + 7 * number, other=changed, empty=empty))
    chosen = [draw for draw in found if num_elements(draw.encoded) <= _LARGEST_EDGE][:most]
    strided = [
        PlannedDraw(f"strides {name}", other, seed + 5)
        for name, other in strided_otherwise(dims.resized(encoded, small))
        if num_elements(other) <= _LARGEST_EDGE
    ]
    return [*_last_places(call, [dims.resized(encoded, small), encoded], seed), *strided, *chosen]


def _last_places(call: TracedCall, calls: Sequence[Encoded], seed: int) -> Iterator[PlannedDraw]:
    for encoded in calls:
        whole = to_the_last_place(call.operator, encoded)
        if whole is not None and num_elements(whole) <= _LARGEST_DRAW:
            yield PlannedDraw("indices up to the last place", whole, seed + 3)


def _odd_sizes(call: TracedCall, dims: Dimensions, small: dict[str, int]) -> Iterator[dict[str, int]]:
    """What is to be made first comes first, each dimension in its turn: there may be no time for all."""
    if is_contraction(call.operator) and {"M", "N", "K"} <= set(dims.sizes):
        depth = dims.sizes["K"]
        for m, n, k in (
            (1, 1, 1), (15, 17, depth), (0, 16, depth), (5, 7, 0), (17, 16, depth + 1), (1, 33, depth),
            (31, 1, depth), (16, 15, depth - 1), (129, 3, depth), (3, 127, depth), (65, 63, 33), (33, 31, 127),
        ):  # fmt: skip
            yield {"M": m, "N": n, "K": max(0, k)}
        return
    names = dims.free[:2]
    for turn, other in enumerate((17, 0, 1, 33, 127, 15, 129)):
        for name in dims.sizes:
            deep = (small[name] + 1, 1, max(1, small[name] - 1))
            # No model has no heads, and torch 2.11's CPU attention dies of a division by their number.
            if name in dims.deep and turn < len(deep):
                yield {name: deep[turn]}
            elif name not in dims.deep and (other or name != "H"):
                yield {name: other}
        if len(names) == 2 and turn < 3:
            yield dict(zip(names, ((17, 15), (1, 1), (33, 31))[turn], strict=True))


def slopes(call: TracedCall, dims: Dimensions, seed: int) -> list[PlannedDraw]:
    """Draws of several K, the only thing in which they differ; empty when the call has no K that can be varied."""
    (name, *others) = sorted(dims.deep) or [""]
    if not name or others:
        return []
    small = capped(call, dims, 64, _LARGEST_DRAW)
    found = []
    for size, number in itertools.product(_SLOPE_SIZES, range(_DRAWS_EACH_SIZE)):
        encoded = dims.resized((call.args, call.kwargs), {**small, name: size})
        values = _standard if number % 2 else _with_offset
        found.append(
            PlannedDraw(f"K = {size}", with_each_tensor(encoded, values), seed + 31 * number + size, size=size)
        )
    return found


def _standard(spec: dict[str, Any]) -> dict[str, Any]:
    return {**spec, "values": {"normal": [0.0, 1.0]}} if "quantiles" in spec["values"] else spec


def integer_draws(call: TracedCall, dims: Dimensions, seed: int) -> Iterator[PlannedDraw]:
    """Products and sums of integers, which any honest chip has exactly.

    Sums stay below 2^24, so fp32 holds each partial sum whatever the order. A narrower result holds small integers and
    round ones; outputs that it cannot hold are not looked at.
    """
    floats = [spec for spec in tensor_specs([call.args, call.kwargs]) if spec["dtype"].startswith(("float", "bfloat"))]
    if not floats:
        return
    depth = max((dims.sizes[name] for name in dims.deep), default=1)
    if not is_contraction(call.operator):
        most = max(
            1, min(_largest_integer(floats[0]["dtype"]), 2**24 // max(1, num_elements((call.args, call.kwargs))))
        )
        yield _with_values("integers", (call.args, call.kwargs), [{"small_integers": min(3, most)}], seed)
        return
    full = (call.args, call.kwargs)
    small = dims.resized(full, capped(call, dims, 4 * _OUTPUTS_EACH, _LARGEST_DRAW))
    largest = _largest_integer(floats[-1]["dtype"])
    share = min(0.5, math.sqrt(largest / 2 / depth))
    yield _with_values("zeros and ones", full, [{"zero_one": share}], seed)
    signed = max(1, min(largest, math.isqrt(2**24 // depth)))
    narrow = max(1, math.isqrt(int(largest / (4 * math.sqrt(depth)))))
    yield _with_values("small integers", full, [{"small_integers": min(signed, narrow)}], seed + 1)
    digits = min(largest, 4095, 2**24 // depth)
    for turn in (0, 1):
        pair: list[dict[str, Any]] = [{"small_integers": digits}, {"zero_one": 1 / depth if largest <= 256 else 0.5}]
        yield _with_values("integers of full width", small, pair[:: -1 if turn else 1], seed + 2 + turn)
    for longer in (depth, 384, 3072, 12288):  # round numbers: three times a power of two, which each dtype holds
        resized = dims.resized(small, {"K": longer}) if longer != depth else small
        yield _with_values(f"ones over K = {longer}", resized, [{"constant": 1.0}], seed)


def _largest_integer(dtype: str) -> int:
    """Up to here each integer is a number of the dtype."""
    return {"bfloat16": 2**8, "float16": 2**11}.get(dtype, 2**24)


def _with_values(label: str, encoded: Encoded, values: Sequence[dict[str, Any]], seed: int) -> PlannedDraw:
    """The call with its floating-point tensors' values replaced, in turn; a bias and what is written get the first."""
    number = -1

    def change(spec: dict[str, Any]) -> dict[str, Any]:
        nonlocal number
        if not spec["dtype"].startswith(("float", "bfloat")):
            return spec
        number += 1
        return {**spec, "values": values[number % len(values)]}

    return PlannedDraw(label, with_each_tensor(encoded, change), seed)
