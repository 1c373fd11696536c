"""Where tensors are read from: safetensors files, a training checkpoint, and either seen through a layout."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch
from safetensors import safe_open

from crosschip.errors import HandoffError, RunDirectoryError
from crosschip.handoff.conversion.layout import Layout, TensorSource, run
from crosschip.handoff.conversion.operators import Tensors
from crosschip.model.weights import DCP_DIRECTORY, MODEL_PREFIX
from crosschip.rundir import read_json

__all__ = ["DTYPE_NAMES", "CheckpointSource", "LayoutSource", "SafetensorsSource"]

INDEX_FILE = "model.safetensors.index.json"

# Of the safetensors format; a dtype that torch has no like of cannot be converted and is refused by name.
DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class SafetensorsSource:
    """The `*.safetensors` files of a directory.

    A file is opened for each tensor and closed again: an open one stays mapped with all that was read from it, which
    would be the memory of a whole shard.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files = sorted(directory.glob("*.safetensors"))
        self._file_of: dict[str, Path] = {}
        self._facts: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        if not self.files:
            others = sorted(path.name for path in directory.glob("*.bin"))
            problem = f"{directory} has no *.safetensors file" + (f", but {others[0]}" if others else "")
            raise HandoffError(problem, "give a directory in Hugging Face layout; pickled weights are not read")
        for file in self.files:
            self._read_header(file)
        self._check_index()

    def names(self) -> Sequence[str]:
        """All names, file by file."""
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""
        return self._facts[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """The tensor's dtype."""
        return self._facts[name][1]

    def read(self, name: str) -> torch.Tensor:
        """The tensor, mapped from its file."""
        file = self._file_of[name]
        with self._opened(file) as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
        return tensor

    def _opened(self, file: Path) -> Any:
        try:
            return safe_open(file, framework="pt")
        except Exception as error:  # safetensors raises its own type for a cut or damaged header
            raise HandoffError(f"{file} cannot be read as safetensors: {error}", "copy or download it again") from None

    def _read_header(self, file: Path) -> None:
        with self._opened(file) as opened:
            for name in opened.keys():  # noqa: SIM118  (not a dict)
                if name in self._file_of:
                    raise HandoffError(
                        f"{name} is in both {self._file_of[name].name} and {file.name} of {self.directory}",
                        "remove the files of the other conversion",
                    )
                part = opened.get_slice(name)
                dtype = _DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise HandoffError(
                        f"{file}: {name} has dtype {part.get_dtype()}", "it is not converted here: use other weights"
                    )
                self._file_of[name] = file
                self._facts[name] = (tuple(part.get_shape()), dtype)

    def _check_index(self) -> None:
        index = self.directory / INDEX_FILE
        if not index.is_file():
            return
        try:
            weight_map = read_json(index)["weight_map"]
            planned = {name: str(file) for name, file in weight_map.items()}
        except (RunDirectoryError, KeyError, TypeError, AttributeError):
            raise HandoffError(f"{index} is damaged", "copy or download it again") from None
        found = {name: file.name for name, file in self._file_of.items()}
        for name in [*planned, *found]:
            if planned.get(name) != found.get(name):
                there, meant = found.get(name, "no file"), planned.get(name, "no file")
                raise HandoffError(
                    f"{name} is in {there}, {index.name} says {meant}",
                    "the download or conversion is incomplete, or files of another one lie beside it",
                )


class CheckpointSource:
    """The model's tensors of a training checkpoint, under our own names."""

    def __init__(self, directory: Path) -> None:
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        from crosschip.model.dcp import IndexReader  # takes a second

        self.directory = directory
        index = IndexReader(directory).read_metadata()
        entries = {name: each for name, each in index.state_dict_metadata.items() if name.startswith(MODEL_PREFIX)}
        tensors = {name: each for name, each in entries.items() if isinstance(each, TensorStorageMetadata)}
        self._facts = {
            name.removeprefix(MODEL_PREFIX): (tuple(entry.size), entry.properties.dtype)
            for name, entry in tensors.items()
        }
        whole = {name for name, entry in tensors.items() if len(entry.chunks) == 1}
        self._places = {
            each.fqn.removeprefix(MODEL_PREFIX): info
            for each, info in (index.storage_data or {}).items()
            if each.fqn in whole
        }

    def names(self) -> Sequence[str]:
        """All names."""
        return list(self._facts)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""
        return self._facts[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """The tensor's dtype."""
        return self._facts[name][1]

    def read(self, name: str) -> torch.Tensor:
        """The tensor, whole, whoever wrote parts of it. What one process wrote is in memory once, parts twice."""
        from crosschip.model.dcp import read_tensors

        written_whole = self._read_whole(name)
        if written_whole is not None:
            return written_whole

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # DCP remarks on each call that there is no process group
            return next(tensor for _, tensor in read_tensors(self.directory, [f"{MODEL_PREFIX}{name}"]))

    def _read_whole(self, name: str) -> torch.Tensor | None:
        """A tensor that lies in one piece, read where it will stay: PyTorch's reader fills another tensor from it.

        None where it does not, or cannot be read; PyTorch's reader says why.
        """
        from torch.distributed.checkpoint.utils import _create_file_view

        place = self._places.get(name)
        if place is None or getattr(place, "transform_descriptors", None):
            return None
        try:
            with (self.directory / DCP_DIRECTORY / place.relative_path).open("rb") as file:
                view = cast(IO[bytes], _create_file_view(file, place.offset, place.length))
                tensor = torch.load(view, map_location="cpu", weights_only=True)
        except Exception:  # a damaged file can raise anything
            return None
        facts = (tuple(tensor.shape), tensor.dtype) if isinstance(tensor, torch.Tensor) else None
        return tensor if facts == self._facts[name] else None


class LayoutSource:
    """Another source seen through a layout: its tensors as the layout's `forward` makes them.

    What an operator makes is held until it was read or another operator is needed.

    Raises:
        HandoffError: the source does not hold exactly what the layout takes.
    """

    def __init__(self, source: TensorSource, layout: Layout) -> None:
        layout.check_names(source)
        self._source, self._layout = source, layout
        self._operator_of = {name: each for each in layout.operators for name in each.outputs}
        self._facts: Tensors = {}
        for operator in layout.operators:
            self._facts |= layout.described(operator, source)
        self._held: Tensors = {}

    def names(self) -> Sequence[str]:
        """The layout's names on the target's side."""
        return self._layout.forward_names

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(self._facts[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """The tensor's dtype."""
        return self._facts[name].dtype

    def read(self, name: str) -> torch.Tensor:
        """The tensor; cheapest in the order of `names`."""
        if name not in self._held:
            self._held = {}  # before the next operator needs memory
            self._held = run(self._operator_of[name], self._source)
        return self._held.pop(name)
