"""What a run has before its first step: a tokenizer, the weights to start from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from crosschip.data import ChatTokenizer, load_tokenizer, train_tokenizer
from crosschip.errors import CheckpointError, ModelError
from crosschip.model import ModelConfig, Transformer, config_from_settings, init_weights, load_model, read_config
from crosschip.recipe import Recipe
from crosschip.rundir import RunDirectory, atomic_directory, is_complete
from crosschip.train.progress import StageProgress

if TYPE_CHECKING:
    from crosschip.data import Source

__all__ = ["VOCAB_MULTIPLE", "architecture", "obtain_tokenizer", "starting_model"]

VOCAB_MULTIPLE = 64  # rows of the embedding are rounded up to this, for the matrix units' sake


def obtain_tokenizer(
    recipe: Recipe,
    run: RunDirectory,
    sources: list[Source],
    resume: bool,
    progress: StageProgress,
    beat: Callable[[], None],
) -> ChatTokenizer:
    """The run's tokenizer: an existing one where the recipe names one, else trained once on the training split.

    It is saved to `run.tokenizer`; a resumed run loads it from there. `beat` is called for each text that is read.
    """
    given = recipe.tokenizer.directory or recipe.model.directory
    if given is not None:
        tokenizer = load_tokenizer(Path(given))
        if resume and is_complete(run.tokenizer):
            return tokenizer  # the checkpoint's fingerprint tells whether it is the same
    elif resume and is_complete(run.tokenizer):
        return load_tokenizer(run.tokenizer)
    else:
        progress.say(f"training a tokenizer of {recipe.tokenizer.vocab_size} entries on the training split")
        tokenizer = train_tokenizer(_texts(sources, beat), recipe.tokenizer.vocab_size)
    with atomic_directory(run.tokenizer) as directory:
        tokenizer.save(directory)
    return tokenizer


def _texts(sources: Iterable[Source], beat: Callable[[], None]) -> Iterator[str]:
    for source in sources:
        for row in source.rows("train"):
            beat()
            yield row.as_text()


def architecture(recipe: Recipe, tokenizer: ChatTokenizer) -> ModelConfig:
    """The model's configuration: the published directory's where the recipe starts from one, else the recipe's.

    Raises:
        ModelError: the tokenizer has more entries than the published model's embedding.
    """
    if recipe.model.directory is None:
        rounded = -(-tokenizer.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        return config_from_settings(recipe.model, rounded, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    config, _ = read_config(Path(recipe.model.directory))
    if tokenizer.vocab_size > config.vocab_size:
        raise ModelError(
            f"the tokenizer has {tokenizer.vocab_size} entries, the model in {recipe.model.directory} "
            f"{config.vocab_size}",
            "leave out tokenizer.directory to take the model's own tokenizer",
        )
    for _, stage in recipe.stages:
        if stage.seq_len > config.max_position_embeddings:
            raise ModelError(
                f"seq_len={stage.seq_len} is more than the max_position_embeddings={config.max_position_embeddings} "
                f"of the model in {recipe.model.directory}",
                "lower seq_len",
            )
    return config


def starting_model(
    recipe: Recipe, config: ModelConfig, checkpoint: Path | None, device: torch.device, progress: StageProgress
) -> Transformer:
    """The fp32 master weights: of `checkpoint`, else of the recipe's published directory, else new from the seed."""
    directory = checkpoint
    if directory is None and recipe.model.directory is not None:
        directory = Path(recipe.model.directory)
    if directory is not None:
        progress.say(f"weights from {directory}")
        model = load_model(directory, dtype=torch.float32, device=device)
        _check_loaded(model, config, directory)
    else:
        progress.say(f"new weights from seed {recipe.seed}")
        model = Transformer(config)
        init_weights(model, recipe.seed)
        model = model.to(device)
    return model


def _check_loaded(model: Transformer, config: ModelConfig, directory: Path) -> None:
    if model.config != config:
        raise CheckpointError(
            f"{directory} holds a model of another architecture than this run's", "restore its config.json"
        )
