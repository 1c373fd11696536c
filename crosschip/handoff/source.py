"""Where a model comes from: a run, one of its checkpoints, or any directory in Hugging Face layout.

Whatever it was stored as, its tensors are seen under their published names and not quantised, so that each target is
made from each source.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crosschip.checkpoints import complete_checkpoints, run_of
from crosschip.errors import BrokenConfigError, HandoffError, ModelError, RunDirectoryError
from crosschip.golden.config_fields import OTHER_ENGINES_READ
from crosschip.handoff.conversion.declared import checkpoint_layout, stored_layout
from crosschip.handoff.conversion.layout import TensorSource
from crosschip.handoff.conversion.sources import CheckpointSource, LayoutSource, SafetensorsSource
from crosschip.handoff.families import check_tensors
from crosschip.model import ModelConfig, read_config
from crosschip.model.quantised import QUANTISED_DTYPES, Quantisation, quantisation_of
from crosschip.model.weights import is_training_checkpoint, published_views
from crosschip.recipe import parse_recipe
from crosschip.rundir import RunDirectory, is_complete, read_json

__all__ = ["TOKENIZER_FILES", "ModelSource", "TensorSource", "last_checkpoint", "open_source"]

_STAGES = ("rl", "sft", "pretrain")  # the last one first
_SPELLED_OUT = ("topk_method", "scoring_func")  # in an export, where the source is silent
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json"),
    *("tiktoken.model", "tekken.json", "spiece.model", "sentencepiece.bpe.model", "vocab.txt"),  # of other libraries
)


@dataclass(frozen=True)
class ModelSource:
    """A model that can be handed off.

    `config` is its `config.json` without quantisation; `files` are what the tensors are read from; `quantised` says
    how they are stored there.
    """

    tensors: TensorSource
    config: dict[str, Any]
    tokenizer_files: list[Path]
    origin: str
    directory: Path
    files: list[Path]
    generation_config: dict[str, Any] | None = None
    quantised: Quantisation | None = None
    settings: ModelConfig | None = field(default=None)  # of our own architecture

    def identity(self) -> dict[str, Any]:
        """What tells this source from another, as a JSON document: its files with size and time, and its config."""
        facts = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in self.files]
        return {"files": [list(each) for each in facts], "config": self.config}


def open_source(path: Path) -> ModelSource:
    """Open a run directory (its newest checkpoint of its last stage), a checkpoint, or a Hugging Face directory.

    Only headers are read; the tensors stay in their files.

    Raises:
        HandoffError: there is no model, it is incomplete, or it is quantised in a way that is not read here.
        ModelError: `config.json` or the checkpoint's index cannot be read.
    """
    if not path.is_dir():
        raise HandoffError(f"there is no directory {path}", "give a run directory or a model directory")
    path = path.absolute()  # what lies around a checkpoint is found by its place
    if not (path / "config.json").is_file():
        return open_source(last_checkpoint(path))
    if is_training_checkpoint(path):
        return _open_checkpoint(path)
    return _open_hugging_face(path)


def last_checkpoint(path: Path, stage: str | None = None) -> Path:
    """The newest complete checkpoint of a run's last stage: `stage`, or as its recipe says, or as it is found.

    Raises:
        RunDirectoryError: it is no run, or it has none.
    """
    run = RunDirectory(path)
    if stage is None and run.resolved_recipe.is_file():
        recipe = parse_recipe(read_json(run.resolved_recipe), str(run.resolved_recipe))
        stage = recipe.stages[-1][0]
    stages = (stage,) if stage is not None else _STAGES
    for each in stages:
        if complete := complete_checkpoints(run.stage(each)):
            return complete[-1]
    if not (path / "train").is_dir() and stage is None:
        raise RunDirectoryError(
            f"{path} is neither a model directory (config.json) nor a run with checkpoints",
            "give a run directory after training, or a directory in Hugging Face layout",
        )
    raise RunDirectoryError(
        f"{path} has no complete checkpoint of its last stage, {stages[-1]}",
        "train it first: crosschip train RECIPE (with --resume to go on)",
    )


def _open_checkpoint(directory: Path) -> ModelSource:
    settings, _ = read_config(directory)
    own = CheckpointSource(directory)
    return ModelSource(
        tensors=LayoutSource(own, checkpoint_layout(settings)),
        config=settings.to_hf("float32"),
        tokenizer_files=_tokenizer_files(directory),
        origin=str(directory),
        directory=directory,
        files=_files_of(directory, [path for path in sorted((directory / "dcp").iterdir()) if path.is_file()]),
        generation_config=_generation_config(settings),
        settings=settings,
    )


def _open_hugging_face(directory: Path) -> ModelSource:
    document = _read_document(directory)
    stored: TensorSource = SafetensorsSource(directory)
    how = quantisation_of(document)
    if how is not None:
        stored = LayoutSource(stored, stored_layout(stored, how).inverse)
    else:
        _refuse_unexplained(stored, directory)
    settings = _settings_of(document)
    _check_complete(stored, document, settings, directory)
    config = {key: value for key, value in document.items() if key not in ("quantization_config", "compression_config")}
    if settings is not None:  # transformers leaves out what it takes for granted, and vLLM drops the bias without
        config |= {key: OTHER_ENGINES_READ[key] for key in _SPELLED_OUT if config.get(key) is None}
    generation = directory / "generation_config.json"
    return ModelSource(
        tensors=stored,
        config=config,
        tokenizer_files=_tokenizer_files(directory),
        origin=str(directory),
        directory=directory,
        files=_files_of(directory, sorted(directory.glob("*.safetensors"))),
        generation_config=read_json(generation) if generation.is_file() else _generation_config(settings),
        quantised=how,
        settings=settings,
    )


def _read_document(directory: Path) -> dict[str, Any]:
    document = read_json(directory / "config.json")
    if not isinstance(document, dict) or not isinstance(document.get("model_type"), str):
        raise HandoffError(f"{directory}/config.json names no model_type", "complete the file")
    return document


def _settings_of(document: dict[str, Any]) -> ModelConfig | None:
    """The configuration of our own architecture; None for another one, or a variant that our model does not compute."""
    if document["model_type"] != "deepseek_v3":
        return None
    try:
        return ModelConfig.from_hf(document)
    except BrokenConfigError:
        raise
    except ModelError:
        return None


def _refuse_unexplained(stored: TensorSource, directory: Path) -> None:
    for name in stored.names():
        if stored.dtype(name) in QUANTISED_DTYPES:
            dtype = str(stored.dtype(name)).removeprefix("torch.")
            raise HandoffError(
                f"{name} is {dtype} and {directory}/config.json has no quantization_config",
                "without it nobody knows what the numbers mean: copy the model's own config.json",
            )


def _check_complete(
    stored: TensorSource, document: dict[str, Any], settings: ModelConfig | None, directory: Path
) -> None:
    """Refuse a directory that lacks a tensor, where the architecture is known well enough to say so."""
    names = set(stored.names())
    if settings is None:
        check_tensors(document, {name: stored.shape(name) for name in names}, str(directory))
        return
    views = list(published_views(settings))
    missing = [view.published for view in views if view.published not in names and not view.shared]
    if missing:
        _refuse_promised_modules(missing, names, settings, directory)
        raise HandoffError(
            f"{directory} lacks {len(missing)} tensors, the first: {', '.join(missing[:4])}",
            "the download or conversion is incomplete, or config.json is another model's",
        )


def _refuse_promised_modules(missing: list[str], names: set[str], settings: ModelConfig, directory: Path) -> None:
    """transformers drops the modules of multi-token prediction when it saves, and keeps their number in config.json."""
    first, number = settings.num_hidden_layers, settings.num_nextn_predict_layers
    modules = tuple(f"model.layers.{first + index}." for index in range(number))
    if all(name.startswith(modules) for name in missing) and not any(name.startswith(modules) for name in names):
        raise HandoffError(
            f"{directory}/config.json has num_nextn_predict_layers = {number} and the files hold nothing of "
            f"model.layers.{first}: multi-token prediction was left out, as transformers does when it saves",
            "set num_nextn_predict_layers to 0 in config.json to hand the model off without it, or complete the files",
        )


def _tokenizer_files(directory: Path) -> list[Path]:
    """The tokenizer beside the weights, or that of the run the checkpoint lies in."""
    found = [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
    run = run_of(directory)
    if not found and run is not None and is_complete(run.tokenizer):
        found = [run.tokenizer / name for name in TOKENIZER_FILES if (run.tokenizer / name).is_file()]
    return found


def _files_of(directory: Path, weights: list[Path]) -> list[Path]:
    return [directory / "config.json", *weights]


def _generation_config(settings: ModelConfig | None) -> dict[str, Any] | None:
    if settings is None:
        return None
    ends = list(settings.eos_token_id) if isinstance(settings.eos_token_id, tuple) else settings.eos_token_id
    return {
        "bos_token_id": settings.bos_token_id,
        "eos_token_id": ends,
        "pad_token_id": settings.pad_token_id,
        "do_sample": False,
    }
