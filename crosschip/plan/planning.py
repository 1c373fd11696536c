"""`plan`: a recipe on a cluster: the best layout, its step, and why the others lose."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from crosschip.errors import RecipeError
from crosschip.plan.architecture import Architecture
from crosschip.plan.cluster import Cluster
from crosschip.plan.counts import active_parameters, num_parameters, train_flops_per_token
from crosschip.plan.job import Job, ThinLink
from crosschip.plan.reading_architectures import architecture_from_directory, architecture_from_settings
from crosschip.plan.search import Found, find_layouts
from crosschip.plan.step import Layout, Plan
from crosschip.recipe import Recipe, StageSettings
from crosschip.thin_links import BYTES_PER_ELEMENT, COMPUTING_S_PER_ELEMENT, choose, link_from

__all__ = [
    "CAST_BYTES",
    "EAGER_KEPT",
    "EAGER_STREAM",
    "STATE_BYTES",
    "TRAINED_BYTES",
    "architecture_of",
    "plan_later_stage",
    "plan_run",
    "thin_link_of",
]

TRAINED_BYTES = 4.0  # of a weight and of a gradient: fp32
STATE_BYTES = 8.0  # two moments in fp32
CAST_BYTES = 2.0  # of a weight cast to bf16, which autograd keeps until the layer's backward pass
# `crosschip train` is eager: each pass of an element-wise formula is one of its own, many in fp32. Counted by tracing a
# step of recipes/first.toml and gsm8k.toml: 5.0 and 4.8 times the bytes that the planner counts for fused operators,
# and 1.26 and 1.18 times the activations kept (docs/log.md).
EAGER_STREAM, EAGER_KEPT = 4.9, 1.22
_VOCAB_MULTIPLE = 64  # training rounds the embedding's rows up to this
_MOST_NUMBERS = 12  # of chips that are tried for a stage that cannot use all
_OTHER_TRAINER = "`crosschip train` shares a model by data and experts only: this layout needs another trainer"
_RECOMPUTING_TRAINER = "`crosschip train` recomputes no activations: this layout needs another trainer"
_ALL_WEIGHTS = "adapters (lora_rank) are not counted: planned is the training of all weights"
_FP32 = "products in float32 are counted at the rate of bf16: fp32 is slower, by a factor that is not known here"


def architecture_of(recipe: Recipe) -> Architecture:
    """The recipe's model: from its `[model]` table, or from the directory that it starts from."""
    if recipe.model.directory is not None:
        return architecture_from_directory(Path(recipe.model.directory))
    rows = math.ceil(recipe.tokenizer.vocab_size / _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
    return architecture_from_settings(recipe.model, rows, recipe.name)


def thin_link_of(recipe: Recipe, num_elements: int, step_s: float, num_ranks: int) -> tuple[ThinLink, str]:
    """What joins the recipe's groups, used as `crosschip train` chooses to where a step takes `step_s`; and the reason.

    `num_ranks` are the chips of a group, which share its `num_elements` parameters.

    Raises:
        RecipeError: there is no bandwidth between the groups.
        RunDirectoryError: links.report is missing or no JSON.
    """
    link = link_from(recipe.links)
    if link is None:
        raise RecipeError(
            f"groups.num_groups = {recipe.groups.num_groups}, and nothing is known of the link between them",
            "give [links] bandwidth_mbit_s and latency_ms, or report: groups wait for each other as long as it takes",
        )
    choice = choose(recipe.groups, link, num_elements, step_s, num_ranks)
    return ThinLink(
        link.bandwidth_bytes_s,
        link.latency_s,
        choice.sync_every,
        BYTES_PER_ELEMENT[choice.compression],
        choice.overlap_steps,
        choice.fragments,
        averages_gradients=choice.mode == "every-step",
        computing_s_per_parameter=0.0 if choice.mode == "every-step" else COMPUTING_S_PER_ELEMENT / num_ranks,
    ), choice.reason


def _joined(recipe: Recipe, job: Job, num_chips: int, find: Callable[[Job], Found]) -> tuple[Job, Found, str | None]:
    """The layouts with the link between the groups, where there are several: what they send hangs on a step's time."""
    found = find(job)
    if recipe.groups.num_groups == 1:
        return job, found, None
    num_elements, num_ranks = num_parameters(job.architecture), max(1, num_chips // recipe.groups.num_groups)
    link, reason = thin_link_of(recipe, num_elements, found.best[0].step_s, num_ranks)
    linked = replace(job, thin_link=link)
    return linked, find(linked), reason


def job_of(recipe: Recipe, stage: StageSettings, cluster: Cluster) -> Job:
    """One step of a stage as crosschip trains: fp32 weights and states, bf16 products where the chip has them."""
    return Job(
        architecture_of(recipe),
        stage.seq_len,
        stage.batch_size,
        weight_bytes=TRAINED_BYTES,
        gradient_bytes=TRAINED_BYTES,
        state_bytes=STATE_BYTES,
        cast_bytes=0.0 if stage.dtype == "float32" else CAST_BYTES,
        activation_bytes=4.0 if stage.dtype == "float32" else 2.0,
        stream_factor=EAGER_STREAM,
        kept_factor=EAGER_KEPT * cluster.allocator_factor,
        fixed_bytes=cluster.fixed_bytes,
    )


def stage_named(recipe: Recipe, name: str | None) -> tuple[str, StageSettings]:
    """A stage by the name of its directory; the first one without a name.

    Raises:
        RecipeError: the recipe has no such stage.
    """
    for found, settings in recipe.stages:
        if name is None or found == name:
            return found, settings
    names = ", ".join(found for found, _ in recipe.stages)
    raise RecipeError(f"the recipe has no stage {name!r} to plan", f"its stages are {names}")


def plan_run(
    recipe: Recipe, cluster: Cluster, stage_name: str | None = None, fixed: Mapping[str, Any] | None = None
) -> Plan:
    """Search the layouts of one stage of a recipe on a cluster, on all of its chips.

    Raises:
        RecipeError: the stage is not there, nothing fits, or nothing divides; says what to change.
    """
    name, stage = stage_named(recipe, stage_name)
    given = _given(recipe, fixed)
    key = "train" if name == "pretrain" else name
    whole = job_of(recipe, stage, cluster)
    job, found, reason = _joined(recipe, whole, cluster.num_chips, lambda job: _search(job, cluster, given, key, stage))
    return _plan(name, stage, job, cluster, found, cluster.num_chips, reason)


def plan_later_stage(recipe: Recipe, cluster: Cluster, name: str, stage: StageSettings) -> tuple[Plan, list[str]]:
    """As `plan_run`, on as many chips as its batch can be shared by, with notes: later stages are often too small.

    Raises:
        RecipeError: no number of chips will do.
    """
    alone, given = job_of(recipe, stage, cluster), _given(recipe, None)
    first: RecipeError | None = None
    for num_chips in _numbers_of_chips(cluster, stage.batch_size):
        try:
            find = partial(find_layouts, num_chips=num_chips, hardware=cluster.hardware, fixed=given)
            job, found, reason = _joined(recipe, alone, num_chips, find)
        except RecipeError as error:
            first = first or error
            continue
        left = cluster.num_chips - num_chips
        notes = [f"{name}: {stage.batch_size} sequences use {num_chips:,} chips; {left:,} have nothing to do meanwhile"]
        return _plan(name, stage, job, cluster, found, num_chips, reason), notes if left else []
    assert first is not None
    raise first


def _numbers_of_chips(cluster: Cluster, batch_size: int) -> list[int]:
    """All chips first, then fewer that can share a batch, by data and by tensor parallelism; the largest first."""
    shared = {data * tensor for data in range(1, batch_size + 1) if batch_size % data == 0 for tensor in (1, 2, 4, 8)}
    fewer = sorted((each for each in shared if each < cluster.num_chips), reverse=True)
    return [cluster.num_chips, *fewer[:_MOST_NUMBERS]]


def _given(recipe: Recipe, fixed: Mapping[str, Any] | None) -> dict[str, Any]:
    given: dict[str, Any] = {"groups": recipe.groups.num_groups, **(fixed or {})}
    if recipe.parallel.expert_parallel > 1:
        given.setdefault("expert", recipe.parallel.expert_parallel)
    return given


def _plan(
    name: str,
    stage: StageSettings,
    job: Job,
    cluster: Cluster,
    found: Found,
    num_chips: int,
    joining: str | None,
) -> Plan:
    architecture = job.architecture
    return Plan(
        model_name=architecture.name,
        cluster_name=cluster.name,
        stage_name=name,
        num_chips=num_chips,
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
        notes=tuple(_notes(name, stage, job, cluster, found.best[0].layout, joining)),
        num_searched=found.num_searched,
    )


def _notes(
    name: str, stage: StageSettings, job: Job, cluster: Cluster, chosen: Layout, joining: str | None
) -> Iterator[str]:
    """What was assumed, and what keeps `crosschip train` from running the stage as it is planned."""
    if job.architecture.assumed:
        yield job.architecture.assumed
    if joining is not None:
        yield f"{name}: {joining}"
    if stage.lora_rank is not None:
        yield f"{name}: {_ALL_WEIGHTS}"
    if stage.dtype == "float32" and not cluster.fp32_rate:
        yield _FP32
    if chosen.tensor * chosen.pipeline * chosen.context > 1:
        yield _OTHER_TRAINER
        return
    if chosen.recompute != "none":
        yield _RECOMPUTING_TRAINER
    parts = max(1, stage.batch_size // (chosen.data * chosen.groups * chosen.micro_batch))
    if parts != stage.gradient_accumulation:
        key = "train" if name == "pretrain" else name
        yield (
            f"{name}: planned with {chosen.micro_batch} sequences of a chip at once: set {key}.gradient_accumulation = "
            f"{parts} (it is {stage.gradient_accumulation})"
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
