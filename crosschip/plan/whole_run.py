"""A whole run: every stage planned, dated, lived through with its stops; and the same on other chips."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from datetime import date

from crosschip.errors import CrosschipError, RecipeError
from crosschip.plan.architecture import Architecture
from crosschip.plan.cluster import Cluster
from crosschip.plan.counts import num_parameters
from crosschip.plan.dates import Calendar, Prices, Ramp, Scenario, Schedule, Stage, pause, plan_dates
from crosschip.plan.failures import FailureRates, Recovery, Soak, published_rates, usual_recovery, with_soak
from crosschip.plan.failures.problem import at_least
from crosschip.plan.planning import architecture_of
from crosschip.plan.serving import Load
from crosschip.plan.stages import PlannedStage, StageChoices, plan_stages, settled
from crosschip.recipe import Recipe

__all__ = ["SAVED_BYTES", "Asked", "Switch", "WholeRun", "plan_whole_run", "prices_of"]

SAVED_BYTES = 12.0  # of each parameter in a checkpoint: fp32 weights and two moments


@dataclass(frozen=True)
class Switch:
    """What a switch to other chips takes, and what a later end costs; money in the clusters' currency."""

    days: float = 14.0
    cost: float = 0.0
    delay_per_day: float = 0.0
    portable: bool = True

    def __post_init__(self) -> None:
        at_least("switch_days", self.days, 0.0)
        at_least("switch_cost", self.cost, 0.0)
        at_least("delay_cost_per_day", self.delay_per_day, 0.0)


@dataclass(frozen=True)
class Asked:
    """What a plan is asked for beside a recipe and a cluster."""

    start: date
    by: date | None = None
    choices: StageChoices = field(default_factory=StageChoices)
    serve_on: Cluster | None = None
    load: Load | None = None
    compared: tuple[Cluster, ...] = ()
    switch: Switch = Switch()
    soak: Soak | None = None
    num_trials: int = 1000

    @property
    def other_clusters(self) -> tuple[Cluster, ...]:
        """All besides the one that is planned on; one may come more than once."""
        named = (self.choices.rollouts_on, *self.choices.joined_with, self.serve_on, *self.compared)
        return tuple(each for each in named if each is not None)


@dataclass(frozen=True)
class WholeRun:
    """A run planned on a cluster. `others` is the same recipe on each compared cluster, or why it cannot be there."""

    recipe: Recipe
    cluster: Cluster
    asked: Asked
    architecture: Architecture
    stages: tuple[PlannedStage, ...]
    rates: FailureRates
    schedule: Schedule
    others: dict[str, WholeRun | CrosschipError] = field(default_factory=dict)

    @property
    def clusters(self) -> tuple[Cluster, ...]:
        """Every cluster that trains or answers, its own first; one that does both comes once."""
        choices = self.asked.choices
        answering = () if choices.rollouts_on is None else (choices.rollouts_on,)
        return tuple({each.name: each for each in (self.cluster, *answering, *choices.joined_with)}.values())

    @property
    def main(self) -> PlannedStage:
        """The stage that takes longest."""
        return max(self.stages, key=lambda each: each.work_s)

    def recovery(self, name: str) -> Recovery:
        """How a stage comes back from its stops."""
        found = next(each.stage.recovery for each in self.schedule.stages if each.stage.name == name)
        assert found is not None
        return found


def plan_whole_run(recipe: Recipe, cluster: Cluster, asked: Asked) -> WholeRun:
    """Plan every stage and date it, then do the same on the compared clusters.

    Raises:
        RecipeError: a stage fits nowhere or divides nothing, `by` is not after the start, two clusters that differ have
            one name, or no stage does what is chosen.
        PlanError: the start is over, or the schedule of the cluster cannot be.
    """
    if asked.by is not None and asked.by < asked.start:
        raise RecipeError(f"--by {asked.by} is before the start, {asked.start}", "give a later date")
    _refuse_namesakes(cluster, asked)
    asked = replace(asked, choices=settled(recipe, cluster, asked.choices))
    calendar = Calendar.from_today(asked.start, date.today(), cluster.schedule.windows())
    stages = plan_stages(recipe, cluster, asked.choices)
    architecture = architecture_of(recipe)
    rates = published_rates().with_seen(*(each.observation() for each in cluster.seen))
    if asked.soak is not None:
        rates = with_soak(rates, asked.soak)
    dated = _dated(stages, cluster, asked.choices, rates, num_parameters(architecture))
    restart_s = max(each.recovery.restart_s for each in dated if each.recovery is not None)
    scenario = Scenario(dated, rates, replace(calendar, restart_s=restart_s), num_trials=asked.num_trials)
    others: dict[str, WholeRun | CrosschipError] = {}
    for other in asked.compared:
        others[other.name] = _on(recipe, other, asked)
    return WholeRun(recipe, cluster, asked, architecture, stages, rates, plan_dates(scenario), others)


