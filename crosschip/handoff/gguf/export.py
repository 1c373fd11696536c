"""A model as one GGUF file with everything in it: tensors, fields, tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import crosschip
from crosschip.errors import HandoffError
from crosschip.handoff.conversion.layout import TensorSource
from crosschip.handoff.gguf.architectures import architecture_of
from crosschip.handoff.gguf.metadata import Metadata
from crosschip.handoff.gguf.reading import GgufSource
from crosschip.handoff.gguf.tokenizer import TokenizerDocument, tokenizer_metadata
from crosschip.handoff.gguf.writing import FILE_TYPES, write_gguf

__all__ = ["Planned", "differing_keys", "export_gguf", "plan_gguf"]

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Planned:
    """What a file will hold: the architecture, its keys, the tensors that are not taken, and what is lost, in words."""

    architecture: str
    metadata: Metadata
    not_taken: list[str]
    notes: list[str]


def plan_gguf(names: Collection[str], config: dict[str, Any], tokenizer_files: Sequence[Path], title: str) -> Planned:
    """Everything but the numbers.

    Raises:
        HandoffError: llama.cpp cannot express the configuration or the tokenizer; the message names what.
    """
    architecture = architecture_of(config)
    architecture.check(config)
    not_taken, notes = architecture.left_out(config, names)
    of_tokenizer, more_notes = tokenizer_metadata(TokenizerDocument.read(tokenizer_files), config)
    metadata: Metadata = {
        "general.type": "model",
        "general.name": title,
        "general.quantized_by": f"crosschip {crosschip.__version__}",
        "general.quantization_version": 2,  # of ggml's forms, which Q8_0 has not left since
        **architecture.metadata_of(config),
        **of_tokenizer,
    }
    return Planned(architecture.name, metadata, not_taken, [*notes, *more_notes])


def export_gguf(
    tensors: TensorSource,
    config: dict[str, Any],
    tokenizer_files: Sequence[Path],
    path: Path,
    dtype: str,
    *,
    title: str = "crosschip",
    tell: Tell = lambda line: None,
) -> list[str]:
    """Write the file `path` and say what it does not carry over.

    Args:
        tensors: under the published names, not quantised.
        config: `config.json` as a document.
        tokenizer_files: among them `tokenizer.json`.
        path: of the file; none may be there.
        dtype: of the matrices: float32, bfloat16 or q8_0.
        title: the model's name in the file.
        tell: gets a line now and then.

    Raises:
        HandoffError: llama.cpp cannot express the model (the message names the field), or the source is not complete.
    """
    if dtype not in FILE_TYPES:
        raise HandoffError(f"a GGUF file of {dtype!r} is not written here", f"choose among {', '.join(FILE_TYPES)}")
    planned = plan_gguf(tensors.names(), config, tokenizer_files, title)
    taken = _Without(tensors, set(planned.not_taken))
    layout = architecture_of(config).layout(config, taken.names())
    write_gguf(path, planned.architecture, planned.metadata, layout, taken, dtype, tell)
    for note in planned.notes:
        tell(f"not in the file: {note}")
    return planned.notes


def differing_keys(path: Path, config: dict[str, Any], tokenizer_files: Sequence[Path]) -> list[str]:
    """Every key of a file that is not what this model's would be, in words that begin with it; no tensor is read.

    A key of the tokenizer that is too many counts as well: an end token more ends answers.

    Raises:
        HandoffError: the file cannot be read, or the model cannot be a GGUF file at all.
    """
    source = GgufSource(path)
    planned = plan_gguf((), config, tokenizer_files, "")
    expected = {"general.architecture": planned.architecture, **planned.metadata}
    found = source.metadata
    free = ("general.name", "general.quantized_by")
    surplus = [key for key in found if key.startswith("tokenizer.") and key not in expected]
    return [
        f"{key} is {_shown(found.get(key))}, the model means {_shown(expected.get(key))}"
        for key in (*expected, *surplus)
        if key not in free and found.get(key) != expected.get(key)
    ]


def _shown(value: Any) -> str:
    words = repr(value)
    return words if len(words) < 80 else f"{words[:70]}... ({len(value)})"


class _Without:
    """A source without some of its tensors."""

    def __init__(self, source: TensorSource, hidden: set[str]) -> None:
        self._source = source
        self._names = [name for name in source.names() if name not in hidden]

    def names(self) -> Sequence[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(name)

    def read(self, name: str) -> torch.Tensor:
        return self._source.read(name)
