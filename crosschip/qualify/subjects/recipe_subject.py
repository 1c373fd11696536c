"""A recipe as a subject: our transformer with the stage's settings, on made tokens of the recipe's vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from crosschip.model import ModelConfig, config_from_settings, read_config
from crosschip.model.weights import has_weights
from crosschip.qualify.finding import Role
from crosschip.qualify.subjects.fitting import fitted_config, num_active_parameters, small_config
from crosschip.qualify.subjects.subject import DtypeSetting
from crosschip.qualify.subjects.transformer_workload import TransformerPlan, TransformerWorkload
from crosschip.recipe import Recipe, StageSettings, load_recipe, parse_recipe
from crosschip.rundir import RunDirectory, read_json

__all__ = ["TransformerSubject", "load_recipe_subject", "load_run_subject"]

_VOCAB_MULTIPLE = 64  # `train` rounds the embedding's rows up to this

# A train step costs 6 floating-point operations for each parameter and token; so many are a second or two on two cores.
_MOST_FLOPS = 1e11
_SHORTEST_SEQUENCE = 32
_LONGEST_PROMPT = 256
_SMALL = {"batch_size": 4, "gradient_accumulation": 1, "seq_len": 32, "learning_rate": 2e-3}


@dataclass(frozen=True)
class TransformerSubject:
    """A model of the DeepSeek-V3 architecture with the workload of one training stage."""

    name: str
    origin: str
    config: ModelConfig
    stage: StageSettings
    serve_dtype: DtypeSetting
    weights: Path | None = None

    def dtype_setting(self, role: Role) -> DtypeSetting:
        """The stage's dtype for training, that of the handed-off files for serving."""
        return self.stage.dtype if role == "train" else self.serve_dtype

    def workload(
        self, device: torch.device, dtype: torch.dtype, seed: int = 0, small: bool = False
    ) -> TransformerWorkload:
        """The transformer on a device, with as many tokens a step as a CPU computes in seconds."""
        return TransformerWorkload(self._small_plan() if small else self._plan(), device, dtype, seed)

    def _plan(self) -> TransformerPlan:
        config, notes = fitted_config(self.config)
        stage, cut = _capped(self.stage, config)
        prompt_len = max(4, min(stage.seq_len, _LONGEST_PROMPT, config.max_position_embeddings - 4))
        weights = self.weights if config == self.config else None
        if self.weights is not None and weights is None:
            notes = [*notes, "weights are random, as the model was cut"]
        return TransformerPlan(config, stage, prompt_len, weights=weights, notes=[*notes, *cut])

    def _small_plan(self) -> TransformerPlan:
        stage = self.stage.model_copy(update=_SMALL)
        return TransformerPlan(small_config(self.config), stage, prompt_len=24, ruled=True)


def load_recipe_subject(path: Path, origin: str) -> TransformerSubject:
    """Read a recipe; the first stage it has is the workload.

    Raises:
        CrosschipError: the recipe or the model directory it names cannot be read.
    """
    return _subject_of(load_recipe(path), origin)


def load_run_subject(directory: Path, origin: str) -> TransformerSubject:
    """The recipe of a run, with what was set over it where the run knows that.

    Raises:
        CrosschipError: as `load_recipe_subject`.
    """
    run = RunDirectory(directory)
    if run.resolved_recipe.is_file():
        return _subject_of(parse_recipe(read_json(run.resolved_recipe), str(run.resolved_recipe)), origin)
    return load_recipe_subject(run.recipe, origin)


def _subject_of(recipe: Recipe, origin: str) -> TransformerSubject:
    stage = recipe.stages[0][1]
    directory = None if recipe.model.directory is None else Path(recipe.model.directory)
    config = _config(recipe) if directory is None else read_config(directory)[0]
    weights = directory if directory is not None and has_weights(directory) else None
    return TransformerSubject(recipe.name, origin, config, stage, recipe.handoff.dtype, weights)


def _config(recipe: Recipe) -> ModelConfig:
    vocab_size = recipe.tokenizer.vocab_size
    if recipe.tokenizer.directory is not None:
        vocab_size = _entries(Path(recipe.tokenizer.directory))
    return config_from_settings(recipe.model, -(-vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE)


def _entries(directory: Path) -> int:
    from crosschip.data import load_tokenizer

    return load_tokenizer(directory).vocab_size


def _capped(stage: StageSettings, config: ModelConfig) -> tuple[StageSettings, list[str]]:
    """The stage with one part of its batch, and of that as many sequences as the limit allows."""
    most_tokens = int(_MOST_FLOPS / (6 * num_active_parameters(config)))
    part = stage.batch_size // stage.gradient_accumulation
    seq_len = min(stage.seq_len, max(_SHORTEST_SEQUENCE, most_tokens))
    batch_size = max(1, min(part, most_tokens // seq_len))
    notes = []
    if (batch_size, seq_len) != (stage.batch_size, stage.seq_len):
        notes = [
            f"a train step has {batch_size} x {seq_len} tokens instead of {stage.batch_size} x {stage.seq_len}, "
            "so that a CPU computes it in seconds"
        ]
    update = {"batch_size": batch_size, "gradient_accumulation": 1, "seq_len": seq_len}
    return stage.model_copy(update=update), notes
