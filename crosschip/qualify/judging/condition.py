"""When does it fail? The simplest condition that holds for cases that failed and for none that passed. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

__all__ = ["Atom", "Cause", "causes"]

Features = dict[str, Any]


@dataclass(frozen=True)
class Atom:
    """One comparison of one feature. `relation` is `is`, `is not`, `more than` or `at most`."""

    feature: str
    relation: str
    value: Any

    def holds(self, features: Features) -> bool:
        """Whether a case with these features meets it."""
        found = features[self.feature]
        if self.relation == "is":
            return bool(found == self.value)
        if self.relation == "is not":
            return bool(found != self.value)
        return bool(found > self.value if self.relation == "more than" else found <= self.value)

    def __str__(self) -> str:
        return f"{self.feature} {self.relation} {self.value}"


@dataclass(frozen=True)
class Cause:
    """Cases that fail together, and the share of failures among all cases that meet the atoms.

    Without atoms the share is that of all cases: 1 when nothing passed, small when nothing simple tells them apart.
    """

    atoms: tuple[Atom, ...]
    members: tuple[int, ...]  # places among the failing cases
    share: float = 1.0

    def __str__(self) -> str:
        if not self.atoms:
            nearly = "" if self.share == 1 else "nearly "
            return f"in {nearly}every case" if self.share > 0.9 else "in some cases, without a simple rule"
        return ("" if self.share == 1 else "mostly ") + "where " + " and ".join(map(str, self.atoms))


def causes(failing: Sequence[Features], passing: Sequence[Features], most: int = 3) -> list[Cause]:
    """Group failing cases under the simplest conditions, at most `most`; what is left over is one group without one.

    Features come in the order of preference: of two conditions that tell the same, the one named first is taken. One
    condition that holds for all failing cases and for fewer passing ones is better than several exact ones: a case may
    pass because it could not have shown the failure.
    """
    if not failing:
        return []
    everything = tuple(range(len(failing)))
    share = len(failing) / (len(failing) + len(passing))
    if share > 0.9:
        return [Cause((), everything, share)]
    atoms = [(atom, _mask(atom, failing), _mask(atom, passing)) for atom in _atoms([*failing, *passing])]
    exact = _exact_causes(atoms, len(failing), most)
    if len(exact) == 1 and exact[0].atoms:
        return exact
    return _one_for_all(atoms, len(failing)) or [
        cause if cause.atoms else Cause((), cause.members, share) for cause in exact
    ]


def _exact_causes(atoms: list[tuple[Atom, int, int]], num_failing: int, most: int) -> list[Cause]:
    left = (1 << num_failing) - 1
    found: list[Cause] = []
    while left and len(found) < most:
        best = _best(atoms, left)
        if best is None:
            break
        chosen, covered = best
        found.append(Cause(chosen, _places(covered & left)))
        left &= ~covered
    if left:
        found.append(Cause((), _places(left)))
    return found


def _one_for_all(atoms: list[tuple[Atom, int, int]], num_failing: int) -> list[Cause]:
    """One condition that every failing case meets, and more failing cases than passing ones."""
    everything = (1 << num_failing) - 1
    shared = [entry for entry in atoms if entry[1] == everything]
    best: tuple[float, tuple[Atom, ...]] = (0.5, ())
    for number in (1, 2):
        for chosen in combinations(shared, number):
            passing = -1
            for _, _, mask in chosen:
                passing &= mask
            share = num_failing / (num_failing + passing.bit_count())
            if share > best[0] + 0.05 * (number - 1):
                best = share, tuple(atom for atom, _, _ in chosen)
    return [Cause(best[1], _places(everything), best[0])] if best[1] else []


def _best(atoms: list[tuple[Atom, int, int]], left: int) -> tuple[tuple[Atom, ...], int] | None:
    """The conjunction without a passing case that explains most of what is left; the shortest, then the first."""
    useful = [entry for entry in atoms if entry[1] & left]
    best: tuple[int, tuple[Atom, ...], int] | None = None
    for number in (1, 2, 3):
        candidates = useful
        if number == 3:  # only atoms that hold for all that is left: a triple need not be found otherwise
            candidates = [entry for entry in useful if entry[1] & left == left]
        for chosen in combinations(candidates, number):
            failing = passing = -1
            for _, mask, other in chosen:
                failing &= mask
                passing &= other
            count = (failing & left).bit_count()
            if passing == 0 and count > (best[0] if best else 0):
                best = count, tuple(atom for atom, _, _ in chosen), failing
        if best is not None and best[0] == left.bit_count():
            break
    return None if best is None else best[1:]


def _mask(atom: Atom, cases: Sequence[Features]) -> int:
    return sum(1 << place for place, features in enumerate(cases) if atom.holds(features))


def _places(mask: int) -> tuple[int, ...]:
    return tuple(place for place in range(mask.bit_length()) if mask >> place & 1)


def _atoms(cases: Sequence[Features]) -> list[Atom]:
    """Comparisons worth trying: equality for words, thresholds (the tightest first) for numbers."""
    made = []
    for feature in cases[0]:
        values = {features[feature] for features in cases}
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            ordered = sorted(values)
            made += [Atom(feature, "more than", value) for value in reversed(ordered[:-1])]
            made += [Atom(feature, "at most", value) for value in ordered[:-1]]
        elif len(values) > 1:
            made += [Atom(feature, "is", value) for value in sorted(values, key=str)]
            if len(values) > 2:
                made += [Atom(feature, "is not", value) for value in sorted(values, key=str)]
    return made
