"""Parts of a call that is too large to be compared whole: some places of an elementwise operator, some rows of another.

An operator on lists is taken apart into its tensors first. A part holds places spread evenly from the first to the last
and the few at which the chip is farthest from the CPU. Where an operator mixes rows that are thought to be independent,
the CPU's own results are not the part's golden ones either, so that no chip is accused of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from crosschip.qualify.exams.operators.runs import Inputs, Outcome, on_device
from crosschip.qualify.exams.operators.shapes import GRADIENT_OF, Dimensions, name_dimensions, num_elements
from crosschip.qualify.tracing.inputs import operator_named
from crosschip.qualify.tracing.trace import TracedCall

__all__ = ["LARGEST_WHOLE", "in_parts"]

LARGEST_WHOLE = 1 << 22  # elements of all tensors of a call
_LARGEST_PART = 1 << 18
_MOST_TENSORS = 8  # of a list
_NUM_FARTHEST = 8  # so few that the others make the error's size and its tail
_NOT_IN_PARTS = (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError)

Sides = tuple[Inputs, Outcome, Outcome]  # the chip's outcome and the CPU's


def in_parts(op: Any, call: TracedCall, sides: Sides) -> Iterator[Sides]:
    """Parts of a call whose outcomes are other numbers on the chip than on the CPU.

    There are none where it is not known which of an operator's results depend on which of its numbers.
    """
    pointwise = torch.Tag.pointwise in operator_named(call.operator.removeprefix(GRADIENT_OF)).tags
    for one, own in _single_tensors(call, sides):
        dims = name_dimensions(one, pointwise)
        part = None
        try:
            part = (None if dims.deep else _some_places(own)) or _some_rows(op, dims, own)
        except _NOT_IN_PARTS:  # the CPU does not make the call on the part
            part = None
        if part is None and num_elements(own[0].encoded) <= LARGEST_WHOLE:
            part = own
        if part is not None:
            yield part


def _single_tensors(call: TracedCall, sides: Sides) -> list[tuple[TracedCall, Sides]]:
    """The call, or for one on lists the calls on one tensor of each list: those farthest from the CPU's."""
    if not name_dimensions(call, False).num_lists:
        return [(call, sides)]
    inputs, chip, eager = sides
    length = len(next(each for each in inputs.args if isinstance(each, list)))

    def cut(value: Any, place: int) -> Any:
        return [value[place]] if isinstance(value, list) and len(value) == length else value

    found = []
    for place in range(length):
        args, kwargs = inputs.encoded
        encoded = [cut(each, place) for each in args], {name: cut(each, place) for name, each in kwargs.items()}
        made_kwargs = {name: cut(each, place) for name, each in inputs.kwargs.items()}
        made = Inputs(encoded, tuple(cut(each, place) for each in inputs.args), made_kwargs)
        own = (made, _at(chip, place, length), _at(eager, place, length))
        farthest = max((float(each.max()) for each in _distances(own) if each.numel()), default=0.0)
        if farthest > 0.0:
            found.append((farthest, (replace(call, args=encoded[0], kwargs=encoded[1]), own)))
    found.sort(key=lambda each: -each[0])
    return [each for _, each in found[:_MOST_TENSORS]]


def _at(outcome: Outcome, place: int, length: int) -> Outcome:
    """The outcome of one tensor of each list; the tensors of a list share their position."""
    lists: dict[int, list[Tensor]] = defaultdict(list)
    for position, each in outcome.outputs:
        lists[position].append(each)
    return _outcome([(position, each[place]) for position, each in lists.items() if len(each) == length])


def _outcome(outputs: list[tuple[int, Tensor]]) -> Outcome:
    return Outcome(outputs, [tuple(each.stride()) for _, each in outputs], True)


def _some_places(sides: Sides) -> Sides | None:
    """An elementwise call on some places of all tensors; numbers without dimensions stay as they are."""
    inputs, chip, eager = sides
    shape = eager.outputs[0][1].shape
    if any(each.shape != shape for _, each in eager.outputs):
        return None
    farness = torch.stack([each.reshape(-1) for each in _distances(sides)]).amax(0)
    number = _LARGEST_PART * farness.numel() // num_elements(inputs.encoded)
    places = torch.unravel_index(_chosen(farness, number), shape)

    def at_places(tensor: Tensor) -> Tensor:
        return tensor if tensor.dim() == 0 else tensor.expand(shape)[places]

    both = [_outcome([(position, at_places(each)) for position, each in side.outputs]) for side in (chip, eager)]
    return _with_each_tensor(inputs, at_places), both[0], both[1]


