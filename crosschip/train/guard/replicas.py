"""Replicas that have to be equal to the last bit: which of them is not? Pure, no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Disagreement", "find_disagreement"]


@dataclass(frozen=True)
class Disagreement:
    """`odd` are the replicas that the majority is against; empty when there is no majority, as always with two."""

    odd: tuple[str, ...]
    checksums: dict[str, int]

    def words(self) -> str:
        """A sentence with every checksum."""
        told = ", ".join(f"{name} {value:08x}" for name, value in self.checksums.items())
        if self.odd:
            return f"the weights of {', '.join(self.odd)} differ from those of the majority: {told}"
        return f"the weights of the replicas differ, and no majority says which are right: {told}"


def find_disagreement(checksums: Mapping[str, int]) -> Disagreement | None:
    """None when all replicas have the same checksum. More than half of them make a majority.

    Checksums are those of `parameter_checksum`, each added up over the ranks of a replica; they count modulo 2^32.
    """
    checksums = {name: value % 2**32 for name, value in checksums.items()}
    counts = Counter(checksums.values())
    if len(counts) <= 1:
        return None
    value, count = counts.most_common(1)[0]
    is_majority = 2 * count > len(checksums)
    odd = tuple(name for name, each in checksums.items() if each != value) if is_majority else ()
    return Disagreement(odd, checksums)
