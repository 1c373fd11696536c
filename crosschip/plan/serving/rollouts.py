"""How fast chips answer the problems of reinforcement learning: the same roofline as serving, without a promise.

All answers of a batch are there at once, so instances run as full as their cache lets them. Samples of one problem
share its prompt, which an engine with a prefix cache computes once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from crosschip.plan.failures.problem import PlanError
from crosschip.plan.serving.model import ServedModel, ServingChip

__all__ = ["AnswerBatch", "RolloutPlan", "plan_rollouts"]

_INSTANCE_CHIPS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class AnswerBatch:
    """`prompts` problems with `samples` answers each; lengths in tokens, of the mean answer."""

    prompts: float
    samples: int
    prompt_tokens: float
    answer_tokens: float
    most_at_a_time: int  # sequences of one instance, as the recipe bounds them

    @property
    def answers(self) -> float:
        """All of them."""
        return self.prompts * self.samples


@dataclass(frozen=True)
class RolloutPlan:
    """`tokens_per_s` of all instances together, prompts' time included; `batch` sequences an instance at a time."""

    chip: str
    chips_per_instance: int
    num_instances: int
    batch: int
    token_s: float
    tokens_per_s: float

    @property
    def num_chips(self) -> int:
        """Chips of all instances."""
        return self.chips_per_instance * self.num_instances


def plan_rollouts(model: ServedModel, chip: ServingChip, num_chips: int, work: AnswerBatch) -> RolloutPlan:
    """The size of an instance that answers the batch fastest.

    Raises:
        PlanError: the model fits on no instance, or its cache does not hold one answer.
    """
    found = list(_instances(model, chip, num_chips, work))
    if not found:
        raise PlanError(
            f"{model.weight_bytes / 1e9:.3g} GB of weights and a cache of {work.prompt_tokens + work.answer_tokens:g} "
            f"tokens do not fit on {min(num_chips, _INSTANCE_CHIPS[-1])} x {chip.name} "
            f"({chip.usable_memory:.0%} of {chip.memory_gb:g} GB each)",
            "make the rollouts on more chips, or on others (--rollout-cluster)",
        )
    return max(found, key=lambda each: each.tokens_per_s)


def _instances(model: ServedModel, chip: ServingChip, num_chips: int, work: AnswerBatch) -> Iterator[RolloutPlan]:
    sequence_bytes = (work.prompt_tokens + work.answer_tokens) * model.cache_bytes_per_token
    context = work.prompt_tokens + work.answer_tokens / 2
    for size in _INSTANCE_CHIPS:
        instances = min(num_chips // size, math.ceil(work.answers))
        room = int(chip.cache_bytes(model, size) / sequence_bytes)
        if instances < 1 or room < 1:
            continue
        batch = min(room, work.most_at_a_time, math.ceil(work.answers / instances))
        num_bytes = model.bytes_read(batch) + batch * context * model.cache_bytes_per_token
        token_s = chip.pass_s(model.flops(batch, context), num_bytes, size)
        prompts = work.prompts / instances * work.prompt_tokens
        prefill_s = chip.pass_s(model.prompt_flops(prompts, work.prompt_tokens / 2), model.bytes_read(prompts), size)
        written = work.answers * work.answer_tokens
        decode_s = written / instances / batch * token_s
        yield RolloutPlan(chip.name, size, instances, batch, token_s, written / (decode_s + prefill_s))
