"""Which bits of a repeat differ from those of the other repeats, and whether one flipped bit explains it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from crosschip.qualify.exams.determinism.fixed_work import Bits, bits_of

__all__ = ["Difference", "Result", "first_difference", "results_bits"]


@dataclass(frozen=True)
class Result:
    """What a result's bytes stand for."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Difference:
    """The first result that differs. `place` is the index of its first element that does, `got` instead of `expected`.

    `num_bits` counts the bits that differ in all results; one means that a single flipped bit explains everything.
    """

    result: str
    place: tuple[int, ...]
    expected: float
    got: float
    bits_of_element: tuple[int, ...]  # the positions of its differing bits, 0 the least significant
    num_elements: int
    num_results: int
    num_bits: int

    @property
    def is_one_bit(self) -> bool:
        """Whether one flipped bit of a result explains it; more, if it was flipped before further work."""
        return self.num_bits == 1

    def words(self) -> str:
        """The difference in a line."""
        where = f"{self.result}[{', '.join(map(str, self.place))}]"
        one = f"{where} is {self.got:.6g} instead of {self.expected:.6g}"
        if self.is_one_bit:
            return f"{one}: one flipped bit, bit {self.bits_of_element[0]}"
        bits = f"{self.num_bits} bits in {self.num_elements} elements of {self.num_results} results"
        return f"{one}; {bits} differ, more than one flipped bit of a result"

    def document(self) -> dict[str, Any]:
        """For JSON, which has no word for NaN."""
        numbers = {
            name: value if math.isfinite(value) else str(value)
            for name, value in (("expected", self.expected), ("got", self.got))
        }
        return {**asdict(self), **numbers, "one_bit": self.is_one_bit}


def results_bits(results: dict[str, Any]) -> tuple[list[Result], Bits]:
    """The results' bytes on the CPU with what they stand for; those that are no tensors count as one of their kind."""
    held = {
        name: each if isinstance(each, torch.Tensor) else torch.tensor(each)
        for name, each in results.items()
        if each is not None
    }
    return [Result(name, each.dtype, tuple(each.shape)) for name, each in held.items()], bits_of(list(held.values()))


def first_difference(results: list[Result], expected: Bits, got: Bits) -> Difference | None:
    """What differs, None when nothing does. Results of other sizes than expected count as differing in every bit."""
    found: list[tuple[Result, torch.Tensor, torch.Tensor]] = [
        (result, one, other)
        for result, one, other in zip(results, expected, got, strict=False)
        if one.shape != other.shape or not torch.equal(one, other)
    ]
    if not found:
        return None
    num_bits = num_elements = 0
    for result, one, other in found:
        if one.shape != other.shape:
            num_bits, num_elements = num_bits + 8 * one.numel(), num_elements + math.prod(result.shape)
            continue
        flipped = torch.bitwise_xor(one, other).view(-1, result.dtype.itemsize)
        num_bits += sum(int(((flipped >> bit) & 1).sum()) for bit in range(8))
        num_elements += int((flipped != 0).any(dim=1).sum())
    return _described(*found[0], num_elements, len(found), num_bits)


def _described(
    result: Result, one: torch.Tensor, other: torch.Tensor, num_elements: int, num_results: int, num_bits: int
) -> Difference:
    if one.shape != other.shape:
        return Difference(result.name, (), math.nan, math.nan, (), num_elements, num_results, num_bits)
    size = result.dtype.itemsize
    flipped = torch.bitwise_xor(one, other).view(-1, size)
    flat = int((flipped != 0).any(dim=1).nonzero()[0])
    # Bytes lie with the least significant one first on every host that torch runs on in earnest.
    bits = tuple(8 * byte + bit for byte in range(size) for bit in range(8) if (int(flipped[flat, byte]) >> bit) & 1)
    place = torch.unravel_index(torch.tensor(flat), result.shape) if result.shape else ()
    numbers = [_number(each.view(-1, size)[flat], result.dtype) for each in (one, other)]
    return Difference(
        result.name,
        tuple(int(each) for each in place),
        numbers[0],
        numbers[1],
        bits,
        num_elements,
        num_results,
        num_bits,
    )


def _number(element: torch.Tensor, dtype: torch.dtype) -> float:
    value = element.clone().view(dtype)[0]
    return float(value.real) if value.is_complex() else float(value)
