"""A GGUF file read back: its keys, and its tensors under llama.cpp's names or, imported, under the published ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType, GGUFReader

from crosschip.errors import HandoffError
from crosschip.handoff.conversion.layout import TensorSource
from crosschip.handoff.conversion.sources import LayoutSource
from crosschip.handoff.gguf.architectures import architecture_named
from crosschip.handoff.gguf.encoding import decoded
from crosschip.handoff.gguf.llama import FACTORS, MODEL_TYPES
from crosschip.handoff.gguf.metadata import Metadata
from crosschip.handoff.gguf.rotary import ROPE_FIELDS, rope_of

__all__ = ["GgufSource", "imported", "imported_from"]

_DTYPES = {GGMLQuantizationType.BF16: torch.bfloat16, GGMLQuantizationType.F16: torch.float16}


class GgufSource:
    """The tensors of one file, under llama.cpp's names. Shapes are torch's: the last dimension is the rows' length.

    Raises:
        HandoffError: the file is missing, cut, or no GGUF.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._reader = GGUFReader(path)
        except (OSError, ValueError, KeyError, IndexError, UnicodeDecodeError, OverflowError) as error:
            problem = f"{path} cannot be read as GGUF: {type(error).__name__} {error}"
            raise HandoffError(problem, "copy it again, or convert the model again") from None
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        end = max((int(each.data_offset) + int(each.n_bytes) for each in self._reader.tensors), default=0)
        if path.stat().st_size < end:
            raise HandoffError(f"{path} was cut: {path.stat().st_size} B of {end}", "copy it again")

    @property
    def metadata(self) -> Metadata:
        """All keys with their values."""
        return {
            name: field.contents()
            for name, field in self._reader.fields.items()
            if not name.startswith("GGUF.")  # the header's own
        }

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""
        return str(self.metadata.get("general.architecture"))

    def names(self) -> Sequence[str]:
        """All names in the file's order."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(int(each) for each in reversed(self._tensors[name].shape))

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which `read` gives the tensor: fp32 for Q8_0."""
        return _DTYPES.get(self._tensors[name].tensor_type, torch.float32)

    def kind(self, name: str) -> str:
        """How the file keeps the tensor: F32, BF16, Q8_0."""
        return str(self._tensors[name].tensor_type.name)

    def read(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU."""
        found = self._tensors[name]
        return decoded(name, found.data, self.shape(name), found.tensor_type)


def imported(path: Path, like: dict[str, Any] | None = None) -> tuple[TensorSource, dict[str, Any]]:
    """The file's tensors under the published names, and the config.json that its keys mean.

    What the export left out (multi-token prediction) is not there. With `like`, fields of the config.json of the model
    that was exported, tensors lie as that one says (rotary parts in halves or in pairs), and factors of rotary
    positions have the scaling that it names, if they are that one's; else as the file has them.

    Raises:
        HandoffError: the file cannot be read, its architecture is not known here, or tensors are missing or too many.
    """
    return imported_from(GgufSource(path), like)


def imported_from(source: GgufSource, like: dict[str, Any] | None = None) -> tuple[TensorSource, dict[str, Any]]:
    """The same of a file that is open.

    Raises:
        HandoffError: its architecture is not known here, or tensors are missing or too many.
    """
    architecture = architecture_named(source.architecture)
    config = architecture.fields_of(source.metadata)
    names = {"lm_head.weight"} if "output.weight" in source.names() else set[str]()
    config["tie_word_embeddings"] = not names
    config |= _scaling_of_factors(source, config, like or {})
    like = {key: value for key, value in (like or {}).items() if key not in ROPE_FIELDS}  # what is read counts
    layout = architecture.layout({**config, **like}, names)
    read_back = LayoutSource(source, layout.inverse)
    for operator in layout.operators:
        if not operator.inputs:  # it makes nothing on the way back, so nobody would read what it looks at
            operator.backward({name: source.read(name) for name in operator.outputs})
    return read_back, config


def _scaling_of_factors(source: GgufSource, config: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """The scaling of rotary positions that `like` knows, where the file has its factors alone, as llama.cpp writes it.

    Raises:
        HandoffError: it knows one, and the file has none.
    """
    if config.get("rope_scaling") or config["model_type"] not in MODEL_TYPES:
        return {}
    rope = rope_of({key: like[key] for key in ROPE_FIELDS if key in like})
    if rope.kind != "llama3":
        return {}
    if FACTORS not in source.names():
        raise HandoffError(
            f"{FACTORS} is missing, and rope_scaling of the model is of the kind llama3", "convert the model again"
        )
    return {"rope_scaling": {"rope_type": rope.kind, **rope.scaling}}
