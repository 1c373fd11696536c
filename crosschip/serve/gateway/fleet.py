"""The engines as the gateway sees them, and which one takes a request. Policy, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from crosschip.certificate import Status
from crosschip.serve.gateway.canary import Split
from crosschip.serve.gateway.prefixes import PrefixMemory, conversation_key, prefix_digests, prompt_text
from crosschip.serve.gateway.settings import EngineTable, GatewaySettings

__all__ = ["Ask", "EngineState", "Fleet", "Weights"]

_NOT_ASKED = "it was not asked yet"


@dataclass
class EngineState:
    """One engine: what its table says, and what was last seen of it."""

    table: EngineTable
    certificate: Status
    problem: str | None = _NOT_ASKED  # None: it is healthy
    failures: int = 0
    draining: bool = False
    in_flight: int = 0
    queue: int | None = None  # requests that wait in the engine, where it tells
    weights_version: str = ""
    instance: str = ""  # of the process that answers: a new one may have other weights under the same version
    card: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its name."""
        return self.table.name

    @property
    def has_room(self) -> bool:
        """Whether another request may be sent to it."""
        return self.in_flight < self.table.max_in_flight

    @property
    def load(self) -> float:
        """Requests on it, by its weight."""
        return self.in_flight / self.table.weight

    def describe(self) -> dict[str, Any]:
        """For the list of engines."""
        return {
            "name": self.name,
            "model": self.table.model,
            "kind": self.table.kind,
            "chip": self.table.chip,
            "group": self.table.group,
            "healthy": self.problem is None,
            "problem": self.problem,
            "draining": self.draining,
            "in_flight": self.in_flight,
            "queue": self.queue,
            "weights_version": self.weights_version or None,
            "certificate": self.certificate.word,
            "certificate_problem": self.certificate.problem,
        }


class Weights(NamedTuple):
    """What an engine's weights are told from others by: a version within the process (`instance`) that answers."""

    version: str = ""
    instance: str = ""


@dataclass(eq=False)
class Ask:
    """What a request wants of the fleet. `tried` are the engines that it was on already; `group` is its canary's."""

    model: str
    digests: list[bytes]
    key: bytes
    is_later_turn: bool
    tried: set[str] = field(default_factory=set)
    group: str | None = None

    @classmethod
    def of(cls, model: str, body: dict[str, Any]) -> Ask:
        """The ask of a request's body."""
        key, later = conversation_key(body)
        return cls(model, prefix_digests(prompt_text(body)), key, later)


class Fleet:
    """All engines, the splits, and the memory of prefixes."""

    def __init__(self, settings: GatewaySettings, certificates: dict[str, Status], require_certificate: bool) -> None:
        self.engines = [EngineState(table, certificates[table.name]) for table in settings.engines]
        self.require_certificate = require_certificate
        self._slack = settings.forwarding.affinity_slack
        self._prefixes = PrefixMemory()
        self._splits = {split.model: Split(split.shares) for split in settings.splits}

    def of_model(self, model: str) -> list[EngineState]:
        """The engines that serve a model."""
        return [engine for engine in self.engines if engine.table.model == model]

    @property
    def models(self) -> list[str]:
        """What clients can ask for."""
        return list(dict.fromkeys(engine.table.model for engine in self.engines))

    def named(self, name: str) -> EngineState | None:
        """The engine of a name."""
        return next((engine for engine in self.engines if engine.name == name), None)

    def is_usable(self, engine: EngineState) -> bool:
        """Whether it is up, as far as requests may go to it."""
        certified = engine.certificate.is_certified or not self.require_certificate
        return engine.problem is None and not engine.draining and certified

    def has_share(self, engine: EngineState) -> bool:
        """Whether requests go to its group: a split may give it a share of 0."""
        split = self._splits.get(engine.table.model)
        return split is None or split.has_share(engine.table.group)

    def usable_of_model(self, model: str) -> list[EngineState]:
        """The engines that a model's requests go to, whether they have room or not."""
        return [engine for engine in self.of_model(model) if self.is_usable(engine) and self.has_share(engine)]

    def usable(self, ask: Ask) -> list[EngineState]:
        """The engines that this request could still go to, whether they have room or not."""
        return [engine for engine in self.usable_of_model(ask.model) if engine.name not in ask.tried]

    def choose(self, ask: Ask) -> EngineState | None:
        """The engine for a request, which it now is on (`leave` ends that); None when none has room.

        The canary's share comes first; a group that is down or was tried leaves its share to the others. Within the
        group: the engine that knows the longest beginning of the prompt, unless it has `affinity_slack` more requests
        than the least loaded.
        """
        engines = self._of_group(ask, self.usable(ask))
        free = [engine for engine in engines if engine.has_room]
        if not free:
            return None
        least = min(free, key=lambda engine: engine.load)
        known = self._prefixes.longest(ask.digests)
        chosen = next((e for e in free if e.name == known and e.load <= least.load + self._slack), least)
        self._prefixes.remember(ask.digests, chosen.name)
        chosen.in_flight += 1
        return chosen

    def leave(self, engine: EngineState) -> None:
        """A request is no longer on the engine."""
        assert engine.in_flight > 0
        engine.in_flight -= 1

    def mark_healthy(self, engine: EngineState) -> None:
        """The engine answered."""
        engine.failures, engine.problem = 0, None

    def forget_prefixes(self, engine: EngineState) -> None:
        """It has computed none of what it was given before."""
        self._prefixes.forget_engine(engine.name)

    def mark_failed(self, engine: EngineState, problem: str, allowed: int) -> None:
        """The engine failed; with the `allowed`-th failure in a row it gets no requests any more."""
        engine.failures += 1
        if engine.failures >= allowed or engine.problem is not None:
            if engine.problem is None:
                self.forget_prefixes(engine)
            engine.problem = problem

    def _of_group(self, ask: Ask, engines: Sequence[EngineState]) -> Sequence[EngineState]:
        split = self._splits.get(ask.model)
        if split is None or not engines:
            return engines
        groups = {engine.table.group for engine in engines}
        if ask.group not in groups:
            ask.group = split.choose(ask.key, ask.is_later_turn, groups)
        return [engine for engine in engines if engine.table.group == ask.group]
