"""The stages of a recipe one after the other, each from where the one before ended."""

from __future__ import annotations

import functools
import json
import signal
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from crosschip.chips import keep_freed_memory
from crosschip.recipe import FurtherDistilling, Recipe, StageSettings
from crosschip.rewards.of_recipe import check_checkers
from crosschip.rundir import RunDirectory, write_json
from crosschip.train.beginning import beginning, check_next_stage
from crosschip.train.checkpoint import find_newest, give_name_back, read_state, set_damaged_aside
from crosschip.train.distil_stage import distil_stage
from crosschip.train.evaluate.of_recipe import check_problems
from crosschip.train.group.device import find_rank_chip
from crosschip.train.group.layout import check_experts, check_layout
from crosschip.train.group.waiting import made_by_rank_zero, rank_zero_begins
from crosschip.train.group.world import World, join_world
from crosschip.train.guard.allowances import START
from crosschip.train.guard.heartbeat import Heartbeat, open_heartbeat
from crosschip.train.guard.run_files import check_directory
from crosschip.train.identity import Identity, check_same_run, digest
from crosschip.train.loop import run_stage
from crosschip.train.preparation import architecture, obtain_tokenizer
from crosschip.train.progress import SilentProgress, StageProgress, open_progress
from crosschip.train.resumption import beginning_events, resumption_events
from crosschip.train.stage_job import StageEnd, StagePosition
from crosschip.train.stage_making import Rank, StageRun, Start, make_job
from crosschip.train.stage_sources import StageSources

__all__ = ["TrainOutcome", "train_recipe"]


@dataclass(frozen=True)
class TrainOutcome:
    """How a training ended. `interrupted_by` is the number of a signal; `already_complete`: there was nothing to do."""

    stages: tuple[StageEnd, ...]
    interrupted_by: int | None = None
    already_complete: bool = False

    @property
    def exit_code(self) -> int:
        """0, or 128 + the signal's number, as a shell counts it."""
        return 0 if self.interrupted_by is None else 128 + self.interrupted_by

    @property
    def checkpoint(self) -> Path | None:
        """The last stage's checkpoint, which is a model directory; None when none was written."""
        return self.stages[-1].checkpoint if self.stages else None


def train_recipe(
    recipe: Recipe,
    run: RunDirectory,
    resume: bool = False,
    progress: StageProgress | None = None,
    resume_command: str | None = None,
    heartbeat: Heartbeat | None = None,
    group: int | None = None,
) -> TrainOutcome:
    """Train every stage of `recipe` in `run`, which is locked meanwhile.

    `group` is this replica group's number where several train together. A supervisor, if there is one, sees the
    `heartbeat`.

    Called by several ranks (see `train.group`), they train one model together; rank 0 holds the lock and tells.

    With `resume` it goes on from the newest whole checkpoint, bit-exactly on the same machine with the same number of
    threads; what was finished is left alone. SIGINT, SIGTERM and SIGHUP finish the step, save, and say how to go on
    with `resume_command`.

    Raises:
        RecipeError: it names a checker that does not exist.
        DataError: it wants problems asked that there are not, or data cannot be read.
        RunDirectoryError: the directory is in use, holds another run's results, or has nothing to resume.
        CheckpointError: a checkpoint belongs to other data, another tokenizer or another architecture, or is damaged.
        GuardError: the training diverged or the chip errs; the last checkpoint is still there.
        GroupsError: the groups do not fit together.
    """
    check_checkers(recipe)
    check_problems(recipe)
    heartbeat = heartbeat or open_heartbeat(recipe.guard.start_allowance_s)
    if resume_command is None:
        recipe_file = run.recipe if run.recipe.exists() else "RECIPE"
        resume_command = f"crosschip train {recipe_file} --out {run.path} --resume"
    chip = find_rank_chip(recipe.chips.train)
    with join_world(chip.device, recipe.parallel.timeout_s) as world:
        progress = SilentProgress() if world.rank > 0 else progress or open_progress()
        rank = Rank(world, chip, progress, heartbeat, group)
        if world.rank > 0:
            return _train_stages(recipe, run, resume, rank)
        check_directory(run, resume)
        with run.lock():
            check_directory(run, resume)  # again: another process may have trained here before the lock was this one's
            outcome = _train_stages(recipe, run, resume, rank)
        progress.say(_last_words(outcome, run, resume_command))
        return outcome


def _train_stages(recipe: Recipe, run: RunDirectory, resume: bool, rank: Rank) -> TrainOutcome:
    ends: list[StageEnd] = []
    did_work = False
    try:
        prepared = _prepare(recipe, run, resume, rank)
        for name, settings in recipe.order:
            if rank.group and recipe.groups_in(name).num_groups == 1:
                rank.progress.say(f"group {rank.group} ends here: {name} and what follows is group 0's alone")
                break
            before = ends[-1].checkpoint if ends else None
            if isinstance(settings, FurtherDistilling):
                did_work |= distil_stage(name, settings, before, recipe, run, prepared.tokenizer, rank)
                continue
            end, trained = _run_one(prepared, name, settings, before)
            ends.append(end)
            did_work |= trained
            if end.received is not None and (end.interrupted_by or name != recipe.order[-1][0]):
                return TrainOutcome(tuple(ends), end.received)
    except KeyboardInterrupt:  # outside a stage's loop, where nothing is half done
        if rank.world.size > 1:
            raise  # another rank may wait for this one in a collective, deaf to signals: only its end wakes that one
        return TrainOutcome(tuple(ends), signal.SIGINT.value)
    _record_recipe(prepared)
    return TrainOutcome(tuple(ends), already_complete=not did_work)


