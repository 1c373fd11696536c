"""DiLoCo's trainer over real shared memory, beside a sidecar that takes an outer step when a test wants it to."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed import HashStore, ProcessGroupGloo

from crosschip.train.outer.codec import CompressionName
from crosschip.train.outer.diloco import DiLoCo, Rhythm
from crosschip.train.outer.errors import SidecarLost
from crosschip.train.outer.exchange import ExchangeGroup
from crosschip.train.outer.memory import Layout, SharedMemory, open_descriptor
from crosschip.train.outer.messages import Config, Member, OuterStep, OuterStepDone, Rules, View
from crosschip.train.outer.outer_state import OuterState
from crosschip.train.outer.outer_step import take_outer_step
from crosschip.train.outer.placement import split_into_fragments
from crosschip.train.outer.time_limits import TimeLimits
from crosschip.train.outer.training_state import TrainingState

Answer = TypeVar("Answer")
SIZES = (3, 5)
LIMIT_S = 60.0


@dataclass
class Position:
    step: int = 0
    sequences: int = 0
    tokens: int = 0


class Weights(nn.Module):
    """Parameters of `SIZES`, all 0."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList([nn.Parameter(torch.zeros(size)) for size in SIZES])

    def train_by(self, change: float) -> None:
        """A step that adds the same to each number."""
        with torch.no_grad():
            for part in self.parts:
                part.add_(change)

    def values(self) -> list[set[float]]:
        """The different numbers in each parameter."""
        return [set(part.tolist()) for part in self.parts]


class SidecarHere:
    """In the place of a `SidecarHandle`, for one group that nobody else meets: an outer step with a learning rate of 1
    and no momentum makes what was sent the common parameters. `commit` takes it; `receive` does where nobody has.
    """

    def __init__(self, num_fragments: int, compression: CompressionName) -> None:
        layout = Layout(sum(SIZES), 4096, has_outer_state=True)
        fragments = tuple(split_into_fragments(SIZES, num_fragments))
        descriptor = open_descriptor(layout)
        self.memory = SharedMemory(descriptor, layout)
        os.close(descriptor)
        rules = Rules(compression, fragments, outer_learning_rate=1.0, outer_momentum=0.0)
        self.config = Config(Member(0, 1, 1, "http://nowhere"), rules, layout, TimeLimits())
        self.outer = OuterState(self.memory, fragments)
        self.sent: list[OuterStep] = []
        self.is_lost = False
        self._done: OuterStepDone | None = None
        gloo = ProcessGroupGloo(HashStore(), 0, 1, timedelta(seconds=LIMIT_S))
        self._group = ExchangeGroup(gloo, 0, 1, LIMIT_S)

    def serve(self) -> None:
        """It asks nothing."""

    def close(self) -> None:
        """Nothing is open."""

    def restart(self) -> None:
        """Forget the answer that the lost one owed."""
        self.is_lost, self._done = False, None

    def send(self, command: OuterStep) -> None:
        self.sent.append(command)
        self._done = None

    def commit(self) -> None:
        membership: Any = SimpleNamespace(seniority=0, commit=lambda *_: True, finish=lambda committed: None)
        self._done = take_outer_step(
            membership, self.outer, self.memory, self.config, lambda _: (View(0, 1, 0), self._group), self.sent[-1]
        )

    def receive(self, kind: type[Answer], may_give_up: bool = False) -> Answer:
        if self.is_lost:
            raise SidecarLost("killed", "start it again")
        if self._done is None:
            self.commit()
        done, self._done = self._done, None
        assert isinstance(done, kind)
        return done


@dataclass
class Training:
    """A group of one rank; `step` trains and tells it so."""

    weights: Weights
    optimizer: torch.optim.Optimizer
    sidecar: SidecarHere
    groups: DiLoCo

    def step(self, change: float = 1.0, updated: bool = True) -> None:
        self.weights.train_by(change)
        self.groups.after_update(10, updated)


def begun(
    interval: int = 4,
    overlap_steps: int = 2,
    num_fragments: int = 1,
    own_share: float | None = None,
    compression: CompressionName = "none",
) -> Training:
    """A group before its first step, which has met nobody."""
    weights = Weights()
    optimizer = torch.optim.SGD(weights.parameters(), lr=0.1, momentum=0.9)
    sidecar = SidecarHere(num_fragments, compression)
    start: Callable[[Any], Any] = lambda donate: sidecar  # noqa: E731
    state = TrainingState(weights, optimizer, Position())
    groups = DiLoCo(start, state.flat(), state, Rhythm(interval, overlap_steps, own_share, batch_size=2))
    groups.join()
    groups.new_events()
    sidecar.sent.clear()
    return Training(weights, optimizer, sidecar, groups)
