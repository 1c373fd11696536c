"""A stage of reinforcement learning put together: problems, engines, checkers, and what it does within the loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from crosschip.chips.host import usable_cores
from crosschip.recipe import Recipe, RlSettings
from crosschip.rewards import Rewarder, RewardTerm
from crosschip.train.group.full_model import gather_model
from crosschip.train.group.waiting import rank_zero_begins
from crosschip.train.group.world import PATIENCE, World
from crosschip.train.guard.allowances import START
from crosschip.train.guard.heartbeat import Heartbeat
from crosschip.train.progress import StageProgress
from crosschip.train.rl.event_queue import EventQueue
from crosschip.train.rl.problems import Problems
from crosschip.train.rl.reinforcer import Reinforcer
from crosschip.train.rl.rollouts import Rollouts, engines_of
from crosschip.train.rl.scoring import HeldOutProblems
from crosschip.train.stage_job import LoopHooks, StagePosition
from crosschip.train.step import StepHooks

if TYPE_CHECKING:
    from crosschip.data import ChatTokenizer, Source
    from crosschip.model import Transformer

__all__ = ["Surroundings", "loop_hooks", "open_reinforcer"]

_MOST_REWARD_WORKERS = 8  # where the recipe does not say: each may hold what its checkers load


@dataclass(frozen=True)
class Surroundings:
    """What a stage stands in: the run's recipe, the stage's directory and source, and who takes part."""

    recipe: Recipe
    directory: Path
    source: Source
    tokenizer: ChatTokenizer
    world: World
    heartbeat: Heartbeat
    progress: StageProgress
    position: StagePosition


def open_reinforcer(
    settings: RlSettings,
    around: Surroundings,
    model: Transformer,
    compute_dtype: torch.dtype,
    starting_weights: Callable[[], Transformer],
) -> Reinforcer:
    """Start what a stage needs; `starting_weights` gives the model that the stage began with, if it is asked for.

    Raises:
        RecipeError: a checker or an engine that does not exist.
        DataError: problems that cannot be asked.
        RolloutError: no engine answers.
    """
    events = EventQueue()
    rollouts = None
    with rank_zero_begins(around.world, around.heartbeat):
        if around.world.rank == 0:
            rollouts = _open_rollouts(settings, around, compute_dtype, events)
    return Reinforcer(
        settings=settings,
        directory=around.directory,
        model=model,
        tokenizer=around.tokenizer,
        compute_dtype=compute_dtype,
        world=around.world,
        rollouts=rollouts,
        seed=around.recipe.seed,
        heartbeat=around.heartbeat,
        position=around.position,
        events=events,
        reference=starting_weights().requires_grad_(False) if settings.kl_weight else None,
    )


def _open_rollouts(
    settings: RlSettings, around: Surroundings, compute_dtype: torch.dtype, events: EventQueue
) -> Rollouts:
    tokenizer, recipe = around.tokenizer, around.recipe
    beat = partial(around.heartbeat.beat, START, 0)
    problems = Problems(around.source, tokenizer, settings.seq_len - settings.max_new_tokens, recipe.seed, beat)
    if problems.num_too_long:
        around.progress.say(f"{problems.num_too_long} problems were left out: their prompts are too long for seq_len")
    terms = [RewardTerm(term.checker, term.weight, term.required) for term in settings.rewards]
    workers = settings.reward_workers or min(_MOST_REWARD_WORKERS, usable_cores())
    rewarder = Rewarder(terms, settings.reward_timeout_s, workers)
    around.progress.say(f"{len(problems)} problems; answers come from {', '.join(settings.rollouts.engines)}")
    engines = engines_of(
        settings, recipe.chips.serve, str(compute_dtype).removeprefix("torch."), around.directory / "engines"
    )
    return Rollouts(
        settings,
        engines,
        problems,
        rewarder,
        tokenizer.stop_ids,
        recipe.seed,
        tokenizer.decode,
        events.put,
        around.directory / "weights",
    )


def loop_hooks(reinforcer: Reinforcer, around: Surroundings) -> LoopHooks:
    """What the loop calls."""
    held_out = lru_cache(maxsize=1)(lambda: HeldOutProblems(around.source, around.tokenizer, reinforcer.settings))
    return LoopHooks(
        step=StepHooks(after_backward=reinforcer.after_backward),
        after_update=reinforcer.after_update,
        measured=reinforcer.measured,
        validate=lambda step: _score(reinforcer, around, held_out),
        after_save=reinforcer.after_save,
        after_roll_back=reinforcer.roll_back,
        new_events=reinforcer.events.taken,
        close=reinforcer.close,
    )


def _score(
    reinforcer: Reinforcer, around: Surroundings, held_out: Callable[[], HeldOutProblems]
) -> tuple[dict[str, float], str]:
    """The share of held-out problems that the model answers right, greedily, in fp32; rank 0 has the problems."""
    world, heartbeat = around.world, around.heartbeat
    model = gather_model(reinforcer.model, world)
    if world.rank != 0:
        heartbeat.renew(PATIENCE.total_seconds())  # answers may take long, and only rank 0 sees them come

    def measure() -> tuple[dict[str, float], str]:
        assert model is not None
        found = held_out().score(model, heartbeat.renew)
        told = f"{found.num_right} of {found.num_problems} held-out problems right, {found.mean_tokens:.0f} tokens each"
        if found.num_errors:
            failed = f"the checker failed on {found.num_errors} of {found.num_problems} held-out answers"
            told += f"; {failed}"
            reinforcer.events.put("checker failed", failed, "they count as not right; the score is too low")
        numbers = {"score": found.num_right / found.num_problems, "answer_tokens": found.mean_tokens}
        return {**numbers, "num_checker_errors": found.num_errors}, told

    return world.from_rank_zero(measure)
