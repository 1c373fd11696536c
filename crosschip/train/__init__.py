"""Training: the step, the loop, checkpoints; pre-training, fine-tuning, and the evaluation of what came out."""

from crosschip.train.evaluate import evaluate_recipe
from crosschip.train.progress import LineProgress, StageProgress, open_progress
from crosschip.train.stages import TrainOutcome, train_recipe

__all__ = ["LineProgress", "StageProgress", "TrainOutcome", "evaluate_recipe", "open_progress", "train_recipe"]
