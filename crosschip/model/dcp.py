"""A training checkpoint's tensor files, written by `torch.distributed.checkpoint` (DCP), as tensors by name.

They are read here by one process, without a process group, whatever number of processes wrote them. Importing this
takes a second, so who may do without it imports it inside a function; `crosschip.model.weights` finds such directories.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from crosschip.errors import ModelError
from crosschip.model.weights import DCP_DIRECTORY

__all__ = ["IndexReader", "read_index", "read_into", "read_tensors"]

INDEX_FILE = ".metadata"
_AT_ONCE_BYTES = 256 << 20  # that many bytes are read in one call; each call parses the index anew

# One process that reads or writes alone is the ordinary case here, and DCP warns of it at every call.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

# The index is a pickle, and a pickle can name any function. These are what DCP's own indices name.
_ALLOWED = {
    ("collections", "OrderedDict"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
}


class _IndexUnpickler(pickle.Unpickler):
    """Refuses everything that an index does not consist of."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.startswith("torch.distributed.checkpoint.") and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:  # and not what that module imported
                return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no index of tensors needs")


class IndexReader(FileSystemReader):
    """DCP's reader of files, with an index that can hold data only."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory / DCP_DIRECTORY)
        self._directory = directory

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index.

        Raises:
            ModelError: it is missing or damaged.
        """
        file = self._directory / DCP_DIRECTORY / INDEX_FILE
        try:
            with file.open("rb") as opened:
                found = _load_index(opened)
        except OSError as error:
            raise ModelError(f"{file} cannot be read: {error}", "take another checkpoint of the run") from None
        except Exception as error:  # a damaged pickle can raise anything
            raise ModelError(f"{file} is damaged: {error}", "take another checkpoint of the run") from None
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


def _load_index(opened: IO[bytes]) -> Metadata:
    found = _IndexUnpickler(opened).load()
    if not isinstance(found, Metadata) or not isinstance(found.state_dict_metadata, dict):
        raise pickle.UnpicklingError(f"it holds {type(found).__name__}")
    return found


def read_index(directory: Path) -> dict[str, TensorStorageMetadata]:
    """What tensors the checkpoint `directory` holds: size, dtype and chunks by name.

    Raises:
        ModelError: the index is missing or damaged.
    """
    found = IndexReader(directory).read_metadata().state_dict_metadata
    return {name: entry for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}


def read_into(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Copy the named tensors from the checkpoint `directory` into `tensors`, whose dtype and device they take.

    Raises:
        ModelError: a tensor is missing or of another shape, or a file is missing or damaged.
    """
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        load(dict(tensors), storage_reader=IndexReader(directory), planner=planner, no_dist=True)
    except CheckpointException as error:
        raise ModelError(f"{directory}: {_first_cause(error)}", "take another checkpoint of the run") from error


def _first_cause(error: CheckpointException) -> str:
    causes = [cause for cause, _ in error.failures.values()]
    problems = [cause.problem if isinstance(cause, ModelError) else f"{cause}" for cause in causes]
    return problems[0] if problems else str(error)


def read_tensors(directory: Path, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors, whole and on the CPU, in the dtype they were saved in; few are in memory at once."""
    index = read_index(directory)
    waiting: dict[str, Tensor] = {}
    for name in names:
        entry = index[name]
        waiting[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
        if sum(tensor.nbytes for tensor in waiting.values()) >= _AT_ONCE_BYTES:
            read_into(directory, waiting)
            yield from waiting.items()
            waiting = {}
    if waiting:
        read_into(directory, waiting)
        yield from waiting.items()
