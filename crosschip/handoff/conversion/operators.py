"""Invertible operators on named tensors: what a change of layout is made of.

`forward` is export, from the source's layout to the target's; `backward` is import. Each operator takes exactly its
`inputs` and gives exactly its `outputs`. All work on meta tensors as well, which tells the shapes of a conversion
before it runs. Lossy ones (`Cast`, `Quantise`) keep `forward(backward(y)) == y` bit for bit.
"""

# ruff: noqa: D102  (the methods' words stand at the protocol)

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from crosschip.errors import HandoffError, ModelError
from crosschip.model.quantised import (
    FP8_DTYPES,
    Quantisation,
    check_dialect,
    dequantise,
    quantise_blocks,
    quantise_channels,
)

__all__ = [
    "Cast",
    "Chain",
    "Copy",
    "Interleave",
    "Inverse",
    "Operator",
    "Quantise",
    "Rename",
    "Reshape",
    "Split",
    "Stack",
    "Tensors",
    "Transpose",
]

Tensors = dict[str, torch.Tensor]


class Operator(Protocol):
    """One step between two layouts, in both directions."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names on the source's side."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names on the target's side."""

    def forward(self, tensors: Tensors) -> Tensors:
        """From the source's layout to the target's."""

    def backward(self, tensors: Tensors) -> Tensors:
        """From the target's layout to the source's."""


@dataclass(frozen=True)
class _OneToOne:
    """The names of an operator with one tensor on either side."""

    source: str
    target: str

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.source,)

    @property
    def outputs(self) -> tuple[str, ...]:
        return (self.target,)


@dataclass(frozen=True)
class Rename(_OneToOne):
    """The same tensor under another name (or the same)."""

    def forward(self, tensors: Tensors) -> Tensors:
        return {self.target: tensors[self.source]}

    def backward(self, tensors: Tensors) -> Tensors:
        return {self.source: tensors[self.target]}


@dataclass(frozen=True)
class Transpose(_OneToOne):
    """Dimensions in another order: dimension `i` of the target is dimension `dims[i]` of the source."""

    dims: tuple[int, ...]

    def forward(self, tensors: Tensors) -> Tensors:
        return {self.target: tensors[self.source].permute(self.dims).contiguous()}

    def backward(self, tensors: Tensors) -> Tensors:
        back = sorted(range(len(self.dims)), key=self.dims.__getitem__)
        return {self.source: tensors[self.target].permute(back).contiguous()}


