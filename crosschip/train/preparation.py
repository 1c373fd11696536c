"""What a run has before its first step: a directory it may write to, a tokenizer, the weights to start from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from crosschip.data import ChatTokenizer, load_tokenizer, train_tokenizer
from crosschip.errors import CheckpointError, ModelError, RunDirectoryError
from crosschip.model import ModelConfig, Transformer, config_from_settings, init_weights, load_model, read_config
from crosschip.recipe import Recipe
from crosschip.rundir import RunDirectory, atomic_directory, is_complete
from crosschip.train.progress import StageProgress

if TYPE_CHECKING:
    from crosschip.data import Source

__all__ = ["VOCAB_MULTIPLE", "architecture", "check_directory", "obtain_tokenizer", "starting_model"]

VOCAB_MULTIPLE = 64  # rows of the embedding are rounded up to this, for the matrix units' sake


def check_directory(run: RunDirectory, resume: bool) -> None:
    """Refuse to begin over an existing run's results, or to resume where no run ever was.

    Raises:
        RunDirectoryError: names the run directory.
    """
    if resume and not run.path.is_dir():
        raise RunDirectoryError(f"there is no run at {run.path} to go on with", "leave out --resume to begin it")
    if not resume and has_results(run):
        raise RunDirectoryError(
            f"{run.path} already holds results of a run",
            "add --resume to go on with it, or give another --out; nothing is overwritten",
        )


def has_results(run: RunDirectory) -> bool:
    """Whether a run has trained at least one step here, or was evaluated."""
    stages = list((run.path / "train").glob("*"))
    stepped = any(f.stat().st_size for stage in stages for f in stage.glob("metrics.jsonl"))
    return stepped or any(any(stage.glob("checkpoints/*")) for stage in stages) or run.evaluation.exists()


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
