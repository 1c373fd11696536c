"""The sidecar's part of DiLoCo: one outer step over the groups for the fragment that is due, tried until it commits.

The outer gradient is the common parameters minus the local ones. A try fails when a group dies in it; nothing is lost
then for the others, as the local parameters still lie in the exchange part for the next try.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from crosschip.train.outer.averaging import Gathered, codec_for, gather, header_of
from crosschip.train.outer.exchange import ExchangeGroup, Mean, weighted_mean
from crosschip.train.outer.membership import Membership
from crosschip.train.outer.memory import SharedMemory, checksum_of
from crosschip.train.outer.messages import Config, OuterStep, OuterStepDone, View
from crosschip.train.outer.outer_state import OuterState

__all__ = ["take_outer_step"]


@dataclass
class _Attempt:
    """One try: who took part, what they said, and the mean outer gradient; `trouble` when it failed."""

    view: View
    fragment: int
    gathered: Gathered | None = None
    mean: Mean | None = None
    excluded: str = ""
    trouble: str = ""


def take_outer_step(
    membership: Membership,
    outer: OuterState,
    memory: SharedMemory,
    config: Config,
    join: Callable[[int], tuple[View, ExchangeGroup]],
    command: OuterStep,
) -> OuterStepDone:
    """Try until the outer step is committed, or nobody has anything to give.

    Raises:
        GroupsError: the groups do not belong together, or there is no quorum.
    """
    started = time.monotonic()
    num_tokens, failures, donation, num_bytes = command.num_tokens, [], None, 0
    while True:
        view, group = join(outer.standing)
        if view.donation is not None:
            donation, num_tokens = view.donation, 0  # what was trained from older parameters is given up
        if group.size < config.member.min_groups:
            membership.wait_for_more()
            continue
        attempt = _try(group, view, outer, memory, config, num_tokens, command.numbers, membership.seniority)
        is_idle = attempt.gathered is not None and not any(attempt.gathered.weights)
        if is_idle and not attempt.trouble:
            membership.finish(committed=True)
        elif not membership.commit(outer.commits, not attempt.trouble):
            failures.append(attempt.trouble or "another rank of this group failed")
            continue
        assert attempt.gathered is not None
        if attempt.mean is not None:
            _apply(attempt.mean, attempt.fragment, outer, memory, config)
            num_bytes = attempt.mean.num_bytes_sent
        return OuterStepDone(
            committed=not is_idle,
            commits=outer.commits,
            fragment=attempt.fragment,
            view=View(view.rank, view.num_participants, view.max_step, donation),
            num_contributing=sum(weight > 0 for weight in attempt.gathered.weights),
            numbers=_mean_numbers(attempt.gathered),
            num_bytes_sent=num_bytes + attempt.gathered.num_bytes,
            seconds=time.monotonic() - started,
            excluded=attempt.excluded,
            failures=tuple(failures),
            wire_s=attempt.mean.wire_s if attempt.mean else 0.0,
            wire_bytes=attempt.mean.num_bytes_sent if attempt.mean else 0,
        )


def _try(
    group: ExchangeGroup,
    view: View,
    outer: OuterState,
    memory: SharedMemory,
    config: Config,
    num_tokens: int,
    numbers: Sequence[float],
    seniority: int,
) -> _Attempt:
    attempt = _Attempt(view, outer.due)
    here = outer.fragments[outer.due]
    common = outer.parameters(outer.due)
    gradient = common - memory.exchange[here.start : here.stop]
    if num_tokens and not all(torch.isfinite(bound) for bound in gradient.aminmax()):  # NaN passes through both
        attempt.excluded = "parameters that are not finite; this group's part was left out"
        num_tokens = 0
    checksum = checksum_of(common)
    try:
        own = header_of(config, seniority, outer.commits, num_tokens, len(numbers), checksum)
        attempt.gathered = gather(group, own, numbers)
        if any(attempt.gathered.weights):
            residual = memory.residual[here.start : here.stop]
            attempt.mean = weighted_mean(group, gradient, attempt.gathered.weights, codec_for(config, group), residual)
    except (RuntimeError, OSError) as error:
        attempt.trouble = f"{type(error).__name__}: {error}"
    return attempt


def _apply(mean: Mean, fragment: int, outer: OuterState, memory: SharedMemory, config: Config) -> None:
    here = outer.fragments[fragment]
    if mean.residual is not None:
        memory.residual[here.start : here.stop].copy_(mean.residual)
    outer.step(mean.values, config.rules.outer_learning_rate, config.rules.outer_momentum)


def _mean_numbers(gathered: Gathered) -> tuple[float, ...]:
    """The groups' numbers averaged by tokens; without any tokens this group has nothing to take over."""
    total = sum(gathered.weights)
    if total == 0:
        return ()
    pairs = list(zip(gathered.weights, gathered.numbers, strict=True))
    return tuple(sum(weight * numbers[index] for weight, numbers in pairs) / total for index in range(len(pairs[0][1])))