@dataclass(frozen=True)
class Reshape(_OneToOne):
    """The same numbers in the same order in another shape; both shapes are whole, without -1."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    def forward(self, tensors: Tensors) -> Tensors:
        return {self.target: _of_shape(self.source, tensors[self.source], self.before).reshape(self.after)}

    def backward(self, tensors: Tensors) -> Tensors:
        return {self.source: _of_shape(self.target, tensors[self.target], self.after).reshape(self.before)}


@dataclass(frozen=True)
class Interleave(_OneToOne):
    """Along `dim`, each of `blocks` equal blocks lies as `parts` runs and becomes element by element of each run.

    With parts=2 a head's rows (a0 a1 .. b0 b1 ..) become (a0 b0 a1 b1 ..): the two layouts of rotary embeddings.
    """

    parts: int = 2
    blocks: int = 1
    dim: int = 0

    def forward(self, tensors: Tensors) -> Tensors:
        return {self.target: self._swapped(self.source, tensors[self.source], (self.blocks, self.parts, -1))}

    def backward(self, tensors: Tensors) -> Tensors:
        return {self.source: self._swapped(self.target, tensors[self.target], (self.blocks, -1, self.parts))}

    def _swapped(self, name: str, tensor: torch.Tensor, sizes: tuple[int, int, int]) -> torch.Tensor:
        if tensor.shape[self.dim] % (self.blocks * self.parts):
            raise HandoffError(
                f"{name} has {tensor.shape[self.dim]} along dimension {self.dim}, which is not {self.blocks} blocks "
                f"of {self.parts} equal parts",
                "the layout was declared for another architecture",
            )
        cut = tensor.unflatten(self.dim, sizes)
        dim = self.dim % tensor.dim()
        return cut.transpose(dim + 1, dim + 2).flatten(dim, dim + 2).contiguous()


@dataclass(frozen=True)
class Stack:
    """Tensors of one shape become one tensor with a new dimension `dim`, in the order of `sources`."""

    sources: tuple[str, ...]
    target: str
    dim: int = 0

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.sources

    @property
    def outputs(self) -> tuple[str, ...]:
        return (self.target,)

    def forward(self, tensors: Tensors) -> Tensors:
        parts = [tensors[name] for name in self.sources]
        if len({part.shape for part in parts}) > 1:
            name = next(name for name in self.sources if tensors[name].shape != parts[0].shape)
            raise HandoffError(
                f"{name} has shape {tuple(tensors[name].shape)}, {self.sources[0]} has {tuple(parts[0].shape)}: "
                f"they cannot be stacked to {self.target}",
                "the layout was declared for another architecture, or a file is damaged",
            )
        return {self.target: torch.stack(parts, self.dim)}

    def backward(self, tensors: Tensors) -> Tensors:
        stacked = tensors[self.target]
        if stacked.shape[self.dim] != len(self.sources):
            raise HandoffError(
                f"{self.target} stacks {stacked.shape[self.dim]} tensors, expected {len(self.sources)}",
                "the layout was declared for another architecture, or a file is damaged",
            )
        return dict(zip(self.sources, stacked.unbind(self.dim), strict=True))


@dataclass(frozen=True)
class Split:
    """One tensor becomes several along `dim`, of the given sizes."""

    source: str
    targets: tuple[str, ...]
    sizes: tuple[int, ...]
    dim: int = 0

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.source,)

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.targets

    def forward(self, tensors: Tensors) -> Tensors:
        whole = tensors[self.source]
        if whole.shape[self.dim] != sum(self.sizes):
            raise HandoffError(
                f"{self.source} has {whole.shape[self.dim]} along dimension {self.dim}, "
                f"expected {' + '.join(map(str, self.sizes))}",
                "the layout was declared for another architecture, or a file is damaged",
            )
        return dict(zip(self.targets, whole.split(self.sizes, self.dim), strict=True))

    def backward(self, tensors: Tensors) -> Tensors:
        for name, size in zip(self.targets, self.sizes, strict=True):
            if tensors[name].shape[self.dim] != size:
                raise HandoffError(
                    f"{name} has {tensors[name].shape[self.dim]} along dimension {self.dim}, expected {size}",
                    "the layout was declared for another architecture, or a file is damaged",
                )
        return {self.source: torch.cat([tensors[name] for name in self.targets], self.dim)}


@dataclass(frozen=True)
class Cast(_OneToOne):
    """Another dtype: `dtype` on the target's side, `source_dtype` on the source's, which must hold all of it."""

    dtype: torch.dtype
    source_dtype: torch.dtype = torch.float32

    def forward(self, tensors: Tensors) -> Tensors:
        return {self.target: tensors[self.source].to(self.dtype)}

    def backward(self, tensors: Tensors) -> Tensors:
        return {self.source: tensors[self.target].to(self.source_dtype)}


@dataclass(frozen=True)
class Copy:
    """One tensor stands under several names, for engines that do not share it; imported, all must be equal."""

    source: str
    targets: tuple[str, ...]

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.source,)

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.targets

    def forward(self, tensors: Tensors) -> Tensors:
        return dict.fromkeys(self.targets, tensors[self.source])

    def backward(self, tensors: Tensors) -> Tensors:
        first, *others = self.targets
        for name in others:
            if not tensors[name].is_meta and not torch.equal(tensors[first], tensors[name]):
                raise HandoffError(
                    f"{name} differs from {first}, of which it should be a copy",
                    "this architecture shares the two; use another engine for this model",
                )
        return {self.source: tensors[first]}


@dataclass(frozen=True)
class Quantise:
    """A matrix becomes 8-bit codes and scales; imported, it is fp32."""

    source: str
    weight: str
    scale: str
    how: Quantisation

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.source,)

    @property
    def outputs(self) -> tuple[str, ...]:
        return (self.weight, self.scale)

    def forward(self, tensors: Tensors) -> Tensors:
        matrix = tensors[self.source]
        try:
            of_blocks = self.how.kind == "fp8"
            codes, scale = quantise_blocks(matrix, self.how.block) if of_blocks else quantise_channels(matrix)
        except ModelError as error:
            raise ModelError(f"{self.source}: {error.problem}", error.remedy) from None
        return {self.weight: codes, self.scale: scale}

    def backward(self, tensors: Tensors) -> Tensors:
        codes = tensors[self.weight]
        if codes.dtype in FP8_DTYPES and not codes.is_meta:
            check_dialect(self.weight, codes)
        return {self.source: dequantise(self.weight, codes, tensors[self.scale], self.how.block)}


@dataclass(frozen=True)
class Chain:
    """Operators one after the other, as one; names between them are its own."""

    operators: tuple[Operator, ...]

    @property
    def inputs(self) -> tuple[str, ...]:
        made: set[str] = set()
        needed: list[str] = []
        for operator in self.operators:
            needed += [name for name in operator.inputs if name not in made]
            made.update(operator.outputs)
        return tuple(needed)

    @property
    def outputs(self) -> tuple[str, ...]:
        used: set[str] = set()
        given: list[str] = []
        for operator in reversed(self.operators):
            given = [name for name in operator.outputs if name not in used] + given
            used.update(operator.inputs)
        return tuple(given)

    def forward(self, tensors: Tensors) -> Tensors:
        return _through(tensors, self.operators)

    def backward(self, tensors: Tensors) -> Tensors:
        return _through(tensors, [Inverse(operator) for operator in reversed(self.operators)])


@dataclass(frozen=True)
class Inverse:
    """An operator in the other direction."""

    operator: Operator

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.operator.outputs

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.operator.inputs

    def forward(self, tensors: Tensors) -> Tensors:
        return self.operator.backward(tensors)

    def backward(self, tensors: Tensors) -> Tensors:
        return self.operator.forward(tensors)


def _through(tensors: Tensors, operators: Iterable[Operator]) -> Tensors:
    """Give each operator what it needs and keep the rest; what is used is dropped, so that its memory is free."""
    held = dict(tensors)
    for operator in operators:
        made = operator.forward({name: held.pop(name) for name in operator.inputs})
        held |= made
    return held


def _of_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if tuple(tensor.shape) != shape:
        raise HandoffError(
            f"{name} has shape {tuple(tensor.shape)}, expected {shape}",
            "the layout was declared for another architecture, or a file is damaged",
        )
    return tensor
