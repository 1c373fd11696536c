"""A stage whose groups train on several clusters, joined by the recipe's thin link."""

from __future__ import annotations

from collections.abc import Sequence

from crosschip.errors import RecipeError
from crosschip.plan.cluster import Cluster
from crosschip.plan.counts import num_parameters
from crosschip.plan.dates import Group, Joined, join_groups
from crosschip.plan.job import ThinLink
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
    link = thin_link_of(recipe)
    assert link is not None
    share = stage.model_copy(update={"batch_size": stage.batch_size // len(clusters)})
    alone = recipe.model_copy(update={"groups": GroupSettings()})
    found = [plan_later_stage(alone, cluster, name, share) for cluster in clusters]
    plans = [plan for plan, _ in found]
    groups = [Group(label, plan.num_chips, plan.best.tokens_per_s) for label, plan in zip(labels, plans, strict=True)]
    tokens = float(stage.batch_size * stage.seq_len)
    num_bytes = num_parameters(architecture_of(recipe)) * link.bytes_per_parameter
    equal, by_speed = (_joined(groups, link, tokens, num_bytes, fair) for fair in (False, True))
    return PlannedStage(
        name,
        plans[0],
        stage.steps * tokens / equal.tokens_per_s,
        sum(plan.num_chips for plan in plans),
        num_groups=len(clusters),
        beside=tuple((label, plan.num_chips) for label, plan in list(zip(labels, plans, strict=True))[1:]),
        joined=JoinedStage(tuple(plans), tuple(labels), equal, by_speed, link.sync_every),
        notes=tuple(note for _, notes in found for note in notes) + _advice(equal, by_speed, plans),
    )


def _joined(groups: Sequence[Group], link: ThinLink, tokens: float, num_bytes: float, by_speed: bool) -> Joined:
    """As many of an exchange's seconds are hidden as `overlap_steps` inner steps take."""

    def at(overlap: float) -> Joined:
        return join_groups(
            groups, tokens_between=tokens * link.sync_every, exchange_bytes=num_bytes,
            link_gbit_s=link.bandwidth_bytes_s * 8 / 1e9, latency_s=link.latency_s, overlap=overlap,
            divided_by_speed=by_speed,
        )  # fmt: skip

    bare = at(0.0)
    hidden_s = bare.inner_s * link.overlap_steps / link.sync_every
    return at(min(1.0, hidden_s / bare.exchange_s) if bare.exchange_s > 0 else 0.0)


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
