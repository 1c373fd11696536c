"""Which layouts over ranks a recipe can have. No torch: whoever starts the ranks says no before they start."""

from __future__ import annotations

from typing import Protocol

from crosschip.errors import RecipeError
from crosschip.recipe import ParallelSettings, Recipe, StageSettings

__all__ = ["Widths", "check_batch_size", "check_experts", "check_layout"]


class Widths(Protocol):
    """What of an architecture decides how it can be cut: `[model]` of a recipe has it, and so has a `ModelConfig`."""

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""

    @property
    def moe_intermediate_size(self) -> int:
        """Inner width of one expert."""

    @property
    def n_routed_experts(self) -> int:
        """Experts to choose from."""


def check_layout(recipe: Recipe, num_ranks: int) -> None:
    """Refuse a number of ranks that cannot train the recipe.

    Raises:
        RecipeError: names the key, and says which values can be.
    """
    for name, stage in recipe.stages:
        check_batch_size("train" if name == "pretrain" else name, stage, num_ranks, recipe.groups_in(name).num_groups)
    if recipe.model.directory is None:  # else the directory tells, where it is read
        check_experts(recipe.parallel, recipe.model, num_ranks)


def check_batch_size(name: str, stage: StageSettings, num_ranks: int, num_groups: int = 1) -> None:
    """Refuse a batch that `num_groups` groups of `num_ranks` cannot cut into equal parts; `name` is the stage's table.

    Raises:
        RecipeError: says which sizes can be.
    """
    parts = num_groups * num_ranks * stage.gradient_accumulation
    if stage.batch_size % parts:
        below = stage.batch_size // parts * parts
        near = f"{below} or {below + parts}" if below else str(parts)
        raise RecipeError(
            f"{name}.batch_size = {stage.batch_size} is not a multiple of {parts} (groups.num_groups = {num_groups} x "
            f"{num_ranks} ranks x {name}.gradient_accumulation = {stage.gradient_accumulation})",
            f"set {name}.batch_size = {near}, or another number of groups, of ranks or of parts",
        )


def check_experts(parallel: ParallelSettings, widths: Widths, num_ranks: int) -> None:
    """Refuse an expert parallelism that cannot be.

    Raises:
        RecipeError: `expert_parallel` does not divide the ranks or the experts, or an expert's matrices cannot be
            shared evenly by the ranks that hold it.
    """
    experts = parallel.expert_parallel
    if num_ranks % experts:
        raise RecipeError(
            f"parallel.expert_parallel = {experts} does not divide the number of ranks, {num_ranks}",
            f"start a multiple of {experts} ranks (--nproc {experts}), or set parallel.expert_parallel = 1",
        )
    if widths.n_routed_experts % experts:
        raise RecipeError(
            f"parallel.expert_parallel = {experts} does not divide model.n_routed_experts = {widths.n_routed_experts}",
            "change one of the two",
        )
    sharers = num_ranks // experts
    for name, width in (("hidden_size", widths.hidden_size), ("moe_intermediate_size", widths.moe_intermediate_size)):
        if experts > 1 and width % sharers:
            raise RecipeError(
                f"model.{name} = {width} is not a multiple of {sharers}, the ranks that share each expert "
                f"({num_ranks} ranks, parallel.expert_parallel = {experts})",
                f"change the number of ranks, or set parallel.expert_parallel = {num_ranks} or 1",
            )
