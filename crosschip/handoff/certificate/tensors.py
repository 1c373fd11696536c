"""The tensor manifest: every tensor once, and each the recorded one, or within its quantisation's rounding of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crosschip.errors import CrosschipError
from crosschip.golden.bundle import Bundle
from crosschip.golden.weights import TensorRecord, WeightDifference, compare_weights, tensor_record
from crosschip.handoff.certificate.gate import Gate, Measure
from crosschip.handoff.conversion.layout import TensorSource

__all__ = ["differs_from_source", "manifest_gate", "norm_bound", "rounding_bound", "unreadable"]

Tell = Callable[[str], None]

_NAME = "tensor manifest"
_SHOWN = 4
_MOST_MATCHED = 4096  # rows that are looked for among each other
# Half a step of the format. int8 and q8_0: the largest of a row is 127 steps. e4m3: 3 bits of mantissa, and below its
# normal numbers steps of 2^-9 where the largest of a block is 448.
_INT8_HALF_STEP = 1 / 254
_FP8_HALF_STEP, _FP8_LEAST = 2.0**-4, 2.0**-10 / 448
# Scales and what is multiplied out are themselves rounded, at worst to bf16, each by half a unit in the last place.
_OF_SCALES = 2.0**-7


@dataclass(frozen=True)
class _Compared:
    """The differences that were found, and how many of how many tensors are quantised ones."""

    differences: list[WeightDifference]
    num_tensors: int
    num_exact: int
    largest_share: float  # of its rounding bound that any number is off


def manifest_gate(
    bundle: Bundle,
    arrived: TensorSource,
    *,
    source: TensorSource | None = None,
    quantised: str | None = None,
    left_out: Sequence[str] = (),
    tell: Tell = lambda line: None,
) -> tuple[Gate, list[WeightDifference]]:
    """Compare what arrived, seen under the published names and not quantised, with what was recorded.

    Args:
        bundle: its manifest holds a record of each tensor.
        arrived: the files' tensors.
        source: the model that was handed off, where it is at hand; quantised tensors are compared with it number by
            number, and with the records' norms otherwise.
        quantised: the kind of quantisation, one of `crosschip.golden.limits.QUANTISED`.
        left_out: beginnings of names that this form has no place for.
        tell: hears how far it is.

    Returns:
        The gate, and every tensor that is not the recorded one.
    """
    kept = {name: each for name, each in bundle.weights.items() if not name.startswith(tuple(left_out))}
    try:
        compared = _compare(kept, arrived, source, quantised, tell)
    except CrosschipError as error:
        return unreadable(error), []
    unseen = []
    if len(kept) < len(bundle.weights):
        more = f", and {len(left_out) - _SHOWN} more" if len(left_out) > _SHOWN else ""
        names = f"{', '.join(left_out[:_SHOWN])}{more}"
        unseen.append(f"{len(bundle.weights) - len(kept)} tensors that this form has no place for: {names}")
    if quantised is not None and source is None:
        unseen.append("the order inside quantised tensors, number by number: the model they come from is not here")
    measures = _measures(compared, len(kept), quantised)
    found = compared.differences
    if not found:
        words = f"all {compared.num_tensors} tensors are the recorded ones"
        words = words if quantised is None else f"{words}, within rounding"
        return Gate(_NAME, "PASS", words, None, measures, unseen), []
    shown = "; ".join(each.words for each in found[:_SHOWN])
    more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return Gate(_NAME, "FAIL", shown + more, found[0].tensor, measures, unseen), found


def unreadable(error: CrosschipError) -> Gate:
    """The gate for files that cannot even be read back: a cut shard, a missing tensor, another dialect of FP8."""
    return Gate(_NAME, "FAIL", f"the files cannot be read back: {error.problem}", error.problem.split()[0])


def _measures(compared: _Compared, num_recorded: int, quantised: str | None) -> list[Measure]:
    measures = [
        Measure("tensors", compared.num_tensors, num_recorded, "every tensor once, none beside them"),
        Measure("tensors that are not the recorded ones", len(compared.differences), 0, "one by one"),
        Measure("tensors compared by SHA-256", compared.num_exact),
    ]
    if quantised is not None:
        how = "half a step of the format at each number, and the rounding of its scales"
        measures.append(Measure("largest error over its rounding bound", compared.largest_share, 1.0, how))
    return measures


def differs_from_source(bundle: Bundle, source: TensorSource, tell: Tell = lambda line: None) -> str | None:
    """In which tensor, first, the weights of a source are not those that a bundle was recorded from; None in none."""
    records = {}
    names = list(source.names())
    for number, name in enumerate(names):
        tell(f"hashing tensor {number + 1} of {len(names)} of the source")
        records[name] = tensor_record(source.read(name))
    differences = compare_weights(bundle.weights, records)
    more = f", and {len(differences) - 1} more" if len(differences) > 1 else ""
    return f"{differences[0].words}{more}" if differences else None


def rounding_bound(kind: str, tensor: Tensor) -> Tensor:
    """By how much each number of a matrix may be off after quantisation of this kind, in the tensor's shape."""
    floats = tensor.float()
    size = floats.abs()
    if kind == "fp8":
        return size * (_FP8_HALF_STEP + _OF_SCALES) + size.max() * _FP8_LEAST
    largest = size.amax(dim=-1, keepdim=True)
    if kind == "q8_0":  # some tensors lie transposed in the file, so that a block runs down a column
        largest = torch.maximum(largest, size.amax(dim=-2, keepdim=True))
    return largest * _INT8_HALF_STEP * (1 + _OF_SCALES) + size * _OF_SCALES


