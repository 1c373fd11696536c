"""Serving: the chips that a load of requests takes, prefill and decode apart, and how fast chips make rollouts."""

from crosschip.plan.serving.capacity import Decode, Load, Prefill, ServingPlan, plan_serving, wait_quantile
from crosschip.plan.serving.model import ServedModel, ServingChip
from crosschip.plan.serving.of_architecture import served_model, serving_chip
from crosschip.plan.serving.rollouts import AnswerBatch, RolloutPlan, plan_rollouts

__all__ = [
    "AnswerBatch",
    "Decode",
    "Load",
    "Prefill",
    "RolloutPlan",
    "ServedModel",
    "ServingChip",
    "ServingPlan",
    "plan_rollouts",
    "plan_serving",
    "served_model",
    "serving_chip",
    "wait_quantile",
]
