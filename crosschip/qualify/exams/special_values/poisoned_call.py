"""A traced call with one number of an input poisoned: does NaN come out exactly where it must? Needs torch only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from crosschip.qualify.tracing.inputs import make_arguments, operator_named
from crosschip.qualify.tracing.replay import tensors_in

__all__ = ["poison_shows"]


def poison_shows(
    device: str, operator: str, args: list[Any], kwargs: dict[str, Any], seed: int, poisoned: int
) -> tuple[bool, str, str]:
    """Make the call on the CPU and on the device with NaN in the middle of one input, and compare where NaN is then.

    `poisoned` counts the inputs of floating-point dtypes. Arguments that the call writes into are results, too. One
    number is poisoned, or the whole middle row where the one has no effect, as in a loss that picks its numbers.
    """
    for whole_row in (False, True):
        on_cpu, on_device = (_poisoned(args, kwargs, seed, poisoned, whole_row) for _ in range(2))
        expected = _nan_places(operator, on_cpu, [args, kwargs], "cpu")
        if whole_row or any(bool(each.any()) for each in expected):
            break
    got = _nan_places(operator, on_device, [args, kwargs], device)
    for number, (wanted, found) in enumerate(zip(expected, got, strict=True)):
        if not torch.equal(wanted, found):
            hidden, invented = int((wanted & ~found).sum()), int((found & ~wanted).sum())
            what = f"result {number} of shape {list(wanted.shape)}"
            told = f"{hidden} of them hidden, {invented} invented elsewhere"
            return True, f"NaN in {int(wanted.sum())} places of {what}", told
    return False, "NaN where it must be", "NaN where it must be"


def _poisoned(args: list[Any], kwargs: dict[str, Any], seed: int, poisoned: int, whole_row: bool) -> Any:
    """The arguments of the call on the CPU with NaN in them."""
    made = make_arguments(args, kwargs, seed, "cpu")
    target = [each for each in tensors_in(made) if _is_poisonable(each)][poisoned]
    middle = torch.unravel_index(torch.tensor(target.numel() // 2), target.shape)
    target[tuple(int(each) for each in middle[: 1 if whole_row else None])] = math.nan
    return made


def _is_poisonable(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.numel() > 0


def _nan_places(operator: str, made: Any, encoded: list[Any], device: str) -> list[torch.Tensor]:
    op = operator_named(operator)
    on_host = iter(list(_host_marks(encoded)))
    args, kwargs = _mapped(made, lambda each: each if next(on_host) else _on_device(each, device), device)
    results = [op(*args, **kwargs)]
    for value, argument in zip(args, op._schema.arguments, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            results.append(value)
    places = []
    for each in tensors_in(results):
        back = each.cpu()
        if back.is_floating_point():
            places.append(back.isnan())
        elif back.dtype == torch.bool:
            places.append(back)
    return places


def _on_device(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """The tensor on the device with its strides: its whole memory goes there."""
    memory = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return memory.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor], device: str) -> Any:
    """Nested lists, tuples and dictionaries with each tensor changed, in order, and each device replaced."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, torch.device):
        return torch.device(device)
    if isinstance(value, (list, tuple)):
        return type(value)([_mapped(each, change, device) for each in value])
    if isinstance(value, dict):
        return {name: _mapped(each, change, device) for name, each in value.items()}
    return value


def _host_marks(encoded: Any) -> Iterator[bool]:
    """For each tensor of an encoded call, in order, whether it stays on the host."""
    if isinstance(encoded, dict):
        if "tensor" in encoded:
            yield bool(encoded.get("host"))
        else:
            for each in encoded.values():
                yield from _host_marks(each)
    elif isinstance(encoded, list):
        for each in encoded:
            yield from _host_marks(each)
