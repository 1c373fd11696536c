"""One operator call made on the chip and, from the same inputs, on the CPU: honestly in several ways, and in fp64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from crosschip.qualify.exams.operators.controls import MODES, WITHOUT_GOLDEN, golden_call, honest_calls, outputs_of
from crosschip.qualify.exams.operators.plan import PlannedDraw
from crosschip.qualify.exams.operators.shapes import MOVES, Encoded, base_name, with_each_tensor
from crosschip.qualify.judging.judge import DrawErrors, errors_of
from crosschip.qualify.tracing.inputs import as_real, make_arguments, make_tensor
from crosschip.qualify.tracing.ties import chooses_as_well

__all__ = [
    "Comparison",
    "InputMaker",
    "Inputs",
    "Outcome",
    "compare",
    "equal",
    "on_device",
    "same",
    "wrong_by_bits",
]


@dataclass(frozen=True)
class Inputs:
    """Arguments on the CPU and their encoded form, which tells which tensors stay on the host."""

    encoded: Encoded
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Outcome:
    """What a call made, on the CPU: its outputs with their positions, strides on the device, arguments afterwards."""

    outputs: list[tuple[int, Tensor]]
    strides: list[tuple[int, ...]]
    returned_written: bool  # what it returned and has written are of one content
    args: Any = field(default=None, repr=False)


class InputMaker:
    """Makes arguments of draws. Drawing by quantiles is slow, so tensors take their values from pools drawn once.

    A reproducer draws anew from the same description.
    """

    def __init__(self) -> None:
        self._pools: dict[str, Tensor] = {}

    def make(self, draw: PlannedDraw) -> Inputs:
        """The draw's arguments on the CPU. Subnormal numbers are not among them: chips may flush them."""
        encoded = with_each_tensor(draw.encoded, _without_subnormals)
        generator = torch.Generator().manual_seed(draw.seed)
        args = [self._made(each, generator) for each in encoded[0]]
        kwargs = {name: self._made(each, generator) for name, each in encoded[1].items()}
        return Inputs(encoded, tuple(args), kwargs)

    def _made(self, value: Any, generator: torch.Generator) -> Any:
        if isinstance(value, list):
            return [self._made(each, generator) for each in value]
        if not isinstance(value, dict):
            return value
        if "tensor" in value and _can_be_pooled(value["tensor"]):
            return self._taken(value["tensor"], generator)
        seed = int(torch.randint(0, 1 << 31, (), generator=generator))
        return make_arguments([value], {}, seed, "cpu")[0][0]

    def _taken(self, spec: dict[str, Any], generator: torch.Generator) -> Tensor:
        kind = f"{spec['dtype']} {spec['values']}"
        if kind not in self._pools:
            self._pools[kind] = make_tensor({**spec, "shape": [_POOL], "stride": [1]}, len(self._pools))
        pool, count = self._pools[kind], math.prod(spec["shape"])
        if count <= _POOL // 2:
            first = int(torch.randint(0, _POOL - count + 1, (), generator=generator))
            values = pool[first : first + count]
        else:
            values = pool[torch.randint(0, _POOL, (count,), generator=generator)]
        return torch.empty_strided(spec["shape"], spec["stride"], dtype=pool.dtype).copy_(values.view(spec["shape"]))


_POOL = 1 << 15


def _can_be_pooled(spec: dict[str, Any]) -> bool:
    """Whether the values come from quantiles and each place of the tensor has memory of its own."""
    if (
        "quantiles" not in spec["values"]
        or "literal" in spec["values"]
        or not spec["dtype"].startswith(("float", "bf"))
    ):
        return False
    reached = 1
    for step, size in sorted(zip(spec["stride"], spec["shape"], strict=True)):
        if size > 1:
            if step < reached:
                return False
            reached = step * size
    return True


def _without_subnormals(spec: dict[str, Any]) -> dict[str, Any]:
    values = spec["values"]
    if "quantiles" not in values:
        return spec
    tiny = torch.finfo(getattr(torch, spec["dtype"])).tiny
    flushed = [0.0 if abs(each) < tiny else each for each in values["quantiles"]]
    return {**spec, "values": {**values, "quantiles": flushed}}


