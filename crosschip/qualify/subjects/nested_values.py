"""What a forward takes and gives: tensors in tuples, lists, mappings and data classes, one in the other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

__all__ = ["Leaf", "mapped", "parts_of", "tensors_inside"]

Leaf = torch.Tensor | PackedSequence


def parts_of(value: Any) -> Iterator[Any]:
    """The value and everything inside it at any depth, in order; the tensors of a packed sequence come after it."""
    yield value
    for each in _members(value):
        yield from parts_of(each)


def tensors_inside(value: Any) -> Iterator[torch.Tensor]:
    """All tensors inside a value, in order."""
    return (each for each in parts_of(value) if isinstance(each, torch.Tensor))


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """The value with each `Leaf` inside it changed, and else of the same types.

    A mapping that cannot be made from a dictionary becomes one.
    """
    if isinstance(value, Leaf):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(each, change) for each in value))
    if isinstance(value, list | tuple):
        return type(value)(mapped(each, change) for each in value)
    if isinstance(value, Mapping):
        made = {name: mapped(each, change) for name, each in value.items()}
        try:
            return type(value)(made)  # type: ignore[call-arg]
        except TypeError:
            return made
    if is_dataclass(value) and not isinstance(value, type):
        copied = copy.copy(value)  # not made anew: what `__post_init__` did has been done
        for name, each in _fields(value).items():
            object.__setattr__(copied, name, mapped(each, change))  # a frozen one refuses setattr
        return copied
    return value


def _members(value: Any) -> Collection[Any]:
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, Mapping):
        return value.values()
    return _fields(value).values() if is_dataclass(value) and not isinstance(value, type) else ()


def _fields(value: Any) -> dict[str, Any]:
    return {each.name: getattr(value, each.name) for each in fields(value) if hasattr(value, each.name)}
