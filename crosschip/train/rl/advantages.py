"""From rewards to advantages: how much better an answer is than the others to the same problem. No torch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from crosschip.recipe import RlSettings
from crosschip.train.rl.sample import Group, Sample

__all__ = ["advantages", "counts", "has_signal", "is_left_out", "shaped_reward"]

_LEAST_DEVIATION = 1e-6  # rewards that differ by less are equal


def is_left_out(sample: Sample, settings: RlSettings) -> bool:
    """Whether an answer is not trained: its checker failed, it is empty, or it is too long and the recipe says so."""
    if sample.reward is None or not sample.token_ids:
        return True
    return settings.over_long == "leave out" and not sample.finished


def shaped_reward(sample: Sample, settings: RlSettings) -> float:
    """The reward less the penalty for length, which grows from 0 to 1 over the buffer (arXiv 2503.14476, eq. 13)."""
    assert sample.reward is not None
    buffer = settings.over_long_buffer
    if not buffer:
        return sample.reward
    beyond = len(sample.token_ids) - (settings.max_new_tokens - buffer)
    penalty = 1.0 if not sample.finished else min(1.0, max(0.0, beyond / buffer))
    return sample.reward - penalty


def counts(group: Group, settings: RlSettings) -> npt.NDArray[np.bool_]:
    """Which answers of a group are trained, [samples]."""
    return np.array([not is_left_out(sample, settings) for sample in group.samples])


def advantages(group: Group, settings: RlSettings) -> npt.NDArray[np.float32]:
    """The advantage of each answer, [samples]; 0 for those that are left out, who also count in no mean.

    arXiv 2402.03300, section 4.1.2; without the division as in arXiv 2503.20783. Those below 0 times `negative_weight`:
    where rewards are 0 and 1 this is a baseline below the mean, which leaves the expected gradient on the policy its
    direction, and holds off the policy where the mean does not (arXiv 2506.20520).
    """
    used = counts(group, settings)
    found = np.zeros(len(group.samples), dtype=np.float32)
    if used.sum() < 2:
        return found
    pairs = zip(group.samples, used, strict=True)
    rewards = np.array([shaped_reward(sample, settings) for sample, counted in pairs if counted])
    centred, deviation = rewards - rewards.mean(), rewards.std()
    if deviation < _LEAST_DEVIATION:
        return found
    scaled = centred / deviation if settings.divide_by_deviation else centred
    found[used] = np.where(scaled < 0, settings.negative_weight * scaled, scaled)
    return found


def has_signal(group: Group, settings: RlSettings) -> bool:
    """Whether the group teaches anything: some advantage is not 0."""
    return bool(advantages(group, settings).any())
