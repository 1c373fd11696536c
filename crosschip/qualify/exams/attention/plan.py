"""Which cases of attention are asked: what the subject's trace shows, and a battery around it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from crosschip.qualify.exams.attention.case import AttentionCase
from crosschip.qualify.finding import Tier
from crosschip.qualify.tracing.trace import Trace, TracedCall, tensor_specs

__all__ = [
    "LADDER",
    "Geometry",
    "accuracy_cases",
    "battery",
    "features",
    "geometries",
    "gradient_battery",
    "smaller_cases",
    "traced_case",
    "with_length",
]

LADDER = (1, 15, 16, 17, 127, 128, 129, 511, 512, 513, 1024, 2048, 4096, 8192)
_FEW_QUERIES = 8  # on the ladder: the cost grows with the length then, not with its square
_LONGEST_SQUARE = {"smoke": 1024, "standard": 4096, "soak": 4096}


@dataclass(frozen=True)
class Geometry:
    """One way in which the subject calls attention; sizes as in `AttentionCase`."""

    way: str
    dtype: str
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_size: int
    value_size: int
    causal: bool = False
    mask_shape: str = "none"
    mask_kind: str = "none"
    scale: float | None = None
    traced: bool = True


def geometries(trace: Trace) -> list[Geometry]:
    """The subject's ways of attention: fused calls, and chains of product, softmax and product with fitting shapes."""
    found = [_fused(call) for call in trace.calls if _is_fused(call.operator)]
    found += [chain for call in trace.calls if "softmax" in call.operator for chain in _chains(call, trace)]
    return list(dict.fromkeys(found))


def _is_fused(operator: str) -> bool:
    return ("scaled_dot_product" in operator or "fused_attention" in operator) and "backward" not in operator


def _fused(call: TracedCall) -> Geometry:
    query, key, value, *_ = [_as_4d(spec["shape"]) for spec in tensor_specs(call.args)]
    masks = [spec for spec in list(tensor_specs([call.args, call.kwargs]))[3:] if spec["dtype"] != "int64"]
    flags = [value for value in [*call.args, call.kwargs.get("is_causal")] if value is True]
    scale = call.kwargs.get("scale")
    shape, kind = "none", "none"
    if masks:
        shape = _mask_letters(masks[0]["shape"], query, key)
        kind = "boolean" if masks[0]["dtype"] == "bool" else "-inf"
    return Geometry(
        way="fused",
        dtype=next(tensor_specs(call.args))["dtype"],
        batch=query[0],
        heads=query[1],
        kv_heads=key[1],
        queries=query[2],
        keys=key[2],
        head_size=query[3],
        value_size=value[3],
        causal=bool(flags),
        mask_shape=shape,
        mask_kind=kind,
        scale=float(scale) if isinstance(scale, int | float) else None,
    )


def _as_4d(shape: list[int]) -> list[int]:
    return [*[1] * (4 - len(shape)), *shape]


def _mask_letters(shape: list[int], query: list[int], key: list[int]) -> str:
    names = list(zip("BHTS", [query[0], query[1], query[2], key[2]], strict=True))[4 - len(shape) :]
    return "".join("1" if size == 1 and full != 1 else name for size, (name, full) in zip(shape, names, strict=True))


def _chains(softmax: TracedCall, trace: Trace) -> Iterator[Geometry]:
    """A softmax over the last dimension between two batched products of fitting shapes is taken for attention."""
    scores = next(tensor_specs(softmax.args))["shape"]
    if "backward" in softmax.operator or len(scores) < 3:
        return
    products = [
        _flat_product(call) for call in trace.calls if call.operator in ("aten.bmm.default", "aten.baddbmm.default")
    ]
    size = (math.prod(scores[:-1]), scores[-1])
    for groups, rows, inner, columns, dtype in products:
        if (groups * rows, columns) != size:
            continue
        for other_groups, other_rows, other_inner, value_size, _ in products:
            if (other_groups, other_rows, other_inner) == (groups, rows, columns):
                yield Geometry("plain", dtype, 1, groups, groups, rows, columns, inner, value_size)


def _flat_product(call: TracedCall) -> tuple[int, int, int, int, str]:
    left, right = list(tensor_specs(call.args))[-2:]
    return left["shape"][0], left["shape"][1], left["shape"][2], right["shape"][2], left["dtype"]


def traced_case(geometry: Geometry) -> AttentionCase:
    """The subject's own call as a case, with few rows where the call has many."""
    grouped = geometry.heads // geometry.kv_heads
    kv_heads = min(geometry.kv_heads, 8)
    square = geometry.causal and geometry.queries == geometry.keys
    longest = min(geometry.keys, 1024) if square else geometry.keys
    return AttentionCase(
        way=geometry.way,
        dtype=geometry.dtype,
        batch=min(geometry.batch, 2),
        heads=kv_heads * grouped,
        kv_heads=kv_heads,
        queries=longest if square else min(geometry.queries, 64),
        keys=longest,
        head_size=geometry.head_size,
        value_size=geometry.value_size,
        mask_shape=geometry.mask_shape,
        mask_kind=geometry.mask_kind,
        causal=geometry.causal,
        scale=geometry.scale,
        layout="transposed" if geometry.way == "fused" else "contiguous",
    )


