"""Rejection sampling: a model's own right answers to training problems become new fine-tuning data."""

from crosschip.train.distill.distilling import DistillReport, asked_for, distill, manifest_path
from crosschip.train.distill.problems import training_problems
from crosschip.train.distill.sampling import Engine, Here

__all__ = ["DistillReport", "Engine", "Here", "asked_for", "distill", "manifest_path", "training_problems"]
