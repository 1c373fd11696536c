"""A stage whose groups train on several clusters, joined by the recipe's thin link."""

from __future__ import annotations

from collections.abc import Sequence

from crosschip.errors import RecipeError
from crosschip.plan.cluster import Cluster
from crosschip.plan.counts import num_parameters
from crosschip.plan.dates import Group, Joined, join_groups
from crosschip.plan.planning import architecture_of, plan_later_stage, thin_link_of
from crosschip.plan.stages.planned import JoinedStage, PlannedStage
from crosschip.plan.step import Plan
from crosschip.recipe import GroupSettings, Recipe, StageSettings

__all__ = ["join_stage"]


def join_stage(
    recipe: Recipe, name: str, stage: StageSettings, clusters: Sequence[Cluster], labels: Sequence[str]
) -> PlannedStage:
    """One group on each cluster, with an equal share of the batch, as `crosschip train` shares it.

    Raises:
        RecipeError: the recipe has another number of groups, or no link between them.
    """
    if recipe.groups.num_groups != len(clusters):
        raise RecipeError(
            f"groups.num_groups = {recipe.groups.num_groups}, and {len(clusters)} clusters are joined",
            f"set groups.num_groups = {len(clusters)} and links.bandwidth_mbit_s: each cluster is one group",
        )
    share = stage.model_copy(update={"batch_size": stage.batch_size // len(clusters)})
    alone = recipe.model_copy(update={"groups": GroupSettings()})
    found = [plan_later_stage(alone, cluster, name, share) for cluster in clusters]
    plans = [plan for plan, _ in found]
    groups = [Group(label, plan.num_chips, plan.best.tokens_per_s) for label, plan in zip(labels, plans, strict=True)]
    tokens = float(stage.batch_size * stage.seq_len)
    num_elements = num_parameters(architecture_of(recipe))
    link, reason = thin_link_of(
        recipe, num_elements, max(plan.best.step_s for plan in plans), min(plan.num_chips for plan in plans)
    )
    equal, by_speed = (
        join_groups(
            groups,
            tokens_between=tokens * link.steps_between,
            exchange_s=link.exchange_s(num_elements, len(groups)),
            overlap=link.overlap_steps / link.steps_between,
            divided_by_speed=fair,
        )
        for fair in (False, True)
    )
    return PlannedStage(
        name,
        plans[0],
        stage.steps * tokens / equal.tokens_per_s,
        sum(plan.num_chips for plan in plans),
        num_groups=len(clusters),
        beside=tuple((label, plan.num_chips) for label, plan in list(zip(labels, plans, strict=True))[1:]),
        joined=JoinedStage(tuple(plans), tuple(labels), equal, by_speed, link.steps_between),
        notes=(*(note for _, notes in found for note in notes), f"{name}: {reason}", *_advice(equal, by_speed, plans)),
    )


def _advice(equal: Joined, by_speed: Joined, plans: Sequence[Plan]) -> tuple[str, ...]:
    if by_speed.tokens_per_s < 1.05 * equal.tokens_per_s:
        return ()
    shares = ", ".join(
        f"{share:.0%} to {plan.cluster_name}" for share, plan in zip(by_speed.batch_shares, plans, strict=True)
    )
    return (
        f"each group takes an equal share of a step, so the slowest sets the pace; divided by speed ({shares}) they "
        f"would train {by_speed.tokens_per_s / equal.tokens_per_s:.2f} times as fast",
    )
