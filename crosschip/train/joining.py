"""A stage among replica groups: joining them, and the step whose gradients they average."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from crosschip.chips import Chip, product_rate
from crosschip.recipe import GroupSettings, Recipe, StageSettings
from crosschip.thin_links import Link, choose, link_from
from crosschip.train.flops import train_flops_per_token
from crosschip.train.group.world import World
from crosschip.train.guard.replicas import Disagreement, find_disagreement
from crosschip.train.identity import digest
from crosschip.train.kept_estimate import kept_step_s
from crosschip.train.outer.alone import AloneGroup
from crosschip.train.outer.groups import Groups
from crosschip.train.outer.messages import Member
from crosschip.train.step import StepSums

if TYPE_CHECKING:
    from crosschip.model import Transformer
    from crosschip.train.outer.training_state import Position

__all__ = [
    "GroupReport",
    "GroupReports",
    "arithmetic_of",
    "average_step",
    "estimate_step_s",
    "group_name",
    "join_groups",
]

_REPORTED = 6  # numbers in which a group reports

_NOT_CHOSEN_BY = {"min_groups", "own_share", "outer_learning_rate", "outer_momentum", "on_drop", "lighthouse"}

_EXPECTED_SHARE = 0.3  # of the rate of matrix products that a whole step reaches, for a first idea of its time


def join_groups(
    recipe: Recipe,
    settings: StageSettings,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    position: Position,
    directory: Path,
    shared: Path,
    group: int | None,
    world: World,
    step_s: Callable[[], float],
    say: Callable[[str], None],
    still_waiting: Callable[[], None],
) -> Groups:
    """Meet the other groups; one that trains alone meets nobody. `directory` is the stage's, `shared` the run directory
    of all groups of this machine: what `step_s` gives is kept there, and counts at each start.

    `still_waiting` is called now and then while this group honestly waits for others, now or later.

    Raises:
        GroupsError: the groups do not fit together, or nobody answers.
        RecipeError: `[links]` makes no sense.
        RunDirectoryError: the time of a step that was kept is damaged.
    """
    planned = recipe.groups_in(directory.name)
    if group is None or planned.num_groups == 1:
        return AloneGroup()
    from crosschip.train.outer.opening import open_groups
    from crosschip.train.outer.training_state import TrainingState

    assert planned.lighthouse is not None, "who starts the groups says where they meet"
    state = TrainingState(model, optimizer, position)
    link = link_from(recipe.links)
    num_elements = sum(parameter.numel() for parameter in model.parameters())
    seconds = 1.0  # nothing is predicted without a link
    if link is not None:
        measured_for = _chosen_by(planned, link, num_elements, settings, world.size)
        seconds = world.from_rank_zero(lambda: kept_step_s(shared, directory.name, measured_for, step_s))
    choice = choose(planned, link, num_elements, seconds, world.size)
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
        still_waiting,
    )
    groups.resume(directory, position.step)
    return groups


def _chosen_by(
    planned: GroupSettings, link: Link, num_elements: int, settings: StageSettings, num_ranks: int
) -> dict[str, Any]:
    """All that the choice of how to train together depends on, but for the time of a step."""
    return {
        "groups": planned.model_dump(mode="json", exclude=_NOT_CHOSEN_BY),
        "link": {"bandwidth_bytes_s": link.bandwidth_bytes_s, "latency_s": link.latency_s},
        "step": {"batch_size": settings.batch_size, "seq_len": settings.seq_len},
        "model": {"num_elements": num_elements, "num_ranks": num_ranks},
    }


def estimate_step_s(
    model: Transformer, settings: StageSettings, chip: Chip, dtype: torch.dtype, num_ranks: int, num_groups: int
) -> float:
    """About how long a group's ranks compute on their share of a step, in seconds.

    A power of two: groups on like chips must come to the same choice.
    """
    num_tokens = settings.seq_len * settings.batch_size / num_groups
    flops = train_flops_per_token(model.config, settings.seq_len) * num_tokens
    seconds = flops / (product_rate(chip, dtype) * num_ranks * _EXPECTED_SHARE)
    return 2.0 ** round(math.log2(seconds))


def group_name(number: int) -> str:
    """What a group is called in reports and events."""
    return f"group {number}"


@dataclass(frozen=True)
class GroupReport:
    """What a group tells the others in each step: seconds of computing and those of them without a core, seconds of all
    since the exchange before, the checksum of the weights it has computed with, and a number for what must be the same
    for equal weights to stay equal: chip, software, threads.
    """

    compute_s: float
    waited_s: float
    busy_s: float
    checksum: int
    arithmetic: int


@dataclass(frozen=True)
class GroupReports:
    """The reports of all groups that take part, by name."""

    reports: dict[str, GroupReport]

    def compute_s(self) -> dict[str, float]:
        """Seconds of computing."""
        return {name: report.compute_s for name, report in self.reports.items()}

    def waited_s(self) -> dict[str, float]:
        """Seconds of these in which a group waited for a core."""
        return {name: report.waited_s for name, report in self.reports.items()}

    def busy_s(self) -> dict[str, float]:
        """Seconds since the exchange before."""
        return {name: report.busy_s for name, report in self.reports.items()}

    def compute_alike(self) -> bool:
        """Whether equal weights stay equal: on the same chips, with the same software, dtype and threads."""
        return len({report.arithmetic for report in self.reports.values()}) <= 1

    def disagreement(self) -> Disagreement | None:
        """Whose weights differ, among groups that compute alike; chips that round otherwise drift apart honestly."""
        if not self.compute_alike():
            return None
        return find_disagreement({name: report.checksum for name, report in self.reports.items()})


def arithmetic_of(chip: Chip, dtype: torch.dtype, world: World) -> int:
    """A number of 32 bits for what decides about the last bits of an update."""
    what = [chip.device.type, chip.vendor, chip.model_name, str(dtype), torch.__version__]
    return int(digest([*what, torch.get_num_threads(), world.size])[:8], 16)


def average_step(groups: Groups, sums: StepSums, group: int, own: GroupReport) -> tuple[StepSums, GroupReports]:
    """Average the gradients over the groups; returns the sums over all of them, and each group's report.

    Raises:
        StepNotCommitted: see `Groups.average_gradients`.
    """
    numbers = [*sums.numbers.tolist(), float(sums.num_positions)]
    told = [0.0] * (
        _REPORTED * groups.place.num_groups
    )  # each group fills its own places, and the sum is a list of all
    mine = [1.0, own.compute_s, own.waited_s, own.busy_s, float(own.checksum), float(own.arithmetic)]
    told[_REPORTED * group : _REPORTED * (group + 1)] = mine
    done = groups.average_gradients(sums.num_trained_tokens, (*numbers, *told))
    found = done.numbers[len(numbers) :]
    reports = {}
    for number in range(groups.place.num_groups):
        is_there, compute_s, waited_s, busy_s, checksum, arithmetic = found[_REPORTED * number :][:_REPORTED]
        if is_there:
            reports[group_name(number)] = GroupReport(compute_s, waited_s, busy_s, int(checksum), int(arithmetic))
    averaged = torch.tensor(done.numbers[: len(numbers) - 1], dtype=sums.numbers.dtype, device=sums.numbers.device)
    return StepSums(done.num_tokens, int(done.numbers[len(numbers) - 1]), averaged), GroupReports(reports)
