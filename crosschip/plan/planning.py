"""`plan`: a recipe on a cluster: the best layout, its step, and why the others lose."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from crosschip.errors import RecipeError
from crosschip.plan.architecture import Architecture
from crosschip.plan.cluster import Cluster
from crosschip.plan.counts import active_parameters, num_parameters, train_flops_per_token
from crosschip.plan.job import Job, ThinLink
from crosschip.plan.reading_architectures import architecture_from_directory, architecture_from_settings
from crosschip.plan.search import Found, find_layouts
from crosschip.plan.step import Plan
from crosschip.recipe import Recipe, StageSettings

__all__ = ["architecture_of", "job_of", "plan_run"]

_HOST_BYTES = 4.0  # fp32


def architecture_of(recipe: Recipe) -> Architecture:
    """The recipe's model: from its `[model]` table, or from the directory that it starts from."""
    if recipe.model.directory is not None:
        return architecture_from_directory(Path(recipe.model.directory))
    return architecture_from_settings(recipe.model, recipe.tokenizer.vocab_size, recipe.name)


def _thin_link(recipe: Recipe) -> ThinLink | None:
    if recipe.groups.num_groups == 1:
        return None
    mbit_s = recipe.links.bandwidth_mbit_s
    if mbit_s is None:
        raise RecipeError(
            f"groups.num_groups = {recipe.groups.num_groups}, and links.bandwidth_mbit_s is not given",
            "give [links] bandwidth_mbit_s and latency_ms: how long groups wait for each other hangs on them",
        )
    size = {"none": 4.0, "auto": 1.0, "int8": 1.0, "int4": 0.5}[recipe.groups.compression]
    every = 1 if recipe.groups.mode == "every-step" else recipe.groups.sync_every or 100
    latency_s = (recipe.links.latency_ms or 0.0) / 1000
    return ThinLink(mbit_s * 1e6 / 8, latency_s, every, size, recipe.groups.overlap_steps or 0)


def job_of(recipe: Recipe, stage: StageSettings, cluster: Cluster) -> Job:
    """One step of a stage as crosschip trains: fp32 weights and states, bf16 products where the chip has them."""
    return Job(
        architecture_of(recipe),
        stage.seq_len,
        stage.batch_size,
        weight_bytes=_HOST_BYTES,
        gradient_bytes=_HOST_BYTES,
        state_bytes=8.0,
        activation_bytes=4.0 if stage.dtype == "float32" else 2.0,
        fixed_bytes=cluster.fixed_bytes,
        thin_link=_thin_link(recipe),
    )


def plan_run(
    recipe: Recipe, cluster: Cluster, stage_name: str = "train", fixed: Mapping[str, Any] | None = None
) -> Plan:
    """Search the layouts of one stage of a recipe on a cluster.

    Raises:
        RecipeError: the stage is not there, nothing fits, or nothing divides; says what to change.
    """
    stage: StageSettings | None = getattr(recipe, stage_name)
    if stage is None:
        raise RecipeError(f"the recipe has no [{stage_name}] stage to plan", "add it, or plan the other one")
    job = job_of(recipe, stage, cluster)
    given = {"groups": recipe.groups.num_groups, **(fixed or {})}
    if recipe.parallel.expert_parallel > 1:
        given.setdefault("expert", recipe.parallel.expert_parallel)
    notes = [] if not job.architecture.assumed else [job.architecture.assumed]
    found = _search(job, cluster, given, stage_name, stage)
    chosen = found.best[0].layout
    if chosen.tensor * chosen.pipeline * chosen.context > 1:
        notes.append("`crosschip train` shares a model by data and experts only: this layout needs another trainer")
    architecture = job.architecture
    return Plan(
        model_name=architecture.name,
        cluster_name=cluster.name,
        stage_name={"train": "pre-training", "sft": "fine-tuning"}[stage_name],
        num_parameters=num_parameters(architecture),
        num_active_parameters=active_parameters(architecture, with_mtp=True),
        flops_per_token=train_flops_per_token(architecture, stage.seq_len),
        tokens=float(stage.steps * job.tokens_per_step),
        steps=stage.steps,
        seq_len=stage.seq_len,
        batch_size=stage.batch_size,
        best=found.best[0],
        others=found.best[1:],
        losers=found.losers,
        notes=tuple(notes),
        num_searched=found.num_searched,
    )


def _search(job: Job, cluster: Cluster, fixed: dict[str, Any], stage_name: str, stage: StageSettings) -> Found:
    try:
        return find_layouts(job, cluster.num_chips, cluster.hardware, fixed)
    except RecipeError as error:
        chips = cluster.num_chips
        bigger = replace(job, batch_size=math.ceil(stage.batch_size / chips) * chips)
        if bigger.batch_size == job.batch_size:
            raise
        try:
            find_layouts(bigger, chips, cluster.hardware, fixed, keep=1)
        except RecipeError:
            raise error from None
        raise RecipeError(
            f"{stage_name}.batch_size = {stage.batch_size} cannot be shared by {chips} chips: {error.problem}",
            f"set {stage_name}.batch_size = {bigger.batch_size}, or plan on fewer chips",
        ) from None