def battery(geometry: Geometry, longest: int, tier: Tier) -> Iterator[AttentionCase]:
    """All cases around a geometry: lengths first, since they are most often wrong, then masks, sizes, layouts."""
    grouped = max(1, geometry.heads // geometry.kv_heads)
    kv_heads = max(1, min(geometry.kv_heads, 4 // grouped) if grouped < 4 else 1)
    base = AttentionCase(
        way=geometry.way,
        dtype=geometry.dtype,
        batch=2,
        heads=kv_heads * grouped,
        kv_heads=kv_heads,
        queries=33,
        keys=47,
        head_size=geometry.head_size,
        value_size=geometry.value_size,
    )
    for seed in range(1 if tier == "smoke" else 3):
        for make in (_lengths, _masks, _causal, _sizes, _layouts, _special_values):
            for case in make(base, longest, tier):
                yield replace(case, seed=seed)


def _lengths(base: AttentionCase, longest: int, tier: Tier) -> Iterator[AttentionCase]:
    steps = [keys for keys in LADDER if keys <= longest]
    if longest > steps[-1]:
        steps.append(longest)
    few = replace(base, batch=1, queries=_FEW_QUERIES)
    for keys in steps:
        yield replace(few, keys=keys)
        if keys > 1:  # hiding the only key is another case
            yield replace(few, keys=keys, mask_shape="TS", mask_kind="boolean")
            yield replace(few, keys=keys, mask_shape="B11S", mask_kind="-inf")
            yield replace(few, keys=keys, queries=1, batch=2, mask_shape="B1TS", mask_kind="large negative")
        if keys <= _LONGEST_SQUARE[tier]:
            heads = max(1, base.heads // base.kv_heads)
            square = replace(base, batch=1, heads=heads, kv_heads=1) if keys > 256 else base
            yield replace(square, queries=keys, keys=keys, causal=True)


def _masks(base: AttentionCase, longest: int, tier: Tier) -> Iterator[AttentionCase]:
    shapes = ["S", "TS", "1S", "11TS", "B1TS", "B11S", "BHTS", "1HTS", "1TS", "HTS", "H1S"]
    for queries, keys in ((33, 47), (70, 70), (1, 70)):
        sized = replace(base, queries=queries, keys=keys)
        for shape in shapes:
            for kind in ("boolean", "-inf", "large negative"):
                yield replace(sized, mask_shape=shape, mask_kind=kind)
    for pattern in ("padding", "causal", "sliding"):
        shape = "B11S" if pattern == "padding" else "11TS"
        for kind in ("boolean", "-inf"):
            yield replace(base, queries=65, keys=65, mask_shape=shape, mask_kind=kind, pattern=pattern)
    yield replace(base, mask_shape="BHTS", mask_kind="boolean", pattern="some rows empty")


def _causal(base: AttentionCase, longest: int, tier: Tier) -> Iterator[AttentionCase]:
    for queries, keys in ((2, 2), (33, 33), (64, 64), (65, 65), (1, 40), (17, 40), (64, 65), (40, 17), (65, 64)):
        yield replace(base, queries=queries, keys=keys, causal=True)


def _sizes(base: AttentionCase, longest: int, tier: Tier) -> Iterator[AttentionCase]:
    masked = replace(base, mask_shape="TS", mask_kind="boolean")
    size = base.head_size
    for other in sorted({1, 8, size - 1, size + 1, 33, 36, 40, 64, 80, 96, 128, 192, 256} - {0}):
        yield replace(masked, head_size=other, value_size=other)
    for head_size, value_size in ((size, size + 1), (size + 1, size), (48, 32), (32, 48), (192, 128), (64, 128)):
        yield replace(masked, head_size=head_size, value_size=value_size)
    for heads, kv_heads in ((1, 1), (3, 3), (16, 16), (4, 2), (4, 1), (6, 3), (8, 2)):
        yield replace(base, heads=heads, kv_heads=kv_heads)
        yield replace(masked, heads=heads, kv_heads=kv_heads)
        yield replace(base, queries=33, keys=33, heads=heads, kv_heads=kv_heads, causal=True)
    for batch in (1, 3, 8, 33):
        yield replace(masked, batch=batch)
        yield replace(base, batch=batch)


def _layouts(base: AttentionCase, longest: int, tier: Tier) -> Iterator[AttentionCase]:
    for layout in ("transposed", "sliced", "expanded"):
        laid = replace(base, layout=layout)
        yield laid
        yield replace(laid, mask_shape="TS", mask_kind="boolean")
        yield replace(laid, queries=33, keys=33, causal=True)
    for scale in (1.0, 0.5, 0.03):
        yield replace(base, scale=scale)
        yield replace(base, scale=scale, mask_shape="B1TS", mask_kind="-inf")
        yield replace(base, scale=scale, queries=33, keys=33, causal=True)


def _special_values(base: AttentionCase, longest: int, tier: Tier) -> Iterator[AttentionCase]:
    for values in ("equal keys", "one hot", "constant values", "large"):
        for keys in (47, 129):
            yield replace(base, values=values, keys=keys)
            yield replace(base, values=values, keys=keys, mask_shape="1S", mask_kind="boolean")


def features(case: AttentionCase) -> dict[str, Any]:
    """What a failure may depend on, the likeliest first."""
    masked = case.mask_shape != "none"
    if case.queries == case.keys:
        lengths = "equal"
    else:
        lengths = "fewer queries than keys" if case.queries < case.keys else "more queries than keys"
    return {
        "number of keys": case.keys,
        "mask": "given" if masked else "causal flag" if case.causal else "none",
        "number of mask dimensions": str(len(case.mask_shape)) if masked else "none",
        "mask shape": f"[{', '.join(case.mask_shape)}]" if masked else "none",
        "mask kind": case.mask_kind,
        "mask pattern": case.pattern if masked else "none",
        "lengths": lengths,
        "number of queries": case.queries,
        "head size": case.head_size,
        "value head size": case.value_size,
        "largest power of two in the head size": case.head_size & -case.head_size,
        "head sizes": "equal" if case.head_size == case.value_size else "unequal",
        "key and value heads": "as many as query heads" if case.heads == case.kv_heads else "fewer, in groups",
        "number of heads": case.heads,
        "batch": case.batch,
        "scale": "default" if case.scale is None else "given",
        "layout": case.layout,
        "values": case.values,
    }


def with_length(case: AttentionCase, feature: str, length: int) -> AttentionCase:
    """The same case with another number of keys or queries, as the feature's name says; of both if they were equal."""
    if case.queries == case.keys:
        return replace(case, queries=length, keys=length)
    return replace(case, keys=length) if feature == "number of keys" else replace(case, queries=length)


_SIZES: dict[str, int] = {
    "batch": 1,
    "heads": 1,
    "kv_heads": 1,
    "queries": 1,
    "keys": 1,
    "head_size": 1,
    "value_size": 1,
}


def smaller_cases(parameters: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Parameters of a case with one thing less: a size halved or one smaller, equal sizes also together."""
    groups = [["heads", "kv_heads"], ["queries", "keys"], ["head_size", "value_size"], *[[name] for name in _SIZES]]
    for halve in (True, False):
        for names in groups:
            sizes = {name: parameters[name] // 2 if halve else parameters[name] - 1 for name in names}
            equal = len({parameters[name] for name in names}) == 1
            possible = min(sizes.values()) >= 1
            made = {**parameters, **sizes}
            if equal and possible and made["heads"] % made["kv_heads"] == 0:
                yield made


def gradient_battery(geometry: Geometry, longest: int, tier: Tier) -> Iterator[AttentionCase]:
    """Cases for gradients: fewer, since each costs a backward pass on both sides."""
    base = next(battery(geometry, longest, tier))
    base = replace(base, batch=2, queries=33, keys=47, values="aimed past")
    for keys in (17, 64, 129, 512, 513, 1024, 2048, 4096):
        if keys <= longest:
            few = replace(base, batch=1, queries=_FEW_QUERIES, keys=keys)
            yield replace(few, mask_shape="TS", mask_kind="boolean")
            yield replace(few, mask_shape="B11S", mask_kind="-inf")
        if keys <= min(longest, 513):
            yield replace(base, batch=1, queries=keys, keys=keys, causal=True)
    for shape in ("1S", "11TS", "B1TS", "BHTS", "1HTS", "HTS"):
        yield replace(base, mask_shape=shape, mask_kind="boolean")
        yield replace(base, mask_shape=shape, mask_kind="large negative")
    yield base
    for case in [case for make in (_causal, _layouts) for case in make(base, longest, tier)]:
        if case.layout != "expanded" and min(case.queries, case.keys) > 2:
            yield case
    masked = replace(base, mask_shape="TS", mask_kind="boolean")
    for head_size, value_size in ((33, 33), (64, 64), (128, 128), (48, 32), (32, 48)):
        yield replace(masked, head_size=head_size, value_size=value_size)
    for heads, kv_heads in ((1, 1), (4, 2), (4, 1)):
        yield replace(masked, heads=heads, kv_heads=kv_heads)


def accuracy_cases(geometry: Geometry, longest: int, num_draws: int) -> Iterator[AttentionCase]:
    """Plain calls for the error ratio, one draw for each row of the batch, with at least 4,096 outputs together."""
    queries = max(4, math.ceil(4096 / (num_draws * geometry.value_size)))
    base = AttentionCase(
        way=geometry.way,
        dtype=geometry.dtype,
        batch=num_draws,
        heads=1,
        kv_heads=1,
        queries=queries,
        keys=queries,
        head_size=geometry.head_size,
        value_size=geometry.value_size,
        values="normal",
    )
    yield replace(base, keys=min(128, longest))
    yield replace(base, keys=min(1024, longest))
    yield replace(base, keys=min(128, longest), mask_shape="B1TS", mask_kind="boolean")
    yield replace(base, queries=64, keys=64, causal=True)
