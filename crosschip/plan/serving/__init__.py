"""Serving: the chips that a load of requests takes, prefill and decode apart."""

from crosschip.plan.serving.capacity import Decode, Load, Prefill, ServingPlan, plan_serving, wait_quantile
from crosschip.plan.serving.model import ServedModel, ServingChip

__all__ = ["Decode", "Load", "Prefill", "ServedModel", "ServingChip", "ServingPlan", "plan_serving", "wait_quantile"]
