"""A handed-off directory as it will be read: its tensors under the published names, multiplied out, and its config."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosschip.errors import HandoffError
from crosschip.golden.bundle import Bundle
from crosschip.handoff.conversion.layout import TensorSource
from crosschip.handoff.conversion.rotary_pairs import FIELD, in_halves, lies_in_pairs
from crosschip.handoff.source import ModelSource, open_source
from crosschip.handoff.targets import TARGETS

__all__ = ["Arrived", "open_arrived", "recorded_form", "write_multiplied_out"]


# Of the recorded configuration: what says how tensors lie, and what a GGUF file of llama.cpp's own has no key for.
_OF_FORM = (FIELD, "rope_theta", "rope_scaling", "rope_parameters")


def recorded_form(bundle: Bundle) -> dict[str, Any]:
    """The fields of the recorded configuration that files are read by; what a file says itself is not among them."""
    recorded = bundle.manifest["config"]
    return {field: recorded[field] for field in _OF_FORM if field in recorded}


@dataclass(frozen=True)
class Arrived:
    """What a directory holds, and which target its form is that of."""

    tensors: TensorSource
    config: dict[str, Any]
    directory: Path
    target: str

    @property
    def is_as_published(self) -> bool:
        """Whether transformers and our model read it as it lies."""
        return self.target == "hf"


def open_arrived(directory: Path, like: dict[str, Any] | None = None) -> Arrived:
    """Open a directory in Hugging Face layout, or one with a GGUF file.

    Tensors are seen as they lie in the model that was exported or recorded, of whose configuration `like` holds all or
    some fields: where it has rotary parts in halves, and the files have them in pairs, as exports do, they are turned
    back.

    Raises:
        HandoffError: there is no model in it, or it cannot be read back.
        ModelError: the same, of what the model's own reader reads.
    """
    files = sorted(directory.glob("*.gguf"))
    if not files:
        opened = open_source(directory)
        target = "hf" if opened.quantised is None else opened.quantised.kind
        if like is None or like.get(FIELD) is not False or not lies_in_pairs(opened.config):
            return Arrived(opened.tensors, opened.config, directory, target)
        config = {**opened.config, FIELD: False}
        return Arrived(in_halves(opened.tensors, config), config, directory, target)
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise HandoffError(f"{directory} has {len(files)} GGUF files: {names}", "keep one in each directory")
    from crosschip.handoff.gguf.reading import GgufSource, imported_from

    file = GgufSource(files[0])
    is_q8_0 = any(file.kind(name) == "Q8_0" for name in file.names())
    tensors, config = imported_from(file, like)
    if like is not None and FIELD in like and FIELD in config:
        config[FIELD] = like[FIELD]
    return Arrived(tensors, config, directory, "gguf-q8_0" if is_q8_0 else "gguf")


def write_multiplied_out(arrived: Arrived, directory: Path) -> None:
    """Write what was read back as a plain directory in fp32, for engines that do not read the files' own form.

    Raises:
        HandoffError: it cannot be written.
    """
    plain = ModelSource(arrived.tensors, arrived.config, [], str(arrived.directory), arrived.directory, [])
    directory.mkdir(parents=True, exist_ok=True)
    TARGETS["hf"].export(plain, directory, "float32", lambda line: None)
