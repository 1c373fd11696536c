"""All stages of a recipe, each on the chips that it gets."""

from __future__ import annotations

from dataclasses import dataclass, replace

from crosschip.errors import RecipeError
from crosschip.plan.cluster import Cluster
from crosschip.plan.failures.problem import positive
from crosschip.plan.planning import plan_later_stage, plan_run
from crosschip.plan.stages.joining import join_stage
from crosschip.plan.stages.planned import PlannedStage
from crosschip.plan.stages.reinforcing import reinforce_stage
from crosschip.plan.step import Plan
from crosschip.recipe import Recipe, RlSettings, StageSettings

__all__ = ["StageChoices", "plan_stages", "settled"]


@dataclass(frozen=True)
class StageChoices:
    """What is done on other clusters: rollouts on one, groups on others. `answer_tokens` is the mean of a rollout."""

    rollouts_on: Cluster | None = None
    joined_with: tuple[Cluster, ...] = ()
    answer_tokens: float | None = None

    def __post_init__(self) -> None:
        if self.answer_tokens is not None:
            positive("--rollout-tokens", self.answer_tokens)

    def labels(self, cluster: Cluster) -> dict[str, str]:
        """What each cluster's chip is called, by the cluster's name: its kind, or with the name where two share it."""
        all_of_them = [cluster, *([self.rollouts_on] if self.rollouts_on else []), *self.joined_with]
        kinds = {each.name: each.hardware.kind for each in all_of_them}
        return {
            name: kind if list(kinds.values()).count(kind) == 1 else f"{kind} of {name}" for name, kind in kinds.items()
        }


def settled(recipe: Recipe, cluster: Cluster, choices: StageChoices) -> StageChoices:
    """The choices for a run on `cluster`: where it is the one that answers too, its chips do so in turns.

    Raises:
        RecipeError: no stage of the recipe does what is chosen.
    """
    reinforced = [isinstance(settings, RlSettings) for _, settings in recipe.stages]
    if not any(reinforced) and (choices.rollouts_on is not None or choices.answer_tokens is not None):
        raise RecipeError(
            "no stage of the recipe makes rollouts",
            "leave --rollout-cluster and --rollout-tokens out, or give a recipe with [rl]",
        )
    if all(reinforced) and choices.joined_with:
        raise RecipeError(
            "no stage of the recipe trains in groups: all of them are reinforcement learning",
            "leave --join-cluster out, or give a recipe with [train] or [sft]",
        )
    if choices.rollouts_on is not None and choices.rollouts_on.name == cluster.name:
        return replace(choices, rollouts_on=None)
    return choices


def plan_stages(recipe: Recipe, cluster: Cluster, choices: StageChoices) -> tuple[PlannedStage, ...]:
    """Every stage of the recipe on the cluster, in the recipe's order.

    Raises:
        RecipeError: a stage fits nowhere or divides nothing; says what to change.
        PlanError: the model does not fit on the chips that make the rollouts.
    """
    return tuple(
        _planned(recipe, cluster, choices, place, name, settings)
        for place, (name, settings) in enumerate(recipe.stages)
    )


def _planned(
    recipe: Recipe, cluster: Cluster, choices: StageChoices, place: int, name: str, settings: StageSettings
) -> PlannedStage:
    labels = choices.labels(cluster)
    groups = recipe.groups_in(name)
    if choices.joined_with and groups is recipe.groups:
        clusters = [cluster, *choices.joined_with]
        return join_stage(recipe, name, settings, clusters, [labels[each.name] for each in clusters])
    if groups is not recipe.groups and not choices.joined_with:  # group 0 has its share of the chips
        cluster = replace(cluster, num_chips=cluster.num_chips // recipe.groups.num_groups)
    recipe = recipe.model_copy(update={"groups": groups})
    notes: list[str] = []
    if place == 0:
        plan: Plan = plan_run(recipe, cluster, name)
    else:
        plan, notes = plan_later_stage(recipe, cluster, name, settings)
    if not isinstance(settings, RlSettings):
        work_s = plan.steps * plan.best.step_s
        return PlannedStage(name, plan, work_s, plan.num_chips, recipe.groups.num_groups, notes=tuple(notes))
    apart = choices.rollouts_on
    others = labels[apart.name] if apart is not None else ""
    found = reinforce_stage(
        recipe, plan, settings, (cluster, apart), (labels[cluster.name], others), choices.answer_tokens
    )
    return replace(found, notes=(*notes, *found.notes))