def _refuse_namesakes(cluster: Cluster, asked: Asked) -> None:
    """Chips, prices and comparisons go by the cluster's name: two that share it would be planned as one."""
    known = {cluster.name: cluster}
    for each in asked.other_clusters:
        if known.setdefault(each.name, each).file != each.file:
            raise RecipeError(f"two clusters that differ are called {each.name!r}", "give each file its own `name`")
    names = [each.name for each in (cluster, *asked.choices.joined_with)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise RecipeError(
            f"{twice[0]} is joined to itself", "each group has a cluster of its own: give the other a file and a `name`"
        )


def _on(recipe: Recipe, other: Cluster, asked: Asked) -> WholeRun | CrosschipError:
    """The same recipe on another cluster alone; where it cannot be, why: an answer, too."""
    alone = replace(
        asked, by=None, compared=(), soak=None, load=None, choices=replace(asked.choices, joined_with=())
    )  # fmt: skip
    try:
        return plan_whole_run(recipe, other, alone)
    except CrosschipError as error:
        return error


def _dated(
    stages: tuple[PlannedStage, ...], cluster: Cluster, choices: StageChoices, rates: FailureRates, parameters: int
) -> tuple[Stage, ...]:
    """The stages with their recovery, the ramp-up on the first and the pauses behind those that they name."""
    label = choices.labels(cluster)[cluster.name]
    names = [each.name for each in stages]
    unknown = [each.after for each in cluster.schedule.pauses if each.after not in names]
    if unknown:
        raise RecipeError(
            f"schedule.pauses: there is no stage {unknown[0]!r}", f"the recipe's stages are {', '.join(names)}"
        )
    found: list[Stage] = []
    for place, each in enumerate(stages):
        ramp: tuple[Ramp, ...] = cluster.schedule.ramps() if place == 0 else ()
        recovery = _recovery(each, cluster, rates, parameters)
        spares = _paid_spares(each, cluster, recovery)
        found.append(Stage(each.name, each.work_s, each.num_chips, recovery, label, ramp, each.beside, spares))
        for rest in cluster.schedule.pauses:
            if rest.after == each.name:
                found.append(pause(_untaken(rest.why, rest.after, {*names, *(one.name for one in found)}), rest.days))
    return tuple(found)


def _untaken(why: str, after: str, taken: Collection[str]) -> str:
    """The name of a pause: why it is, and behind which stage where another stage or pause is called so already."""
    behind = f"{why} after {after}"
    names = itertools.chain((why, behind), (f"{behind} ({number})" for number in itertools.count(2)))
    return next(name for name in names if name not in taken)


def _paid_spares(stage: PlannedStage, cluster: Cluster, recovery: Recovery) -> int:
    """Chips of the spare hosts: all that the cluster's file names, else as many of those wanted as the stage leaves."""
    wanted = recovery.num_spares * recovery.chips_per_host
    if cluster.recovery.num_spares is not None:
        return wanted
    here = stage.num_chips - sum(number for _, number in stage.beside)
    return min(wanted, max(0, cluster.num_chips - here))


def _recovery(stage: PlannedStage, cluster: Cluster, rates: FailureRates, parameters: int) -> Recovery:
    given = cluster.recovery
    saved = SAVED_BYTES * parameters if given.store_gb_s is not None else None
    return usual_recovery(
        rates, stage.num_chips, cluster.hardware.host_size, save_bytes=saved, store_gb_s=given.store_gb_s,
        blocking=given.blocking_save, num_spares=given.num_spares, num_groups=stage.num_groups, **given.given(),
    )  # fmt: skip


def prices_of(run: WholeRun) -> dict[str, Prices]:
    """The prices of every chip that trains, by its label."""
    labels = run.asked.choices.labels(run.cluster)
    return {labels[each.name]: Prices(**each.price.model_dump()) for each in run.clusters}
