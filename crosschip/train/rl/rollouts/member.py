"""One engine among several: where it is, which weights it answers with, what it was asked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from crosschip.train.rl.rollouts.answers import Answer
from crosschip.train.rl.rollouts.engine import HttpEngine
from crosschip.train.rl.rollouts.errors import BadAnswer
from crosschip.train.rl.rollouts.local import LocalEngine
from crosschip.train.rl.rollouts.publishing import Publication
from crosschip.train.rl.rollouts.standing import Standing
from crosschip.train.rl.sample import Sample

__all__ = ["MOST_RESTARTS", "Member", "RemoteEngine", "is_able", "pick", "samples_of"]

MOST_RESTARTS = 3  # of an engine started here, without a batch in between


@dataclass(frozen=True)
class RemoteEngine:
    """An engine that runs already and sees the run directory under the same path."""

    name: str
    url: str


@dataclass(eq=False)
class Member:
    """The state of one engine.

    `confirmed` are the weights it said it answers with, `loading` those it was told to load. `requests` are under way,
    `gated` holds back new ones until the weights are loaded. A `dropped` engine gets none; if `may_return`, it is
    looked for at the next publication.
    """

    source: LocalEngine | RemoteEngine
    client: HttpEngine | None = None
    state: Literal["down", "up", "probing", "dropped"] = "down"
    confirmed: Publication | None = None
    loading: Publication | None = None
    starts_on: Publication | None = None  # an own process that is being started reads these
    offered: list[Publication] = field(default_factory=list)
    requests: set[asyncio.Task[list[Answer]]] = field(default_factory=set)
    groups: set[int] = field(default_factory=set)  # numbers of the problems it works on
    gated: bool = False
    was_up: bool = False
    may_return: bool = False
    restarts_left: int = MOST_RESTARTS
    said: str = ""
    standing: Standing = field(default_factory=Standing)
    tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)  # one for each purpose

    @property
    def name(self) -> str:
        """What it is called in samples, events and errors."""
        return self.source.name

    @property
    def local(self) -> LocalEngine | None:
        """Its process, if it was started here."""
        return self.source if isinstance(self.source, LocalEngine) else None

    def capacity(self, num_samples: int, max_batch_size: int) -> int:
        """Groups it may hold: what it computes together, and one that waits. More would wait in vain beside an engine
        that is faster."""
        identity = self.client.identity if self.client is not None else None
        size = (identity.max_batch_size if identity is not None else None) or max_batch_size
        return -(-size // num_samples) + 1

    def lose_requests(self, why: str) -> None:
        """Whoever waits for this engine asks another one."""
        for request in self.requests:
            request.cancel(why)


def is_able(member: Member) -> bool:
    """Whether it can be asked at all."""
    return member.state == "up" and member.confirmed is not None and member.client is not None and not member.gated


def pick(members: Iterable[Member], is_allowed: Callable[[Member], bool], avoid: Member | None = None) -> Member | None:
    """The engine with the fewest groups among those that can be asked and are allowed; the first of equals. `avoid`
    only if there is no other."""
    able = [member for member in members if is_able(member) and is_allowed(member)]
    others = [member for member in able if member is not avoid] or able
    return min(others, key=lambda member: len(member.groups), default=None)


def samples_of(name: str, client: HttpEngine, answers: list[Answer], publications: list[Publication]) -> list[Sample]:
    """Answers of the engine `name` as samples. `publications` are the weights that may have answered, those that it
    was asked with first.

    Raises:
        BadAnswer: they are of other weights.
    """
    assert client.identity is not None
    versions: dict[str | None, int] = {publication.name: publication.version for publication in publications}
    if client.identity.kind == "vllm":  # does not say; it gets no request while it loads, so these are the ones
        versions = {None: publications[0].version}
    samples = []
    for answer in answers:
        version = versions.get(answer.weights_name)
        if version is None:
            expected = " or ".join(str(known) for known in versions)
            raise BadAnswer("wrong version", f"it answers with weights {answer.weights_name!r}, not {expected}")
        fields: dict[str, Any] = {"text": "", "engine": name, "chip": client.identity.chip, "routes": answer.routes}
        of_tokens = (version,) * len(answer.token_ids)
        samples.append(Sample(answer.token_ids, answer.logprobs, of_tokens, answer.finished, **fields))
    return samples
