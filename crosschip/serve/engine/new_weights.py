"""Other weights for a running engine: refused by what lies beside them before anything large is read, then prepared.

The engine goes on with the tokenizer, the chat template and the settings that it was started with, so a directory that
has others is another model, whatever its weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from crosschip.chips import Chip, in_passing_thread
from crosschip.data import load_tokenizer
from crosschip.errors import CrosschipError, ModelError, ServeError
from crosschip.model import Decoder, ModelConfig, Transformer, load_model, read_config
from crosschip.rundir import read_json
from crosschip.serve.documents import read_object
from crosschip.serve.engine.blocks import BLOCK_TOKENS
from crosschip.serve.engine.engine import EngineInfo, PreparedWeights
from crosschip.serve.engine.manifest import check_manifest
from crosschip.serve.engine.overwrite import probe_scores
from crosschip.serve.engine.runner import Runner

__all__ = ["WeightsPreparer"]

_START_ANEW = "start a new server with the directory"
_OF_TOOLS = ("transformers_version", "_from_model_config")  # say who wrote a file, not what holds


class WeightsPreparer:
    """Loads new weights beside the old ones, and refuses those that are not of this engine's model.

    Args:
        config: the engine's model.
        first: the directory that the engine was started on, read now.
        chip: where it computes.
        info: what else it was started with.
    """

    def __init__(self, config: ModelConfig, first: Path, chip: Chip, info: EngineInfo) -> None:
        self._config, self._first, self._chip, self._info = config, first, chip, info
        self._tokenizer, self._beside = _tokenizer_bytes(first), dict(_beside(first))

    def check(self, directory: Path) -> None:
        """What can be seen without reading the weights.

        Raises:
            ServeError, ModelError: it cannot be read, or is of another model.
        """
        try:
            if not directory.is_dir():
                directory.stat()  # says why, where there is nothing
                raise ServeError(f"{_short(directory)} is no directory", "give the directory of a model")
            self._check_config(directory)
            self._check_beside(directory)
        except OSError as error:
            raise _unreadable(directory, error) from None
        except RecursionError:
            raise ServeError(f"{directory}: a JSON file is nested too deep to be read", "write it anew") from None

    @in_passing_thread
    def prepare(self, directory: Path) -> PreparedWeights:
        """Load, after `check`.

        Raises:
            ServeError, ModelError: as `check`, or weights that cannot be taken, or are not those of their manifest.
        """
        self.check(directory)
        info, dtype = self._info, getattr(torch, self._info.dtype)
        try:
            check_manifest(directory)
            model = load_model(directory, dtype=dtype, device=self._chip.device)
            _refuse_non_finite(directory, model)
            decoder = Decoder(model, dtype=dtype, by_kernels=True)
            # With as many rows as the engine has: their number decides the calls of the deterministic mode.
            short = min(BLOCK_TOKENS, self._config.max_position_embeddings)
            alone = Runner(decoder, info.max_batch_size, short, self._chip.device, 1, info.deterministic)
            return PreparedWeights(decoder, probe_scores(alone, self._config.vocab_size))
        except OSError as error:
            raise _unreadable(directory, error) from None
        except (RuntimeError, MemoryError) as error:  # torch's out-of-memory errors are RuntimeErrors
            problem = f"{directory} cannot be loaded beside the weights that are served: {error}"
            raise ServeError(problem, "free memory, or " + _START_ANEW) from error

    def _check_config(self, directory: Path) -> None:
        """Whole numbers first, as they stand there: what follows counts layers."""
        path = directory / "config.json"
        document = read_json(path) if path.is_file() else None  # its absence is told by `read_config`
        numbers = {each.name: getattr(self._config, each.name) for each in fields(ModelConfig)}
        for name, value in document.items() if isinstance(document, dict) else ():
            if type(value) is int and type(numbers.get(name)) is int and name not in _UNIMPORTANT:
                self._refuse_other(directory, name, value, numbers[name])
        config = read_config(directory)[0]
        new, old = _numbers(config), _numbers(self._config)
        for name, value in vars(new).items():
            self._refuse_other(directory, name, value, getattr(old, name))
        ends = _ends(config), _ends(self._config)
        if all(ends) and ends[0] != ends[1]:  # answers would end as the old model's do
            self._refuse_other(directory, "eos_token_id", config.eos_token_id, self._config.eos_token_id)

    def _check_beside(self, directory: Path) -> None:
        if _tokenizer_bytes(directory) != self._tokenizer:
            raise ServeError(f"{directory}: tokenizer.json is not that of {self._first}", _START_ANEW)
        for name, value in _beside(directory):
            if value != self._beside.get(name):
                raise ServeError(f"{directory}: {name} is not that of {self._first}, which is served", _START_ANEW)

    @staticmethod
    def _refuse_other(directory: Path, name: str, new: Any, old: Any) -> None:
        if new != old:
            raise ServeError(f"{directory}: {name} is {new!r}, the engine's model has {old!r}", _START_ANEW)


_UNIMPORTANT = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")  # for how logits are computed


def _numbers(config: ModelConfig) -> ModelConfig:
    return replace(config, bos_token_id=None, eos_token_id=None, pad_token_id=None, initializer_range=0.0)


def _ends(config: ModelConfig) -> set[int]:
    """The tokens that end an answer, where the configuration says so."""
    ends = config.eos_token_id
    return set() if ends is None else set(ends) if isinstance(ends, tuple) else {ends}


def _refuse_non_finite(directory: Path, model: Transformer) -> None:
    for name, tensor in model.state_dict().items():
        if not bool(tensor.isfinite().all()):
            raise ModelError(f"{directory}: {name} holds NaN or infinity", "take a checkpoint from before that")


def _beside(directory: Path) -> Iterator[tuple[str, Any]]:
    """What a directory says about prompts and sampling, by the names of the files; what it does not say is left out."""
    # What training publishes has the special tokens of both files in the first one.
    config = read_object(directory / "tokenizer_config.json"), read_object(directory / "special_tokens_map.json")
    if config != (None, None):
        joined = (config[1] or {}) | (config[0] or {})
        yield "tokenizer_config.json", {name: value for name, value in joined.items() if name != "chat_template"}
    if (template := _template(directory)) is not None:
        yield "the chat template (chat_template.jinja)", template
    generation = read_object(directory / "generation_config.json")
    if generation is not None:
        yield "generation_config.json", {name: value for name, value in generation.items() if name not in _OF_TOOLS}


def _template(directory: Path) -> str | None:
    """The chat template, wherever the directory keeps it; None without one, and where the tokenizer cannot chat."""
    try:
        return load_tokenizer(directory).chat_template
    except CrosschipError:  # of the directory that is served the same was said when it was loaded
        return None


def _tokenizer_bytes(directory: Path) -> bytes | None:
    path = directory / "tokenizer.json"
    return path.read_bytes() if path.is_file() else None


def _unreadable(directory: Path, error: OSError) -> ServeError:
    return ServeError(f"{_short(directory)} cannot be read: {error.strerror or error}", "give a model's directory")


def _short(directory: Path) -> str:
    text = str(directory)
    return text if len(text) <= 300 else f"{text[:300]}..."