def norm_bound(kind: str) -> float:
    """By which share the norm of a matrix may be off after quantisation of this kind."""
    return {"fp8": _FP8_HALF_STEP}.get(kind, 2.0**-4) + _OF_SCALES


def _compare(
    recorded_weights: dict[str, TensorRecord],
    arrived: TensorSource,
    source: TensorSource | None,
    quantised: str | None,
    tell: Tell,
) -> _Compared:
    found, largest = [], 0.0
    names = list(arrived.names())
    there = set(names)
    absent = [name for name in recorded_weights if name not in there]
    found += [WeightDifference(name, "missing", f"{name} is missing") for name in absent]
    num_exact = 0
    for number, name in enumerate(names):
        tell(f"comparing tensor {number + 1} of {len(names)}")
        recorded = recorded_weights.get(name)
        if recorded is None:
            found.append(WeightDifference(name, "surplus", f"{name} was not there when the bundle was recorded"))
            continue
        record = tensor_record(arrived.read(name))
        differing = compare_weights({name: recorded}, {name: record})
        if not differing:
            num_exact += 1
        elif quantised is None or len(recorded.shape) < 2 or record.shape != recorded.shape:
            found += differing
        elif source is None:
            found += _by_norms(name, quantised, recorded.sum_squares, record.sum_squares, differing)
        else:
            share, words = _number_by_number(quantised, source.read(name).float(), arrived.read(name).float())
            largest = max(largest, share)
            if words is not None:
                found.append(WeightDifference(name, "other", f"{name} {words}"))
    return _Compared(found, len(names), num_exact, largest)


def _by_norms(
    name: str, kind: str, recorded: float, found: float, differing: list[WeightDifference]
) -> list[WeightDifference]:
    """A tensor whose norm moved by more than rounding can move it (the triangle inequality) is not the recorded one."""
    most = norm_bound(kind)
    factor = (found / recorded) ** 0.5 if recorded > 0 else 1.0
    if abs(factor - 1) <= most:
        return []
    words = f"{name} has {factor:.4g} times the recorded norm, rounding explains at most {most:.1%}"
    return [WeightDifference(name, "scaled", words), *differing[1:]]


def _number_by_number(kind: str, recorded: Tensor, found: Tensor) -> tuple[float, str | None]:
    """The largest error over its bound, and, where that is above 1, how the tensor differs."""
    bound = rounding_bound(kind, recorded)
    share = (found - recorded).abs() / bound.clamp_min(torch.finfo(torch.float32).tiny)
    beyond = int((~(share <= 1)).sum())
    largest = float(share.max())
    if not beyond:
        return largest, None
    how = _how(recorded.flatten(0, -2), found.flatten(0, -2))
    return (
        largest,
        f"{how}: {beyond} of {recorded.numel()} numbers are off by more than rounding, most {largest:.3g} times",
    )


def _how(recorded: Tensor, found: Tensor) -> str:
    """In which way one matrix is not the other."""
    if not bool(found.isfinite().all()):
        return f"holds {int((~found.isfinite()).sum())} numbers that are not finite"
    factor = float((recorded * found).sum() / recorded.square().sum().clamp_min(1e-30))
    if _is_near(recorded * factor, found):
        return f"is the recorded tensor times {factor:.4g}"
    if recorded.shape[0] == recorded.shape[1] and _is_near(recorded.T, found):
        return "is transposed"
    for words, one, other in (("rows", recorded, found), ("columns", recorded.T, found.T)):
        order = _order(one, other)
        if order is not None and _is_near(one[order], other):
            return f"has the recorded {words} in another order"
    return "holds other numbers"


def _order(recorded: Tensor, found: Tensor) -> Tensor | None:
    """For each row of `found` the row of `recorded` that is most like it; None for too many rows."""
    if len(recorded) > _MOST_MATCHED:
        return None
    ones = [torch.nn.functional.normalize(each, dim=1) for each in (recorded, found)]
    return (ones[1] @ ones[0].T).argmax(dim=1)


def _is_near(one: Tensor, other: Tensor) -> bool:
    """Whether they differ by no more than any of the formats here rounds."""
    return bool((one - other).norm() <= 0.1 * one.norm())