def _last_words(outcome: TrainOutcome, run: RunDirectory, resume_command: str) -> str:
    done = ", ".join(f"{end.stage} {end.step} steps" for end in outcome.stages) or "nothing"
    if outcome.interrupted_by is not None:
        return f"interrupted; saved: {done}\ngo on with: {resume_command}"
    if outcome.already_complete:
        return f"{run.path} is complete: {done}; nothing to do"
    return f"trained: {done}; weights in {outcome.checkpoint}"


def _prepare(recipe: Recipe, run: RunDirectory, resume: bool, rank: Rank) -> StageRun:
    keep_freed_memory()
    world, progress = rank.world, rank.progress
    progress.say(f"training on {rank.chip.name}" + _layout(recipe, world))
    check_layout(recipe, world.size)
    sources = StageSources(recipe, run)
    with rank_zero_begins(world, rank.heartbeat):
        # What rank 0 has made is there for the others as it is for a resumed run.
        there = resume or world.rank > 0
        beat = functools.partial(rank.heartbeat.beat, START, 0)
        tokenizer = obtain_tokenizer(recipe, run, sources.from_the_start(), there, progress, beat)
    config = architecture(recipe, tokenizer)
    check_experts(recipe.parallel, config, world.size)
    prepared = StageRun(recipe, run, resume, rank, tokenizer, config, sources)
    if not resume:
        _record_recipe(prepared)
    return prepared


def _record_recipe(run: StageRun) -> None:
    """Write down what is trained: of a run that goes on only once it is known to be the same run."""
    if run.rank.world.rank == 0:
        write_json(run.directory.resolved_recipe, run.recipe.model_dump(mode="json"))


def _layout(recipe: Recipe, world: World) -> str:
    """How several ranks share the model and the machine, in words."""
    if world.size == 1:
        return ""
    num_threads = torch.get_num_threads()
    told = f" with {world.size} ranks of {num_threads} thread{'s' if num_threads > 1 else ''} each"
    experts = recipe.parallel.expert_parallel
    return told if experts == 1 else f"{told}, {experts} of which hold one set of experts"


def _identity(run: StageRun, settings: StageSettings, before: Path | None) -> Identity:
    """Fingerprints of everything a checkpoint of this stage belongs to."""
    data, source, rank = run.sources.settings(settings), run.sources.of(settings), run.rank
    beat = functools.partial(rank.heartbeat.beat, START, 0)
    source.take_digests(made_by_rank_zero(rank.world, rank.heartbeat, lambda: source.find_digests(beat)))
    model = json.loads(json.dumps(asdict(run.config)))
    given = run.recipe.tokenizer.directory or run.recipe.model.directory
    vocab_size = None if given else run.recipe.tokenizer.vocab_size
    stage = settings.model_dump(mode="json", exclude={"data", "rollouts"})  # engines may change between two calls
    return Identity(
        fingerprints={
            "data": digest([source.fingerprint, run.recipe.seed, settings.seq_len]),
            "tokenizer": digest([run.tokenizer.fingerprint, vocab_size]),
            "architecture": digest(model),
            "recipe_stage": digest(stage),
        },
        settings={
            "data": {**data.model_dump(mode="json"), "seed": run.recipe.seed, "seq_len": settings.seq_len},
            "tokenizer": {"vocab_size": vocab_size, "directory": given},
            "model": model,
            "stage": stage,
        },
        began_from=rank.world.from_rank_zero(lambda: beginning(before, run.recipe.model.directory)),
    )


def _run_one(run: StageRun, name: str, settings: StageSettings, before: Path | None) -> tuple[StageEnd, bool]:
    """Train one stage to its end, from its own checkpoint or `before`, the last one of the stage before.

    Returns how it ended, and whether there was anything to train.
    """
    run.rank.heartbeat.stage(name)
    run.rank.heartbeat.beat(START, 0)
    directory = run.directory.stage(name)
    identity = _identity(run, settings, before)
    checkpoint = _newest(run, directory) if run.resume else None
    state, position = None, StagePosition()
    if checkpoint is None:
        events = beginning_events(run, name, before)
    else:
        state = read_state(checkpoint)
        saved = Identity(state.fingerprints, state.settings, state.began_from)
        changed = check_same_run(saved, identity, str(checkpoint), name)
        if state.step >= settings.steps:
            run.dtypes.setdefault(settings.dtype, getattr(torch, state.compute_dtype))
            return StageEnd(name, state.step, settings.steps, checkpoint), False
        _check_next(run, name, settings)
        position = StagePosition(state.step, state.sequences_consumed, state.tokens_consumed)
        step = state.step
        aside = run.rank.world.from_rank_zero(lambda: set_damaged_aside(directory, step))
        events = resumption_events(run, name, settings, state, changed, aside)
    _record_recipe(run)
    job = make_job(run, name, settings, Start(checkpoint, before, state, identity, position, events))
    return run_stage(job), True


def _newest(run: StageRun, stage_directory: Path) -> Path | None:
    """The newest whole checkpoint of a stage, as rank 0 finds it."""

    def find() -> Path | None:
        give_name_back(stage_directory)
        return find_newest(stage_directory, run.rank.progress.say)

    return run.rank.world.from_rank_zero(find)


def _check_next(run: StageRun, name: str, settings: StageSettings) -> None:
    """See `check_next_stage`; nothing where the stage is the last one."""
    names = [each for each, _ in run.recipe.stages]
    for following in names[names.index(name) + 1 :][:1]:
        check_next_stage(run.directory.stage(following), run.directory.stage(name), settings.steps)
