"""What a trainer's rank and its sidecar say to each other over the pipe between them. Plain data, pickled."""

from __future__ import annotations

from dataclasses import dataclass

from crosschip.train.outer.codec import CompressionName
from crosschip.train.outer.memory import Layout
from crosschip.train.outer.placement import Fragment
from crosschip.train.outer.time_limits import TimeLimits

__all__ = [
    "Average",
    "Averaged",
    "Close",
    "Command",
    "Config",
    "Donate",
    "Donation",
    "Failed",
    "Hello",
    "Join",
    "Joined",
    "Member",
    "OuterStep",
    "OuterStepDone",
    "Reply",
    "Rules",
    "TensorEntry",
    "View",
]


@dataclass(frozen=True)
class Member:
    """Who this sidecar is: rank `rank` of the `size` ranks of group `group` of `num_groups`.

    `lighthouse` is its address, `http://HOST:PORT`; `store` the address of the group's store, which rank 0's
    sidecar opens (and for which it has None here). A quorum needs `min_groups`.
    """

    group: int
    num_groups: int
    min_groups: int
    lighthouse: str
    rank: int = 0
    size: int = 1
    store: str | None = None


@dataclass(frozen=True)
class Rules:
    """What all groups must have in common; `settings` is any text that must be equal, such as the recipe's digest."""

    compression: CompressionName
    fragments: tuple[Fragment, ...] = ()
    outer_learning_rate: float = 0.0
    outer_momentum: float = 0.0
    settings: str = ""


@dataclass(frozen=True)
class Config:
    """All that a sidecar is told when it starts."""

    member: Member
    rules: Rules
    layout: Layout
    limits: TimeLimits


@dataclass(frozen=True)
class Hello:
    """The sidecar is there; `store` is what the group's other ranks need."""

    store: str


@dataclass(frozen=True)
class TensorEntry:
    """Where a named tensor lies in the part of the memory for the training state."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


@dataclass(frozen=True)
class Donate:
    """The sidecar asks for the training state: another group joins."""


@dataclass(frozen=True)
class Donation:
    """The training state: tensors in the shared memory, and the position (step, sequences, tokens)."""

    entries: tuple[TensorEntry, ...]
    position: dict[str, int]


@dataclass(frozen=True)
class View:
    """The groups that take part now, and where the furthest stands.

    `donation` is there when this group was behind and has been healed.
    """

    rank: int
    num_participants: int
    max_step: int
    donation: Donation | None = None


@dataclass(frozen=True)
class Join:
    """Ask who takes part in the next step, and be healed when behind: `step` is where the group stands (`standing`).

    A group that waits for the others at the start of a run is not ready.
    """

    step: int
    is_ready: bool


@dataclass(frozen=True)
class Joined:
    """The answer to `Join`. All begin together: when all planned groups are there, or one is ready."""

    view: View
    may_begin: bool


@dataclass(frozen=True)
class Average:
    """Average the exchange part over the groups, weighted by `num_tokens`; `numbers` are summed.

    `checksum` is that of the parameters, which must be equal in all groups; 0 where they were not looked at.
    """

    step: int
    num_tokens: int
    numbers: tuple[float, ...]
    checksum: int


@dataclass(frozen=True)
class Averaged:
    """The answer to `Average`; without commit the exchange part holds nothing of use, and `reason` says why."""

    committed: bool
    num_tokens: int
    numbers: tuple[float, ...]
    num_bytes_sent: int
    seconds: float
    reason: str = ""


@dataclass(frozen=True)
class OuterStep:
    """Take the next outer step: the fragment that is due lies in the exchange part; `numbers` are averaged.

    A group without tokens of its own (one that joins) takes part without weight.
    """

    num_tokens: int
    numbers: tuple[float, ...]


@dataclass(frozen=True)
class OuterStepDone:
    """The answer to `OuterStep`. `committed` is False only when no group had tokens.

    `excluded` says why this group's own part was left out, if it was. `failures` are the tries before this one.
    `wire_s` and `wire_bytes` are those of the parameters alone, after the groups had met.
    """

    committed: bool
    commits: int
    fragment: int
    view: View
    num_contributing: int
    numbers: tuple[float, ...]
    num_bytes_sent: int
    seconds: float
    excluded: str = ""
    failures: tuple[str, ...] = ()
    wire_s: float = 0.0
    wire_bytes: int = 0


@dataclass(frozen=True)
class Failed:
    """The sidecar cannot go on: the problem and the remedy of a `GroupsError`."""

    problem: str
    remedy: str


@dataclass(frozen=True)
class Close:
    """The trainer is done; the sidecar ends."""


Reply = Hello | Joined | Averaged | OuterStepDone
Command = Join | Average | OuterStep
