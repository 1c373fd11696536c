"""A stage among replica groups: joining them, and the step whose gradients they average."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from crosschip.chips import Chip, product_rate
from crosschip.recipe import Recipe, StageSettings
from crosschip.train.flops import train_flops_per_token
from crosschip.train.group.world import World
from crosschip.train.identity import digest
from crosschip.train.outer.alone import AloneGroup
from crosschip.train.outer.choice import choose
from crosschip.train.outer.groups import Groups
from crosschip.train.outer.links_report import link_from
from crosschip.train.outer.messages import Member
from crosschip.train.step import StepSums

if TYPE_CHECKING:
    from crosschip.model import Transformer
    from crosschip.train.outer.training_state import Position

__all__ = ["average_step", "estimate_step_s", "join_groups"]

_EXPECTED_SHARE = 0.3  # of the rate of matrix products that a whole step reaches, for a first idea of its time


def join_groups(
    recipe: Recipe,
    settings: StageSettings,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    position: Position,
    directory: Path,
    group: int | None,
    world: World,
    step_s: Callable[[], float],
    say: Callable[[str], None],
) -> Groups:
    """Meet the other groups; one that trains alone meets nobody. `directory` is the stage's.

    Raises:
        GroupsError: the groups do not fit together, or nobody answers.
        RecipeError: `[links]` makes no sense.
    """
    planned = recipe.groups
    if group is None or planned.num_groups == 1:
        return AloneGroup()
    from crosschip.train.outer.opening import open_groups
    from crosschip.train.outer.training_state import TrainingState

    assert planned.lighthouse is not None, "who starts the groups says where they meet"
    state = TrainingState(model, optimizer, position)
    link = link_from(recipe.links)
    needs_time = link is not None and (planned.mode == "auto" or planned.sync_every is None)
    seconds = world.from_rank_zero(step_s) if needs_time else 1.0
    num_elements = sum(parameter.numel() for parameter in model.parameters())
    choice = choose(planned, link, num_elements, seconds)
    say(choice.reason)
    groups = open_groups(
        planned,
        choice,
        Member(group, planned.num_groups, planned.min_groups, planned.lighthouse, world.rank, world.size),
        state,
        settings.batch_size,
        directory / f"sidecar-{world.rank}.log",
        link,
        digest([directory.name, recipe.seed, settings.model_dump(mode="json")]),
        None if world.size == 1 else lambda text: world.from_rank_zero(lambda: text or ""),
    )
    groups.resume(directory, position.step)
    return groups


def estimate_step_s(model: Transformer, settings: StageSettings, chip: Chip, dtype: torch.dtype, world: World) -> float:
    """About how long a step takes, in seconds, as a power of two: groups on like chips must come to the same choice."""
    flops = train_flops_per_token(model.config, settings.seq_len) * settings.seq_len * settings.batch_size
    seconds = flops / (product_rate(chip, dtype) * world.size * _EXPECTED_SHARE)
    return 2.0 ** round(math.log2(seconds))


def average_step(groups: Groups, sums: StepSums, group: int, compute_s: float) -> tuple[StepSums, dict[str, float]]:
    """Average the gradients over the groups; returns the sums over all of them, and each group's seconds of computing.

    Raises:
        StepNotCommitted: see `Groups.average_gradients`.
    """
    times = [0.0] * groups.place.num_groups
    times[group] = compute_s
    own = sums.numbers.tolist()
    done = groups.average_gradients(sums.num_trained_tokens, (*own, float(sums.num_positions), *times))
    numbers = torch.tensor(done.numbers[: len(own)], dtype=sums.numbers.dtype, device=sums.numbers.device)
    found = done.numbers[len(own) + 1 :]
    all_sums = StepSums(done.num_tokens, int(done.numbers[len(own)]), numbers)
    return all_sums, {f"group {number}": seconds for number, seconds in enumerate(found) if seconds > 0.0}
