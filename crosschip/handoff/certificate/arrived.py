"""A handed-off directory as it will be read: its tensors under the published names, multiplied out, and its config."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosschip.errors import HandoffError
from crosschip.handoff.conversion.layout import TensorSource
from crosschip.handoff.source import ModelSource, open_source
from crosschip.handoff.targets import TARGETS

__all__ = ["Arrived", "open_arrived", "write_multiplied_out"]


@dataclass(frozen=True)
class Arrived:
    """What a directory holds. `is_as_published`: transformers and our model read it as it lies."""

    tensors: TensorSource
    config: dict[str, Any]
    directory: Path
    is_as_published: bool


def open_arrived(directory: Path, like: dict[str, Any] | None = None) -> Arrived:
    """Open a directory in Hugging Face layout, or one with a GGUF file, whose tensors then lie as `like` says: the
    config.json of what was exported.

    Raises:
        HandoffError: there is no model in it, or it cannot be read back.
        ModelError: the same, of what the model's own reader reads.
    """
    files = sorted(directory.glob("*.gguf"))
    if not files:
        opened = open_source(directory)
        return Arrived(opened.tensors, opened.config, directory, opened.quantised is None)
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise HandoffError(f"{directory} has {len(files)} GGUF files: {names}", "keep one in each directory")
    from crosschip.handoff.gguf.reading import imported

    tensors, config = imported(files[0], like)
    return Arrived(tensors, config, directory, False)


def write_multiplied_out(arrived: Arrived, directory: Path) -> None:
    """Write what was read back as a plain directory in fp32, for engines that do not read the files' own form.

    Raises:
        HandoffError: it cannot be written.
    """
    plain = ModelSource(arrived.tensors, arrived.config, [], str(arrived.directory), arrived.directory, [])
    directory.mkdir(parents=True, exist_ok=True)
    TARGETS["hf"].export(plain, directory, "float32", lambda line: None)
