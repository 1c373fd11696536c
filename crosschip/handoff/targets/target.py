"""What a target is, and what the Hugging Face family of targets shares in writing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from crosschip.handoff.conversion.declared import is_quantised_weight
from crosschip.handoff.conversion.layout import Layout, TensorSource
from crosschip.handoff.conversion.shards import SHARD_BYTES, Tell, write_shards
from crosschip.handoff.source import ModelSource
from crosschip.rundir import write_json

__all__ = ["Export", "Target", "kept_modules", "write_hugging_face", "written_config"]


class Export(Protocol):
    """Writes a target's files."""

    def __call__(
        self, source: ModelSource, directory: Path, dtype: str, tell: Tell, shard_bytes: int = SHARD_BYTES
    ) -> None:
        """Write weights, configuration and tokenizer of `source` into `directory`, which is under a temporary name.

        Raises:
            HandoffError: the source cannot take this form; the message says which tensor or field.
        """


@dataclass(frozen=True)
class Target:
    """A form that models are handed off in. `quantised` is its key in `crosschip.golden.limits.QUANTISED`.

    `check` refuses at once, by a HandoffError, a source whose configuration or tokenizer cannot take the form.
    """

    name: str
    dtypes: tuple[str, ...]  # the first one is the usual
    export: Export
    quantised: str | None
    words: str
    check: Callable[[ModelSource], None] = lambda source: None


def write_hugging_face(
    source: ModelSource,
    layout: Layout,
    directory: Path,
    dtype: str,
    tell: Tell,
    shard_bytes: int,
    quantization_config: dict[str, Any] | None = None,
) -> None:
    """Shards first, then the small files, which are quick to write again."""
    identity = {**source.identity(), "dtype": dtype, "quantization_config": quantization_config}
    write_shards(layout, source.tensors, directory, identity=identity, shard_bytes=shard_bytes, tell=tell)
    config = written_config(source, dtype)
    if quantization_config is not None:
        config["quantization_config"] = quantization_config
    write_json(directory / "config.json", config)
    if source.generation_config is not None:
        write_json(directory / "generation_config.json", source.generation_config)
    for file in source.tokenizer_files:
        shutil.copyfile(file, directory / file.name)


def kept_modules(tensors: TensorSource) -> list[str]:
    """The modules with a matrix that is not quantised, and the output even where it is tied to the embedding."""
    matrices = [name for name in tensors.names() if name.endswith(".weight") and len(tensors.shape(name)) == 2]
    modules = [name.removesuffix(".weight") for name in matrices if not is_quantised_weight(name)]
    return sorted({"lm_head", *(name for name in modules if not name.endswith("embed_tokens"))})


def written_config(source: ModelSource, dtype: str | None) -> dict[str, Any]:
    """The `config.json` of an export in `dtype`; None leaves the source's dtype as it is.

    `auto_map` names Python files of the source, which are not exported: readers would look for them and fail.
    """
    config = {key: value for key, value in source.config.items() if key != "auto_map"}
    if dtype is not None:
        named = [key for key in ("torch_dtype", "dtype") if key in config] or ["torch_dtype"]
        config |= dict.fromkeys(named, dtype)
    return config