def on_device(op: Any, inputs: Inputs, device: torch.device) -> Outcome:
    """Make the call on fresh copies of the inputs on a device, and bring all that it made to the CPU."""
    args = [_moved(value, form, device) for value, form in zip(inputs.args, inputs.encoded[0], strict=True)]
    kwargs = {name: _moved(value, inputs.encoded[1][name], device) for name, value in inputs.kwargs.items()}
    result = op(*args, **kwargs)
    outputs = outputs_of(op, args, kwargs, result)
    return Outcome(
        [(position, each.detach().cpu()) for position, each in outputs],
        [tuple(each.stride()) for _, each in outputs],
        _returned_what_it_wrote(op, result, outputs),
        (args, kwargs),
    )


def _moved(value: Any, form: Any, device: torch.device) -> Any:
    """A copy on the device with the same strides; what the form calls the host's stays there."""
    if isinstance(value, Tensor):
        home = torch.device("cpu") if isinstance(form, dict) and form.get("host") else device
        extent = 1 + sum((size - 1) * step for size, step in zip(value.shape, value.stride(), strict=True))
        if value.numel() == 0:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).to(home)
        memory = value.as_strided((extent,), (1,))
        memory = memory.clone() if home.type == "cpu" else memory.to(home)
        return memory.as_strided(value.shape, value.stride())
    if isinstance(value, torch.device):
        return device
    if isinstance(value, list | tuple) and isinstance(form, list):
        return type(value)([_moved(each, one, device) for each, one in zip(value, form, strict=True)])
    return value


def _returned_what_it_wrote(op: Any, result: Any, outputs: Sequence[tuple[int, Tensor]]) -> bool:
    returned = result if isinstance(result, tuple) else (result,)
    declared = op._schema.returns
    if len(returned) != len(declared):
        return True
    written = [
        each for each, form in zip(returned, declared, strict=True) if form.alias_info and form.alias_info.is_write
    ]
    stored = [each for _, each in outputs][len(outputs) - len(written) :]
    return all(
        not isinstance(each, Tensor) or same(each.detach().cpu(), into.detach().cpu())
        for each, into in zip(written, stored, strict=True)
    )


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal in shape, dtype and value; NaN equals NaN, -0 equals 0."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def equal(chip: Outcome, eager: Outcome) -> bool:
    """Whether two outcomes hold the same numbers."""
    return all(same(a, b) for (_, a), (_, b) in zip(chip.outputs, eager.outputs, strict=True))


@dataclass
class Comparison:
    """Outputs of one draw side by side: the chip's, golden and honest ones. `wrong` needs no tolerance."""

    sides: dict[tuple[int, int], list[dict[str, Tensor]]] = field(default_factory=dict)  # by position and number
    wrong: list[str] = field(default_factory=list)
    has_golden: bool = True

    def errors(self, draw: PlannedDraw) -> list[tuple[int, DrawErrors]]:
        """The errors by position of the output; repeated calls count together, large outputs as several draws."""
        found = []
        for (position, _), sides in self.sides.items():
            found += [(position, error) for error in _errors(draw, sides)]
        return found


def compare(op: Any, inputs: Inputs, chip: Outcome, eager: Outcome, into: Comparison) -> None:
    """Add a chip's outcome and honest ones to a comparison. What is no floating-point number must be the CPU's."""
    into.wrong += wrong_by_bits(op, inputs, chip, eager)
    if _is_by_bits(op) or not any(_is_rounded(each) for _, each in eager.outputs):
        return
    try:
        golden = golden_call(op, inputs.args, inputs.kwargs)
    except WITHOUT_GOLDEN:
        into.has_golden = False
        return
    honest = {"CPU": [each for _, each in eager.outputs]}
    golden = [(position, as_real(each)) for position, each in golden]
    all_exact = all(_exact(wide, each) for (_, wide), (_, each) in zip(golden, eager.outputs, strict=True))
    if not all_exact or not equal(chip, eager):
        honest.update(honest_calls(op, inputs.args, inputs.kwargs, MODES))
    for number, ((position, got), (_, wide)) in enumerate(zip(chip.outputs, golden, strict=True)):
        if not _is_rounded(eager.outputs[number][1]):
            continue
        got, others = as_real(got), {name: as_real(each[number]) for name, each in honest.items()}
        placed = _misplaced(got, wide, list(others.values()))
        if placed:
            into.wrong.append(placed)
        else:
            into.sides.setdefault((position, number), []).append({"chip": got, "golden": wide, **others})


