"""DiLoCo's outer state in the shared memory: the groups' common parameters and their momentum, fragment by fragment.

Nesterov SGD over outer gradients (Douillard et al. 2023, arXiv 2311.08105). Every group computes the update itself from
the same mean, and must get the same bits, also on another kind of CPU: so each operation is one multiplication or one
addition, which IEEE 754 rounds one way; nothing that a compiler may fuse.

A fragment has two slots. A new state is written to the slot that is not in use; which one is in use follows from the
number of committed outer steps, one number written last. A sidecar that is killed in between leaves a whole state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from crosschip.train.outer.agreement import standing
from crosschip.train.outer.memory import SharedMemory
from crosschip.train.outer.placement import Fragment

__all__ = ["OuterState"]

_PARAMETERS, _MOMENTUM = 0, 1


class OuterState:
    """The outer parameters and momentum over a `SharedMemory`; both sides look at the same."""

    def __init__(self, memory: SharedMemory, fragments: Sequence[Fragment]) -> None:
        self._memory = memory
        self.fragments = tuple(fragments)

    @property
    def commits(self) -> int:
        """Outer steps committed so far, over all fragments."""
        return self._memory.commits

    @property
    def standing(self) -> int:
        """What groups compare to find who is behind."""
        return standing(self.commits, self._memory.begun)

    @property
    def due(self) -> int:
        """The fragment of the next outer step: they take turns."""
        return self.commits % len(self.fragments)

    def _slot(self, fragment: int, commits: int) -> int:
        times = (commits - fragment + len(self.fragments) - 1) // len(self.fragments)  # that this fragment was written
        return times % 2

    def _part(self, kind: int, fragment: int, commits: int) -> torch.Tensor:
        here = self.fragments[fragment]
        return self._memory.outer[self._slot(fragment, commits), kind, here.start : here.stop]

    def parameters(self, fragment: int) -> torch.Tensor:
        """The common parameters of a fragment, flat."""
        return self._part(_PARAMETERS, fragment, self.commits)

    def vector(self, fragment: int, commits: int) -> torch.Tensor:
        """A vector of all parameters in which the common ones of this fragment stand in their places; no copy.

        `commits` is the present number of outer steps, or the one before.
        """
        return self._memory.outer[self._slot(fragment, commits), _PARAMETERS]

    def momentum(self, fragment: int) -> torch.Tensor:
        """The outer momentum of a fragment, flat."""
        return self._part(_MOMENTUM, fragment, self.commits)

    def begin(self, flat: torch.Tensor) -> None:
        """Begin anew at the parameters `flat`, without momentum."""
        self.load(torch.stack((flat, torch.zeros_like(flat))), commits=0)

    def step(self, gradient: torch.Tensor, learning_rate: float, momentum: float) -> None:
        """Apply the mean outer gradient of the fragment that is due, and count the step."""
        due, commits = self.due, self.commits
        velocity = self._part(_MOMENTUM, due, commits + 1)  # in the other slot, which counts with the commit
        torch.mul(self._part(_MOMENTUM, due, commits), momentum, out=velocity)
        velocity.add_(gradient)
        update = velocity * momentum
        update.add_(gradient)
        update.mul_(learning_rate)
        torch.sub(self._part(_PARAMETERS, due, commits), update, out=self._part(_PARAMETERS, due, commits + 1))
        self._memory.commits = commits + 1

    def export(self, commits: int) -> torch.Tensor:
        """A copy of parameters and momentum, [2, n], as after `commits` outer steps: the present number or the one
        before, whose slot stays whole while the next step is written.
        """
        numbers = range(len(self.fragments))
        kinds = [torch.cat([self._part(kind, each, commits) for each in numbers]) for kind in (_PARAMETERS, _MOMENTUM)]
        return torch.stack(kinds)

    def load(self, exported: torch.Tensor, commits: int) -> None:
        """Take over what `export` gave, and the count that belongs to it."""
        for number, fragment in enumerate(self.fragments):
            part = exported[:, fragment.start : fragment.stop]
            self._part(_PARAMETERS, number, commits).copy_(part[_PARAMETERS])
            self._part(_MOMENTUM, number, commits).copy_(part[_MOMENTUM])
        self._memory.commits = commits
