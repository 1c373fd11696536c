"""A stage of reinforcement learning: the chips that learn, the chips that answer, and what they wait for."""

from __future__ import annotations

import math
from dataclasses import replace

from crosschip.plan.cluster import Cluster
from crosschip.plan.dates import Rollouts
from crosschip.plan.figures import Figure
from crosschip.plan.planning import architecture_of
from crosschip.plan.serving import AnswerBatch, RolloutPlan, plan_rollouts, served_model, serving_chip
from crosschip.plan.stages.planned import PlannedStage, ReinforcedStage
from crosschip.plan.step import Plan
from crosschip.recipe import Recipe, RlSettings

__all__ = ["ANSWER_SHARE", "SAMPLED_ANEW", "SCORING_PASS", "reinforce_stage"]

ANSWER_SHARE = 0.5  # of max_new_tokens that the mean answer has; assumed
# Problems are sampled anew where all answers got the same reward; assumed. DAPO (arXiv 2503.14476, section 3.2) shows
# the share of such problems growing during training.
SAMPLED_ANEW = 1.5
_SHARED_MEMORY = 0.5  # of a chip that learns as well is left for weights and cache of the engine; assumed
SCORING_PASS = 1 / 3  # a forward pass of the three passes' worth of a step


def reinforce_stage(
    recipe: Recipe, plan: Plan, stage: RlSettings, chips: tuple[Cluster, Cluster | None], labels: tuple[str, str],
    answer_tokens: float | None,
) -> PlannedStage:  # fmt: skip
    """The stage whose steps `plan` has; `chips` are the cluster that learns and the one that answers, if it is another.

    On chips of their own the answers are made while the others learn, if the recipe lets them be a version behind.

    Raises:
        PlanError: the model does not fit on the chips that answer.
    """
    learning, apart = chips
    work = _work(stage, answer_tokens)
    serving = serving_chip((apart or learning).hardware)
    if apart is None:
        half = Figure(_SHARED_MEMORY, "share", "assumed", "of a chip that learns as well, left to the engine")
        serving = replace(serving, usable_memory=_SHARED_MEMORY, sources=(*serving.sources, ("usable_memory", half)))
    wide = 4.0 if stage.rollouts.dtype == "float32" else 2.0
    num_chips = plan.num_chips if apart is None else apart.num_chips
    engines = plan_rollouts(served_model(architecture_of(recipe), wide), serving, num_chips, work)
    rollouts = _rollouts(stage, plan, work, engines, beside=apart is not None)
    batches = math.ceil(stage.steps / stage.updates_per_batch)
    others = () if apart is None else ((labels[1], engines.num_chips),)
    answering = labels[0 if apart is None else 1]
    return PlannedStage(
        plan.stage_name,
        plan,
        batches * rollouts.step_s,
        plan.num_chips + sum(number for _, number in others),
        beside=others,
        reinforced=ReinforcedStage(work, engines, serving, rollouts, batches, apart is not None, answering),
        notes=_notes(plan.stage_name, stage, answer_tokens, apart),
    )


def _rollouts(stage: RlSettings, plan: Plan, work: AnswerBatch, engines: RolloutPlan, beside: bool) -> Rollouts:
    """One batch: what is written, again where there was no signal, and what is learnt, scored by the trainer before."""
    passes = 1 + SCORING_PASS * ((stage.updates_per_batch > 1) + (stage.kl_weight > 0))
    again = SAMPLED_ANEW if stage.drop_without_signal else 1.0
    return Rollouts(
        answers_per_step=round(work.answers),
        tokens_per_answer=work.answer_tokens,
        prompt_tokens=work.prompt_tokens,
        rollout_tokens_per_s=engines.tokens_per_s / again,
        train_tokens_per_s=plan.best.tokens_per_s / passes,
        overlapped=beside and stage.rollouts.max_staleness > 0,
    )


def _work(stage: RlSettings, answer_tokens: float | None) -> AnswerBatch:
    mean = ANSWER_SHARE * stage.max_new_tokens if answer_tokens is None else answer_tokens
    answer = min(mean, float(stage.max_new_tokens))
    here = stage.rollouts.engines == ["native"]
    return AnswerBatch(
        stage.prompts, stage.samples, float(stage.seq_len - stage.max_new_tokens), answer,
        stage.rollouts.max_batch_size if here else 4096,
    )  # fmt: skip


def _notes(name: str, stage: RlSettings, answer_tokens: float | None, apart: Cluster | None) -> tuple[str, ...]:
    notes = []
    if answer_tokens is None:
        notes.append(
            f"{name}: the mean answer is assumed to have {ANSWER_SHARE:.0%} of max_new_tokens = "
            f"{stage.max_new_tokens}; give --rollout-tokens from a first run"
        )
    elif answer_tokens > stage.max_new_tokens:
        notes.append(
            f"{name}: an answer has max_new_tokens = {stage.max_new_tokens} at most, so the mean one is planned with "
            f"these and not with {answer_tokens:g} (--rollout-tokens)"
        )
    if stage.drop_without_signal:
        notes.append(f"{name}: {SAMPLED_ANEW:g} times as many answers are made as learnt from (assumed)")
    if apart is None:
        notes.append(
            f"{name}: the chips that learn make the rollouts, in turns, on {_SHARED_MEMORY:.0%} of their memory "
            "(assumed)"
        )
    return tuple(notes)
