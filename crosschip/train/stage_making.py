"""A stage put together from what its run is: model, optimizer, data or rollouts, and who watches and takes part."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from crosschip.chips import Chip, choose_compute_dtype, product_rate
from crosschip.chips.host import usable_cores
from crosschip.data import ChatStream, ChatTokenizer, PackedStream, TrainStream
from crosschip.model import ModelConfig, Transformer
from crosschip.recipe import Recipe, RlSettings, StageSettings
from crosschip.rundir import RunDirectory
from crosschip.train.adapters import Adapters, attach_adapters
from crosschip.train.checkpoint import CheckpointState, load_optimizer
from crosschip.train.drill import orders
from crosschip.train.drill.injection import disturbed
from crosschip.train.group.starting import starting_shards
from crosschip.train.group.waiting import rank_zero_begins
from crosschip.train.group.world import Ranks, World
from crosschip.train.guard.allowances import START
from crosschip.train.guard.heartbeat import Heartbeat
from crosschip.train.identity import Identity
from crosschip.train.joining import estimate_step_s, join_groups
from crosschip.train.kept_estimate import SHARED_DIRECTORY
from crosschip.train.optimizer import build_optimizer
from crosschip.train.preparation import starting_model
from crosschip.train.pretrain import StageData, TokensTold, pretraining_data
from crosschip.train.progress import StageProgress
from crosschip.train.rl.stage import Surroundings, loop_hooks, open_reinforcer
from crosschip.train.sft import fine_tuning_data, questions
from crosschip.train.stage_job import LoopHooks, StageJob, StagePosition
from crosschip.train.stage_sources import StageSources
from crosschip.train.step import Objective
from crosschip.train.validation import Prompt

__all__ = ["Event", "Rank", "StageRun", "Start", "make_job", "trainer_threads"]

Event = tuple[str, str, str]

TELL_EVERY_S = 5.0


@dataclass(frozen=True)
class Rank:
    """What this process is among those that train together. `group` is its replica group, where there are several."""

    world: World
    chip: Chip
    progress: StageProgress
    heartbeat: Heartbeat
    group: int | None


@dataclass
class StageRun:
    """What the stages of one run share. `dtypes` remembers what each wanted dtype became, `peaks` what was measured."""

    recipe: Recipe
    directory: RunDirectory
    resume: bool
    rank: Rank
    tokenizer: ChatTokenizer
    config: ModelConfig
    sources: StageSources
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    peaks: dict[torch.dtype, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Start:
    """Where a stage begins: its own `checkpoint` with its `state`, or `before`, the last one of the stage before."""

    checkpoint: Path | None
    before: Path | None
    state: CheckpointState | None
    identity: Identity
    position: StagePosition
    events: list[Event]

    @property
    def weights(self) -> Path | None:
        """The directory to begin from; None: the recipe says."""
        return self.checkpoint or self.before


@dataclass(frozen=True)
class _Parts:
    """What the kind of a stage decides: where its batches come from, what it minimises, what goes on beside it."""

    train_stream: TrainStream
    validation_stream: PackedStream | ChatStream | None
    prompts: list[Prompt]
    objective: Objective | None = None
    hooks: LoopHooks = field(default_factory=LoopHooks)


def make_job(run: StageRun, name: str, settings: StageSettings, start: Start) -> StageJob:
    """Everything that the loop needs. Engines of a stage that needs some are up when this returns.

    Raises:
        CrosschipError: what is missing, does not fit, or cannot be had.
    """
    compute_dtype = _compute_dtype(run, settings, start.state)
    data = None if isinstance(settings, RlSettings) else _prepare_data(run, name, settings)
    model = _starting_model(run, start.weights)
    optimizer = _optimizer(run, name, settings, model)
    if start.checkpoint is not None:
        load_optimizer(start.checkpoint, model, optimizer)
    directory = run.directory.stage(name)
    if isinstance(settings, RlSettings):
        parts = _reinforcement(run, settings, directory, model, compute_dtype, start)
    else:
        assert data is not None
        parts = _Parts(data.train, data.validation, data.prompts)
    rank = run.rank
    groups = join_groups(
        run.recipe,
        settings,
        model,
        optimizer,
        start.position,
        directory,
        Path(os.environ.get(SHARED_DIRECTORY, run.directory.path)),
        rank.group,
        rank.world,
        lambda: estimate_step_s(
            model, settings, rank.chip, compute_dtype, rank.world.size, run.recipe.groups.num_groups
        ),
        rank.progress.say,
        rank.heartbeat.renew,
    )
    job = StageJob(
        name=name,
        settings=settings,
        directory=directory,
        model=model,
        optimizer=optimizer,
        train_stream=parts.train_stream,
        validation_stream=parts.validation_stream,
        prompts=parts.prompts,
        tokenizer=run.tokenizer,
        chip=rank.chip,
        compute_dtype=compute_dtype,
        identity=start.identity,
        position=start.position,
        progress=rank.progress,
        peak_flops=_peak(run, compute_dtype),
        opening_events=start.events,
        world=rank.world,
        hooks=parts.hooks,
        objective=parts.objective,
        guard=run.recipe.guard,
        heartbeat=rank.heartbeat,
        groups=groups,
        group=rank.group or 0,
        expert_parallel=run.recipe.parallel.expert_parallel,
        on_drop=run.recipe.groups.on_drop,
    )
    drilled = os.environ.get(orders.DIRECTORY)
    return job if drilled is None else disturbed(job, Path(drilled), job.group)


def _optimizer(run: StageRun, name: str, settings: StageSettings, model: Transformer) -> torch.optim.Optimizer:
    adapters = _adapters(run, name, settings, model)
    optimizer = build_optimizer(model, settings)
    if adapters is not None:
        optimizer.register_step_post_hook(lambda *_: adapters.merge())
    if not optimizer.defaults["fused"]:
        run.rank.progress.say(
            f"AdamW: torch has no fused kernel for {run.rank.chip.device}, so one kernel per operation is used"
        )
    return optimizer


def _reinforcement(
    run: StageRun,
    settings: RlSettings,
    directory: Path,
    model: Transformer,
    compute_dtype: torch.dtype,
    start: Start,
) -> _Parts:
    """Engines, problems and checkers; the present weights are with the engines when it returns."""
    rank, source = run.rank, run.sources.of(settings)
    around = Surroundings(
        run.recipe, directory, source, run.tokenizer, rank.world, rank.heartbeat, rank.progress, start.position
    )
    give_back_cores = _share_cores(settings, rank)
    reinforcer = open_reinforcer(settings, around, model, compute_dtype, lambda: _starting_model(run, start.before))
    try:
        reinforcer.begin(start.position.step)
    except BaseException:
        reinforcer.close()
        give_back_cores()
        raise

    def close() -> None:
        reinforcer.close()
        give_back_cores()

    prompts = questions(source, run.tokenizer, settings.seq_len - settings.max_new_tokens)
    return _Parts(
        reinforcer.stream, None, prompts, reinforcer.objective, replace(loop_hooks(reinforcer, around), close=close)
    )


def _adapters(run: StageRun, name: str, settings: StageSettings, model: Transformer) -> Adapters | None:
    """Adapters on the model, where the stage trains these alone."""
    if settings.lora_rank is None:
        return None
    alpha = settings.lora_alpha or 2.0 * settings.lora_rank
    adapters = attach_adapters(model, settings.lora_rank, alpha, run.recipe.seed, run.rank.world.size)
    run.rank.progress.say(
        f"{name}: adapters of rank {settings.lora_rank}, {adapters.num_parameters:,} numbers to train"
    )
    return adapters


def trainer_threads(settings: StageSettings, rank: Rank) -> int:
    """With how many threads this process trains the stage.

    Engines that are started here compute on cores; where the trainer does, too, it leaves theirs to them.
    """
    num_threads = torch.get_num_threads()
    if not isinstance(settings, RlSettings) or rank.chip.device.type != "cpu":
        return num_threads
    num_engines = sum(engine.startswith("native") for engine in settings.rollouts.engines)
    cores = usable_cores()
    for_engines = num_engines * (settings.rollouts.num_threads or max(1, cores // 2))
    return max(1, min(num_threads, cores - for_engines)) if num_engines else num_threads


def _share_cores(settings: RlSettings, rank: Rank) -> Callable[[], None]:
    """Compute with `trainer_threads` from now on; returns what gives the other cores back."""
    before, num_threads = torch.get_num_threads(), trainer_threads(settings, rank)
    if num_threads < before:
        torch.set_num_threads(num_threads)
        rank.progress.say(f"the trainer computes with {num_threads} of {before} threads, beside its engines")
    return partial(torch.set_num_threads, before)


def _prepare_data(run: StageRun, name: str, settings: StageSettings) -> StageData:
    """The token stores of a stage that trains on what is written; rank 0 writes and checks them."""
    prepare = pretraining_data if name == "pretrain" else fine_tuning_data
    run.rank.progress.say(f"{name}: preparing the data")
    source = run.sources.of(settings)
    say = _every_few_seconds(run.rank.progress, name)
    beat = partial(run.rank.heartbeat.beat, START, 0)

    def tell(num_tokens: int) -> None:
        beat()
        say(num_tokens)

    with rank_zero_begins(run.rank.world, run.rank.heartbeat):
        data = prepare(source, run.tokenizer, run.directory, settings, run.recipe.seed, tell)
        if run.rank.world.rank == 0:
            data.train.check(beat)
            data.validation.check(beat)
    for note in data.train.notes:
        run.rank.progress.say(f"{name}: {note}")
    return data


def _starting_model(run: StageRun, weights: Path | None) -> Transformer:
    rank = run.rank
    if isinstance(rank.world, Ranks):
        return starting_shards(run.recipe, run.config, weights, rank.world, rank.progress)
    return starting_model(run.recipe, run.config, weights, rank.chip.device, rank.progress)


def _every_few_seconds(progress: StageProgress, name: str) -> TokensTold:
    """A listener to the writing of a token store that says how far it is, a line every few seconds."""
    last = time.monotonic()

    def tell(num_tokens: int) -> None:
        nonlocal last
        if time.monotonic() - last >= TELL_EVERY_S:
            last = time.monotonic()
            progress.say(f"{name}: {num_tokens:,} tokens prepared so far")

    return tell


def _compute_dtype(run: StageRun, settings: StageSettings, state: CheckpointState | None) -> torch.dtype:
    """The recorded dtype of a resumed stage; else what the chip is found to be fast in, once per run."""
    if state is not None:
        run.rank.progress.say(f"computing in {state.compute_dtype}, as recorded in the checkpoint")
        recorded: torch.dtype = getattr(torch, state.compute_dtype)
        return run.dtypes.setdefault(settings.dtype, recorded)
    if settings.dtype not in run.dtypes:
        choose = partial(choose_compute_dtype, run.rank.chip, settings.dtype)
        run.dtypes[settings.dtype], reason = run.rank.world.from_rank_zero(
            choose
        )  # by measuring: one must speak for all
        run.rank.progress.say(f"computing in {str(run.dtypes[settings.dtype]).removeprefix('torch.')}: {reason}")
    return run.dtypes[settings.dtype]


def _peak(run: StageRun, dtype: torch.dtype) -> float | None:
    """The chip's rate of matrix products in FLOP/s, where somebody looks at it."""
    if not run.rank.progress.measures_peak:
        return None
    if dtype not in run.peaks:
        run.peaks[dtype] = product_rate(run.rank.chip, dtype)
        run.rank.progress.say(f"measured peak of matrix products: {run.peaks[dtype] / 1e12:.3f} TFLOP/s")
    return run.peaks[dtype]
