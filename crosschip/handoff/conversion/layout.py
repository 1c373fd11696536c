"""A layout: the operators between the names and shapes of two worlds, declared once and read in two directions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from crosschip.errors import HandoffError
from crosschip.handoff.conversion.operators import Inverse, Operator, Tensors

__all__ = ["Layout", "TensorSource"]


class TensorSource(Protocol):
    """Tensors by name, read one at a time; shapes and dtypes are known without reading."""

    def names(self) -> Sequence[str]:
        """All names, in the order in which reading is cheapest."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""

    def dtype(self, name: str) -> torch.dtype:
        """The tensor's dtype."""

    def read(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU."""


@dataclass(frozen=True)
class Layout:
    """Operators of which no two take or give the same tensor, so each can run alone: memory is that of one operator.

    Raises:
        HandoffError: two operators take or give the same name.
    """

    name: str
    operators: tuple[Operator, ...]

    def __post_init__(self) -> None:
        for side in ("inputs", "outputs"):
            seen: set[str] = set()
            for operator in self.operators:
                for name in getattr(operator, side):
                    if name in seen:
                        raise HandoffError(
                            f"layout {self.name}: {name} stands in the {side} of two operators", "mend its declaration"
                        )
                    seen.add(name)

    @cached_property
    def source_names(self) -> tuple[str, ...]:
        """All names on the source's side."""
        return tuple(name for operator in self.operators for name in operator.inputs)

    @cached_property
    def forward_names(self) -> tuple[str, ...]:
        """All names on the target's side, in the order in which `export` gives them."""
        return tuple(name for operator in self.operators for name in operator.outputs)

    @cached_property
    def inverse(self) -> Layout:
        """The same layout read in the other direction."""
        return Layout(f"{self.name}, inverse", tuple(Inverse(operator) for operator in self.operators))

    def check_names(self, source: TensorSource) -> None:
        """Refuse a source that lacks a tensor or holds one more.

        Raises:
            HandoffError: which tensor.
        """
        found, wanted = set(source.names()), set(self.source_names)
        if missing := sorted(wanted - found):
            raise HandoffError(
                f"the source lacks {len(missing)} of {len(wanted)} tensors, the first: {', '.join(missing[:4])}",
                "the download or conversion is incomplete, or config.json is another model's",
            )
        if surplus := sorted(found - wanted):
            raise HandoffError(
                f"the source holds {len(surplus)} tensors that the layout {self.name} does not know, the first: "
                f"{', '.join(surplus[:4])}",
                "config.json is another model's, or another conversion left something over",
            )

    def described(self, operator: Operator, source: TensorSource) -> Tensors:
        """What one operator will give, as meta tensors: shapes and dtypes without a number being read."""
        held = {}
        for name in operator.inputs:
            held[name] = torch.empty(source.shape(name), dtype=source.dtype(name), device="meta")
        return operator.forward(held)

    def export(self, source: TensorSource) -> Iterator[Tensors]:
        """The target's tensors, one operator at a time.

        Raises:
            HandoffError: the source does not hold exactly what the layout takes.
        """
        self.check_names(source)
        for operator in self.operators:
            yield run(operator, source)

    def import_(self, source: TensorSource) -> Iterator[Tensors]:
        """The source's tensors from the target's, one operator at a time."""
        yield from self.inverse.export(source)


def run(operator: Operator, source: TensorSource) -> Tensors:
    """Read what an operator takes and give what it makes."""
    return operator.forward({name: source.read(name) for name in operator.inputs})
