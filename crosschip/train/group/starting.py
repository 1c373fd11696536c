"""The weights that several ranks start from: each fills its own shards, and none holds the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from crosschip.model import ModelConfig, Transformer, init_weights
from crosschip.model.weights import is_training_checkpoint
from crosschip.recipe import Recipe
from crosschip.train.checkpoint import load_weights
from crosschip.train.group.sharding import shard_like, shard_model
from crosschip.train.group.world import Ranks
from crosschip.train.preparation import starting_model

if TYPE_CHECKING:
    from crosschip.train.progress import StageProgress

__all__ = ["starting_shards"]


def starting_shards(
    recipe: Recipe, config: ModelConfig, checkpoint: Path | None, world: Ranks, progress: StageProgress
) -> Transformer:
    """The sharded fp32 master weights: of `checkpoint`, of the recipe's published directory, or new from the seed.

    A published directory, like a checkpoint of the old form, is read whole by every rank, on the host, and then cut.
    """
    published = checkpoint or (recipe.model.directory and Path(recipe.model.directory))
    if published and not is_training_checkpoint(published):
        whole = starting_model(recipe, config, checkpoint, torch.device("cpu"), progress)
        return shard_model(whole, world, recipe.parallel)
    with torch.device("meta"):
        model = Transformer(config)
    shard_model(model, world, recipe.parallel)
    model.to_empty(device=world.device)
    if checkpoint is not None:
        progress.say(f"weights from {checkpoint}")
        load_weights(checkpoint, model)
    else:
        progress.say(f"new weights from seed {recipe.seed}")
        init_weights(model, recipe.seed, shard_like)
    return model