def wrong_by_bits(op: Any, inputs: Inputs, chip: Outcome, eager: Outcome) -> list[str]:
    """In words, the outputs that must be the CPU's bit for bit, however large they are, and are not."""
    return [
        _different(got, expected)
        for (_, got), (_, expected) in zip(chip.outputs, eager.outputs, strict=True)
        if (_is_by_bits(op) or not _is_rounded(expected))
        and not same(got, expected)
        and not chooses_as_well(op, inputs.args, inputs.kwargs, got, expected)
    ]


def _is_rounded(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _is_by_bits(op: Any) -> bool:
    name = op._schema.name
    moves = name.startswith("aten::") and base_name(name.replace("::", ".")) in _SELECTS
    return bool(op.is_view) or name in _BY_BITS or moves


# Operators that put values elsewhere and compute nothing; a cast rounds.
_SELECTS = (MOVES | {"gather"}) - {"copy", "_to_copy"}
# Operators whose result is about the dtype itself, so that fp64 says nothing of it.
_BY_BITS = ("aten::nextafter", "aten::frexp", "aten::ldexp", "aten::copysign", "aten::signbit")


def _exact(golden: Tensor, honest: Tensor) -> bool:
    """Whether the CPU has the golden result exactly; the errors of other honest implementations count otherwise."""
    return not _is_rounded(honest) or bool((as_real(honest).double() == golden.double()).all())


# An output of so many numbers counts as several draws, each of every n-th number.
_NUMBERS_EACH = 1 << 11
_MOST_PARTS = 8


def _errors(draw: PlannedDraw, sides: Sequence[dict[str, Tensor]]) -> list[DrawErrors]:
    names = {name: None for each in sides for name in each}  # a call whose result is exact has the CPU's only
    wide = {name: torch.cat([each.get(name, each["CPU"]).reshape(-1) for each in sides]) for name in names}
    dtype = wide["CPU"].dtype
    info = torch.finfo(dtype)
    wide["rounded"] = wide["golden"].to(dtype)
    arrays = {name: each.double().numpy() for name, each in wide.items()}
    num_parts = max(1, min(_MOST_PARTS, wide["golden"].numel() // _NUMBERS_EACH))
    found = []
    for part in range(num_parts):
        own = {name: each[part::num_parts] for name, each in arrays.items()}
        chip, golden, rounded = own.pop("chip"), own.pop("golden"), own.pop("rounded")
        found.append(errors_of(draw.label, chip, golden, rounded, own, info.eps, info.tiny, draw.size))
    return [each for each in found if each is not None]


def _misplaced(got: Tensor, golden: Tensor, honest: Sequence[Tensor]) -> str:
    """In words, how NaN and Inf stand elsewhere than in every honest result; empty when they do not."""
    if all(bool(each.isfinite().all()) for each in (got, golden, *honest)):
        return ""
    rounded = golden.to(honest[0].dtype)
    largest = torch.finfo(rounded.dtype).max
    agreed = golden.isnan() | golden.isinf() | (golden.abs() < largest / 2)  # near overflow, rounding decides
    for each in honest:
        agreed &= (each.isnan() == rounded.isnan()) & (each.isinf() == rounded.isinf())
    same = (got.isnan() == rounded.isnan()) & torch.where(rounded.isinf(), got == rounded, ~got.isinf())
    num_wrong = int((agreed & ~same).sum())
    if not num_wrong:
        return ""
    place = (agreed & ~same).flatten().nonzero()[0]
    return (
        f"{num_wrong} of {got.numel()}: {float(got.flatten()[place])} instead of {float(rounded.flatten()[place]):.6g}"
    )


def _different(got: Tensor, expected: Tensor) -> str:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return f"{got.dtype} {list(got.shape)} instead of {expected.dtype} {list(expected.shape)}"
    different = (got != expected).flatten()
    place = int(different.nonzero()[0])
    first = f"the first is {got.flatten()[place].item()} instead of {expected.flatten()[place].item()}"
    return f"{int(different.sum())} of {math.prod(got.shape)} differ; {first}"