def _some_rows(op: Any, dims: Dimensions, sides: Sides) -> Sides | None:
    """The call on some rows along its longest free dimension. What does not depend on rows alone is the CPU's."""
    inputs, chip, eager = sides
    if not dims.free or num_elements(inputs.encoded) // dims.sizes[dims.free[0]] > LARGEST_WHOLE:
        return None
    name, count = dims.free[0], dims.sizes[dims.free[0]]
    one_row = on_device(op, _rows_of(inputs, dims, name, torch.zeros(1, dtype=torch.int64)), torch.device("cpu"))
    along = [
        [dim for dim, (size, own) in enumerate(zip(whole.shape, row.shape, strict=True)) if size != own]
        for (_, whole), (_, row) in zip(eager.outputs, one_row.outputs, strict=True)
    ]
    farness = [
        each.movedim(narrowed[0], 0).reshape(count, -1).amax(1)
        for narrowed, each in zip(along, _distances(sides), strict=True)
        if narrowed and each.numel()
    ]
    if not farness:
        return None
    number = max(1, _LARGEST_PART * count // num_elements(inputs.encoded))
    rows = _chosen(torch.stack(farness).amax(0), number)
    part = _rows_of(inputs, dims, name, rows)
    on_cpu = on_device(op, part, torch.device("cpu"))

    def of_rows(side: Outcome) -> Outcome:
        return _outcome(
            [
                (position, _selected(each, narrowed, rows) if narrowed else own)
                for (position, each), narrowed, (_, own) in zip(side.outputs, along, on_cpu.outputs, strict=True)
            ]
        )

    return part, of_rows(chip), of_rows(eager)


def _rows_of(inputs: Inputs, dims: Dimensions, name: str, rows: Tensor) -> Inputs:
    names = iter(dims.of_tensors)

    def take(tensor: Tensor) -> Tensor:
        return _selected(tensor, [dim for dim, each in enumerate(next(names)) if each == name], rows)

    return _with_each_tensor(inputs, take)


def _selected(tensor: Tensor, dims: list[int], rows: Tensor) -> Tensor:
    for dim in dims:
        tensor = tensor.index_select(dim, rows)
    return tensor


def _with_each_tensor(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """The inputs with their tensors changed, in the order of `tensor_specs`."""
    args, kwargs = tree_map(
        lambda each: change(each) if isinstance(each, Tensor) else each, (inputs.args, inputs.kwargs)
    )
    return Inputs(inputs.encoded, args, kwargs)


def _chosen(farness: Tensor, number: int) -> Tensor:
    """About `number` places in their order: the farthest, and others spread over all from the first to the last."""
    if farness.numel() <= number:
        return torch.arange(farness.numel())
    farthest = farness.topk(max(1, min(_NUM_FARTHEST, number // 4))).indices
    spread = torch.linspace(0, farness.numel() - 1, max(0, number - farthest.numel()), dtype=torch.float64)
    return torch.cat((spread.round().long(), farthest)).unique()


def _distances(sides: Sides) -> list[Tensor]:
    """How far the chip's outputs are from the CPU's at each place, relative to their usual size and the size there."""
    _, chip, eager = sides
    return [_distance(got, honest) for (_, got), (_, honest) in zip(chip.outputs, eager.outputs, strict=True)]


def _distance(got: Tensor, honest: Tensor) -> Tensor:
    if not (honest.is_floating_point() or honest.is_complex()):
        return torch.zeros(honest.shape)
    off = (got - honest).abs().float().nan_to_num(torch.inf, torch.inf)
    off[(got == honest) | (got.isnan() & honest.isnan())] = 0.0
    size = honest.abs().float().nan_to_num(0.0, 0.0)
    return off / (size + size.square().mean().sqrt() + torch.finfo(torch.float32).tiny)
