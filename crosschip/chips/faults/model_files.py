"""A model directory as faults change it: its tensors in safetensors files, its index, its JSON documents.

A changed file is written beside the old one and renamed, so a fault leaves no half file behind that nobody planted.
"""

from __future__ import annotations

import fnmatch
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from crosschip.errors import ChipError

__all__ = ["ModelFiles", "plant_files", "read_document", "write_document"]

_INDEX = "model.safetensors.index.json"


class ModelFiles:
    """The tensors of a model directory: where each lies, and how it is replaced.

    Raises:
        ChipError: there is no such directory, or a file cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise ChipError(f"there is no directory {directory} to plant a fault in", "hand a model off first")
        self.directory = directory
        self.place: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for file in sorted(directory.glob("*.safetensors")):
            with _opened(file) as opened:
                for name in opened.keys():  # noqa: SIM118  (not a dict)
                    found = opened.get_slice(name)
                    self.place[name], self.shapes[name] = file, tuple(found.get_shape())
                    self.dtypes[name] = found.get_dtype()

    def matching(self, patterns: str | Sequence[str], fits: Callable[[str], bool] = lambda name: True) -> list[str]:
        """The tensors whose names match a pattern such as `*q_proj.weight`, in order."""
        wanted = [patterns] if isinstance(patterns, str) else patterns
        return sorted(name for name in self.place if any(fnmatch.fnmatch(name, each) for each in wanted) and fits(name))

    def read(self, name: str) -> Tensor:
        """One tensor."""
        with _opened(self.place[name]) as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor

    def replace(self, changes: Mapping[str, Tensor | None]) -> None:
        """Write other tensors under these names; None takes a tensor out, of the index as well."""
        for file in {self.place[name] for name in changes}:
            with _opened(file) as opened:
                metadata = opened.metadata()
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            for name in tensors.keys() & changes.keys():
                new = changes[name]
                tensors[name] = tensors[name] if new is None else new.contiguous()
            kept = {name: each for name, each in tensors.items() if changes.get(name, each) is not None}
            temporary = file.with_name(f".{file.name}.tmp")
            save_file(kept, temporary, metadata=metadata)
            temporary.replace(file)
        self._forget([name for name, tensor in changes.items() if tensor is None])

    def relabel(self, dtype: str, other: str) -> list[str]:
        """Write `other` for a dtype in the files' headers; the bytes stay. Returns the tensors' names."""
        changed = [name for name in sorted(self.place) if self.dtypes[name] == dtype]
        for file in {self.place[name] for name in changed}:
            data = file.read_bytes()
            (length,) = struct.unpack("<Q", data[:8])
            header = json.loads(data[8 : 8 + length])
            for name, entry in header.items():
                if name != "__metadata__" and entry["dtype"] == dtype:
                    entry["dtype"] = other
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
            temporary = file.with_name(f".{file.name}.tmp")
            temporary.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
            temporary.replace(file)
        return changed

    def _forget(self, names: list[str]) -> None:
        index = self.directory / _INDEX
        for name in names:
            del self.place[name]
        if names and index.is_file():
            document = read_document(index)
            for name in names:
                document.get("weight_map", {}).pop(name, None)
            write_document(index, document)


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ChipError(f"{file} cannot be read as safetensors: {error}", "make it again before planting") from None


def read_document(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ChipError: the file is none.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ChipError(f"{file} cannot be read as JSON: {error}", "make it again before planting") from None
    if not isinstance(document, dict):
        raise ChipError(f"{file} holds a {type(document).__name__}", "make it again before planting")
    return document


def write_document(file: Path, document: dict[str, Any]) -> None:
    """Write a JSON object in the place of a file."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(file)


def plant_files(faults: Sequence[Any], directory: Path) -> dict[str, list[str]]:
    """Let every fault that acts on files change the directory, in their order; what each changed, by its name.

    An empty list says that the fault found nothing to change, so that the model is as it was: not applicable.

    Raises:
        ChipError: a fault does not act on files, or the directory cannot be read.
    """
    changed: dict[str, list[str]] = {}
    for fault in faults:
        if not hasattr(fault, "files"):
            problem = f"the fault {fault.name} acts on a chip and not on files"
            raise ChipError(problem, "plant it with --chip sim:..., or name a fault of files such as H1")
        changed[fault.name] = [*changed.get(fault.name, []), *fault.files(directory)]
    return changed
