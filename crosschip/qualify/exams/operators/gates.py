"""What must hold for an operator call without tolerance: shapes, dtypes, strides, what is written and what is not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from crosschip.qualify.exams.operators.controls import written_arguments
from crosschip.qualify.exams.operators.runs import Inputs, Outcome, same

__all__ = ["broken_structure", "other_strides"]


def broken_structure(op: Any, inputs: Inputs, chip: Outcome, eager: Outcome) -> str:
    """What is wrong with an outcome's form, in words; empty when nothing is."""
    if len(chip.outputs) != len(eager.outputs):
        return f"{len(chip.outputs)} tensors instead of {len(eager.outputs)}"
    for number, ((_, got), (_, expected)) in enumerate(zip(chip.outputs, eager.outputs, strict=True)):
        if got.dtype != expected.dtype:
            return f"output {number} is {_name(got.dtype)} instead of {_name(expected.dtype)}"
        if got.shape != expected.shape:
            return f"output {number} has shape {list(got.shape)} instead of {list(expected.shape)}"
    if op.is_view:
        for number, (mine, honest) in enumerate(zip(chip.strides, eager.strides, strict=True)):
            if mine != honest:
                return f"view {number} has strides {list(mine)} instead of {list(honest)}"
    if not chip.returned_written:
        return "what it returned is not what it wrote into its argument"
    return _overwritten(op, inputs, chip)


def _overwritten(op: Any, inputs: Inputs, chip: Outcome) -> str:
    """Whether the call has changed an argument that it must not write."""
    args, kwargs = chip.args
    written = {id(each) for each in tree_leaves(written_arguments(op, args, kwargs))}
    before = tree_leaves([list(inputs.args), inputs.kwargs])
    for number, (old, new) in enumerate(zip(before, tree_leaves([list(args), kwargs]), strict=True)):
        if isinstance(new, Tensor) and id(new) not in written and not same(new.cpu(), old):
            return f"argument {number} has other values after the call, which must not write it"
    return ""


def other_strides(chip: Outcome, eager: Outcome) -> str:
    """In words, where a dense result lies in memory in another order than the CPU's; that is allowed."""
    for number, (mine, honest) in enumerate(zip(chip.strides, eager.strides, strict=True)):
        if _by_length(mine, chip.outputs[number][1].shape) != _by_length(honest, eager.outputs[number][1].shape):
            return f"output {number} has strides {list(mine)} instead of {list(honest)}"
    return ""


def _by_length(strides: Sequence[int], shape: torch.Size) -> list[int]:
    """Strides that count: those of dimensions longer than 1."""
    return [step for step, size in zip(strides, shape, strict=True) if size > 1]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
