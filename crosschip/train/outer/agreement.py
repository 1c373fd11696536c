"""What groups tell each other before they send anything large: who is behind, who must not go on. Pure: no torch."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from crosschip.train.outer.errors import GroupsError

__all__ = ["Header", "UnfitGroup", "begun_anew", "check_headers", "digest_of", "standing"]

_NOTHING_IN_COMMON = -(2**40)  # below every place that `begun_anew` gives

_EQUAL = {
    "rules": "settings (a digest of them)",
    "num_elements": "number of parameters of a rank",
    "num_numbers": "number of figures that go with a step",
    "step": "step",
}


class UnfitGroup(RuntimeError):
    """Another group came that does not belong here and must leave; this one tries again without it."""


def digest_of(text: str) -> int:
    """32 bits of a text, which fp64 holds exactly."""
    return zlib.crc32(text.encode())


def standing(count: int, begun: int = 0) -> int:
    """What groups compare to find who is behind, and must be healed: `count` common steps, or outer steps, so far.

    Without any, `begun` decides (see `begun_anew`); it is 0 for a group that begins at the first step.
    """
    return count if count > 0 else _NOTHING_IN_COMMON + begun


def begun_anew(step: int, group: int, num_groups: int) -> int:
    """Where `group` stands that has weights of its own, of a checkpoint after `step`, and no outer state to them.

    No two groups stand at the same place: the furthest gives its state to the others, of equals the first.
    """
    return step * num_groups + num_groups - group


@dataclass(frozen=True)
class Header:
    """One group's part of an exchange, as whole numbers below 2^53.

    `rules` is a digest of all that must be equal. `checksum` is that of the parameters that must be equal before the
    step, 0 where they were not looked at. `seniority` counts the commits in which the group has taken part.
    """

    rules: int
    num_elements: int
    num_numbers: int
    step: int
    num_tokens: int
    checksum: int
    seniority: int

    def numbers(self) -> list[float]:
        """The header for the wire."""
        return [float(each) for each in astuple(self)]

    @classmethod
    def read(cls, numbers: Sequence[float]) -> Header:
        """The header from the wire."""
        return cls(*(int(each) for each in numbers))


def check_headers(headers: Sequence[Header], own_rank: int) -> None:
    """Refuse an exchange between groups that do not belong together; a newcomer leaves, and those it came to stay.

    Raises:
        GroupsError: this group must leave: settings, sizes or steps differ from those of a group that was here before,
            or from those of an equally new one; or its parameters differ from those of most groups.
        UnfitGroup: another group must leave.
    """
    _check_settings(headers, headers[own_rank])
    _check_parameters(headers, headers[own_rank])


def _check_settings(headers: Sequence[Header], own: Header) -> None:
    for name, what in _EQUAL.items():
        values = [getattr(header, name) for header in headers]
        if len(set(values)) == 1:
            continue
        problem = f"the groups differ in the {what}: {values}, in the order of their ranks"
        others = [header.seniority for header in headers if getattr(header, name) != getattr(own, name)]
        if own.seniority > max(others):
            raise UnfitGroup(problem)
        raise GroupsError(
            problem,
            "start every group with the same recipe, the same number of ranks in a group and the same crosschip; on "
            "unlike chips groups may choose differently: set groups.mode, sync_every, overlap_steps and compression",
        )


def _check_parameters(headers: Sequence[Header], own: Header) -> None:
    counts = Counter(header.checksum for header in headers if header.checksum)
    if len(counts) < 2:
        return
    shown = ", ".join(f"{header.checksum:08x}" for header in headers)
    problem = (
        f"the groups' parameters differ after step {own.step} (checksums {shown}, in the order of their ranks); they "
        "must be equal: other weights to begin with, or memory or a chip that has erred"
    )
    most, number = counts.most_common(1)[0]
    if 2 * number > counts.total() and own.checksum in (most, 0):
        raise UnfitGroup(problem)
    raise GroupsError(
        problem,
        "start the group that is alone with its checksum again, it is then healed by the others; of two groups nobody "
        "can tell which is right: end both and go on from the last checkpoint with --resume",
    )
