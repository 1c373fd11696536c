"""A step, a layout and a stage of a plan as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from crosschip.plan.figures import Figure
from crosschip.plan.page.document import serving_figures
from crosschip.plan.stages import JoinedStage, PlannedStage, ReinforcedStage
from crosschip.plan.stages.reinforcing import ANSWER_SHARE, SAMPLED_ANEW, SCORING_PASS
from crosschip.plan.step import Layout, StepEstimate

__all__ = ["computed", "layout_document", "stage_document", "step_document"]


def computed(value: float, unit: str, source: str) -> dict[str, Any]:
    """A number that the planner computed, for JSON."""
    return Figure(value, unit, "computed", source).document()


def layout_document(layout: Layout) -> dict[str, Any]:
    """A layout in its short form and by its fields."""
    return {"text": str(layout), **asdict(layout)}


def step_document(estimate: StepEstimate, hardware_flops: float) -> dict[str, Any]:
    """One step of a layout; `hardware_flops` is the datasheet's rate of a chip."""
    rate = estimate.model_flops_per_s_per_chip
    return {
        "layout": layout_document(estimate.layout),
        "step_s": computed(estimate.step_s, "s", "sum of its parts"),
        "parts_s": dict(estimate.parts),
        "tokens_per_step": estimate.tokens_per_step,
        "tokens_per_s": computed(estimate.tokens_per_s, "tokens/s", "tokens of a step over its time"),
        "tokens_per_s_per_chip": computed(estimate.tokens_per_s_per_chip, "tokens/s", "the same, by chip"),
        "model_flops_per_s_per_chip": computed(rate, "FLOP/s", "operations the model needs, without recomputation"),
        "mfu": computed(rate / hardware_flops, "of the datasheet's bf16 rate", "operations over the datasheet's rate"),
        "memory_bytes": computed(estimate.memory_bytes, "bytes", "sum of its parts, on the fullest chip"),
        "memory_parts_bytes": dict(estimate.memory_parts),
        "num_chips": estimate.num_chips,
        "num_nodes": estimate.num_nodes,
    }


def stage_document(stage: PlannedStage, hardware_flops: float) -> dict[str, Any]:
    """One stage: how long its steps take and in which layout, its rollouts, its groups on several clusters."""
    plan = stage.plan
    return {
        "name": stage.name,
        "num_chips": stage.num_chips,
        "beside": [list(each) for each in stage.beside],
        "steps": plan.steps,
        "tokens": computed(plan.tokens, "tokens", "steps x batch x length, of the recipe"),
        "step_s": computed(stage.step_s, "s", "with rollouts and exchanges, where there are any"),
        "work_s": computed(stage.work_s, "s", "all steps, without stops"),
        "update": step_document(plan.best, hardware_flops),
        "rollouts": None if stage.reinforced is None else _rollouts(stage.reinforced),
        "joined": None if stage.joined is None else _joined(stage.joined),
    }


def _rollouts(stage: ReinforcedStage) -> dict[str, Any]:
    engines, rollouts = stage.engines, stage.rollouts
    return {
        "chip": stage.chip,
        "apart": stage.apart,
        "overlapped": rollouts.overlapped,
        "batches": stage.num_batches,
        "answers_per_batch": rollouts.answers_per_step,
        "tokens_per_answer": rollouts.tokens_per_answer,
        "instances": engines.num_instances,
        "chips_per_instance": engines.chips_per_instance,
        "sequences_per_instance": engines.batch,
        "token_s": computed(engines.token_s, "s", "one token of every sequence, on the roofline"),
        "tokens_per_s": computed(engines.tokens_per_s, "tokens/s", "of all instances, prompts included"),
        "rollout_s": computed(rollouts.rollout_s, "s", "answers of one batch, and of problems without signal"),
        "learning_s": computed(rollouts.learning_s, "s", "all updates of one batch"),
        "figures": {
            **serving_figures(stage.serving),
            **{name: figure.document() for name, figure in _rollout_figures(rollouts.tail).items()},
        },
    }


def _rollout_figures(tail: float) -> dict[str, Figure]:
    """What is assumed of rollouts besides the chip's shares."""
    return {
        "tail": Figure(tail, "times the mean", "assumed", "the slowest answer keeps a batch"),
        "answer_share": Figure(
            ANSWER_SHARE, "of max_new_tokens", "assumed", "the mean answer, where --rollout-tokens is not given"
        ),
        "sampled_anew": Figure(
            SAMPLED_ANEW, "answers made for one learnt from", "assumed", "where drop_without_signal is set"
        ),
        "scoring_pass": Figure(
            SCORING_PASS, "of a step", "assumed", "a forward pass, for several updates of a batch and for kl_weight"
        ),
    }


def _joined(stage: JoinedStage) -> dict[str, Any]:
    joined = stage.joined
    return {
        "groups": [
            {
                "cluster": plan.cluster_name,
                "chip": chip,
                "num_chips": plan.num_chips,
                "layout": layout_document(plan.best.layout),
                "tokens_per_s": computed(plan.best.tokens_per_s, "tokens/s", "alone, on its share of the batch"),
            }
            for plan, chip in zip(stage.plans, stage.chips, strict=True)
        ],
        "tokens_per_s": computed(joined.tokens_per_s, "tokens/s", "of all groups, exchanges included"),
        "utilisation": computed(joined.utilisation, "share", "of what the groups reach alone"),
        "exchange_s": computed(joined.exchange_s, "s", "one exchange on the thin link"),
        "between_exchanges_s": computed(
            joined.inner_s, "s", f"{stage.steps_between:g} inner steps of the slowest group"
        ),
        "divided_by_speed_tokens_per_s": computed(
            stage.divided_by_speed.tokens_per_s, "tokens/s", "if each group's batch were in proportion to its speed"
        ),
    }
