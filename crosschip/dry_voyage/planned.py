"""The planned architecture made small: fewer of what there are many of, every kind of part kept, weights that speak.

Freshly initialised weights give nearly the same probability to every token, and an engine could leave out half of the
model unnoticed. These are scaled so that each part, the router's bias too, changes the log-probs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from crosschip.checkpoints import checkpoint_path
from crosschip.data import load_tokenizer, train_tokenizer
from crosschip.errors import QualifyError, RecipeError
from crosschip.handoff import export_hf
from crosschip.model import ModelConfig, Transformer, config_from_settings, init_weights, read_config, save_model
from crosschip.recipe import Recipe, load_recipe, parse_recipe
from crosschip.rundir import RunDirectory, atomic_directory, write_json

__all__ = ["PlannedModel", "cut_to_fit", "export_planned", "load_planned", "random_model"]

MOST_PARAMETERS = 60_000_000  # a quarter of a gigabyte in fp32: every engine loads it in seconds
_LEAST_VOCABULARY = 512
_VOCAB_MULTIPLE = 64  # as training rounds it
_TEXTS = (
    "What is 12 + 30? The ones: 2 + 0 = 2. The tens: 1 + 3 = 4. Together that is 42.",
    "The ship leaves the port at night; Grüß Gott, ça va? Привет, мир! 你好,世界。 🙂",
)


@dataclass(frozen=True)
class PlannedModel:
    """What is to be rehearsed: the architecture as cut, the recipe whose export is used, and what was cut, in words."""

    config: ModelConfig
    recipe: Recipe
    cuts: list[str]
    tokenizer: Path | None = None  # of a model directory; else one is made


def load_planned(origin: str, most_parameters: int = MOST_PARAMETERS) -> PlannedModel:
    """Read a recipe or a model directory (`config.json` is enough), and cut the architecture where it is too large.

    Raises:
        CrosschipError: it cannot be read.
    """
    path = Path(origin)
    if path.is_dir():
        config, document = read_config(path)
        dtype = document.get("dtype") or document.get("torch_dtype")
        recipe = _recipe_of_directory("bfloat16" if dtype in ("bfloat16", "float16") else "float32")
        return _cut(config, recipe, path if (path / "tokenizer.json").is_file() else None, most_parameters)
    if path.suffix != ".toml":
        raise QualifyError(f"{origin} is neither a recipe nor a model directory", "give one of the two to --model")
    recipe = load_recipe(path)
    if recipe.model.directory is not None:
        config, _ = read_config(Path(recipe.model.directory))
        return _cut(config, recipe, Path(recipe.model.directory), most_parameters)
    if recipe.tokenizer.directory is not None:
        tokenizer = Path(recipe.tokenizer.directory)
        size = load_tokenizer(tokenizer).vocab_size
    else:
        tokenizer, size = None, recipe.tokenizer.vocab_size
    config = config_from_settings(recipe.model, -(-size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE)
    return _cut(config, recipe, tokenizer, most_parameters)


def _recipe_of_directory(dtype: str) -> Recipe:
    """The recipe under which a directory's architecture is exported: only `[handoff]` counts."""
    document: dict[str, Any] = {"name": "dry-voyage", "data": {"source": "arithmetic"}}
    document |= {"train": {"steps": 100, "seq_len": 2}, "handoff": {"dtype": dtype}}
    return parse_recipe(document, "dry voyage")


def _cut(config: ModelConfig, recipe: Recipe, tokenizer: Path | None, most: int) -> PlannedModel:
    small, cuts = cut_to_fit(config, most)
    if small.vocab_size != config.vocab_size:
        tokenizer = None
    return PlannedModel(small, recipe, cuts, tokenizer)


def cut_to_fit(config: ModelConfig, most_parameters: int) -> tuple[ModelConfig, list[str]]:
    """Cut layers, then experts, vocabulary and widths of the feed-forward part, only as far as it must be.

    Head sizes, ranks, the kind of position encoding, of routing and of heads stay as they are: engines refuse by those.
    """
    small = config
    for changes in _cuts(config):
        if _num_parameters(small) <= most_parameters:
            break
        small = replace(small, **changes)
    told = [
        f"{name} {getattr(config, name)} -> {getattr(small, name)}"
        for name in vars(config)
        if getattr(config, name) != getattr(small, name)
    ]
    return small, told


def _cuts(config: ModelConfig) -> list[dict[str, Any]]:
    dense = min(1, config.first_k_dense_replace)
    # As many experts as the routing needs for its groups to mean anything.
    experts = min(config.n_routed_experts, max(4 * config.n_group, 2 * config.num_experts_per_tok))
    return [
        {"num_hidden_layers": min(4, config.num_hidden_layers), "first_k_dense_replace": dense},
        {"num_hidden_layers": min(2, config.num_hidden_layers)},
        {"n_routed_experts": -(-experts // config.n_group) * config.n_group},
        {"vocab_size": min(8192, config.vocab_size)},
        {"moe_intermediate_size": min(128, config.moe_intermediate_size)},
        {"intermediate_size": min(256, config.intermediate_size)},
        {"vocab_size": min(1024, config.vocab_size)},
        {"num_attention_heads": min(16, config.num_attention_heads)},
        {"hidden_size": min(1024, config.hidden_size)},
        {"hidden_size": min(256, config.hidden_size)},
    ]


def _num_parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Transformer(config).parameters())


@torch.no_grad()
def random_model(config: ModelConfig, seed: int) -> Transformer:
    """Random weights in which every part matters: unit variance through each matrix, uneven norms, a router's bias."""
    model = Transformer(config)
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and name.endswith("norm.weight"):
            parameter.copy_(0.75 + 0.5 * torch.rand(parameter.shape, generator=generator))
        elif parameter.dim() >= 2:
            scale = 1.0 if "embed_tokens" in name else 1.5 / math.sqrt(parameter.shape[-1])
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    for router in model.routers():
        bias = router.e_score_correction_bias
        bias.copy_(0.2 * torch.randn(bias.shape, generator=generator))
    return model


def export_planned(planned: PlannedModel, directory: Path, seed: int) -> Path:
    """Write a run directory with one checkpoint of random weights, and hand it off as a trained run is handed off.

    Raises:
        CrosschipError: the export refuses something.
    """
    run = RunDirectory(directory)
    with atomic_directory(run.tokenizer) as target:
        tokenizer = load_tokenizer(planned.tokenizer) if planned.tokenizer else None
        if tokenizer is None:
            tokenizer = train_tokenizer(_TEXTS * 4, min(_LEAST_VOCABULARY, planned.config.vocab_size))
        tokenizer.save(target)
    if tokenizer.vocab_size > planned.config.vocab_size:
        raise RecipeError(
            f"the tokenizer has {tokenizer.vocab_size} entries, vocab_size is {planned.config.vocab_size}",
            "raise tokenizer.vocab_size",
        )
    config = replace(
        planned.config,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )
    stage = planned.recipe.stages[-1][0]
    with atomic_directory(checkpoint_path(run.stage(stage), 0)) as target:
        save_model(random_model(config, seed), target, torch.float32)
    write_json(run.resolved_recipe, planned.recipe.model_dump())
    return export_hf(run, planned.recipe)
