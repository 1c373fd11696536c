"""What a bundle knows of the weights it was made for: for each tensor its hash and statistics that tell its order.

Hashes say *that* a tensor differs; norms of rows and columns, with their places and without, say *how*: permuted rows,
a transposed expert, a factor. Histograms and checksums of a transfer show none of that.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from crosschip.errors import GoldenError
from crosschip.model import load_model
from crosschip.model.weights import exported_tensors, is_training_checkpoint

__all__ = ["TensorRecord", "WeightDifference", "compare_weights", "records_of", "tensor_record"]

# Sums of the same numbers in another order, in fp64, differ by less.
_SAME = 1e-9


@dataclass(frozen=True)
class TensorRecord:
    """One tensor. `rows` and `columns` weigh each row's or column's norm by its place, `sorted_...` by its rank."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str
    sha256_bf16: str  # of the tensor rounded to bf16: an export in bf16 is the same model
    sum_squares: float
    rows: float
    columns: float
    sorted_rows: float
    sorted_columns: float

    def document(self) -> dict[str, Any]:
        """The record for JSON."""
        return asdict(self)

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> TensorRecord:
        """Read a record back."""
        return cls(**{**document, "shape": tuple(document["shape"])})


@dataclass(frozen=True)
class WeightDifference:
    """A tensor that is not the recorded one, and how it differs, in words."""

    tensor: str
    kind: Literal["missing", "surplus", "shape", "rows permuted", "columns permuted", "transposed", "scaled", "other"]
    words: str

    @property
    def is_same_numbers(self) -> bool:
        """Whether the tensor holds the recorded numbers in another order, so that it is the same model, converted."""
        return self.kind in ("rows permuted", "columns permuted", "transposed")


def records_of(directory: Path) -> dict[str, TensorRecord]:
    """A record of every tensor of a model directory, in the published names.

    Raises:
        GoldenError: it has no weights, or a file cannot be read.
    """
    from safetensors import safe_open

    if is_training_checkpoint(directory):
        return {name: tensor_record(tensor) for name, tensor in exported_tensors(load_model(directory))}
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise GoldenError(f"{directory} has no *.safetensors file", "give a model directory in the published layout")
    found = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (not a dict)
                    found[name] = tensor_record(opened.get_tensor(name))
        except Exception as error:  # safetensors raises its own type for a cut or damaged header
            raise GoldenError(f"{file} cannot be read as safetensors: {error}", "copy or make it again") from None
    return found


def tensor_record(tensor: Tensor) -> TensorRecord:
    """The record of one tensor."""
    floats = tensor.double() if tensor.dtype.is_floating_point else tensor.to(torch.float64)
    matrix = floats.reshape(floats.shape[0], -1) if floats.dim() > 1 else floats.reshape(-1, 1)
    row_norms, column_norms = matrix.norm(dim=1), matrix.norm(dim=0)
    return TensorRecord(
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        sha256=_hash(tensor),
        sha256_bf16=_hash(tensor.to(torch.bfloat16)) if tensor.dtype.is_floating_point else "",
        sum_squares=float(matrix.square().sum()),
        rows=_weighed(row_norms),
        columns=_weighed(column_norms),
        sorted_rows=_weighed(row_norms.sort().values),
        sorted_columns=_weighed(column_norms.sort().values),
    )


def _weighed(values: Tensor) -> float:
    """The values weighed by their places, irregularly so that an exchange of two shows whichever they are."""
    places = torch.arange(1, len(values) + 1, dtype=torch.float64)
    return float((values * (1.5 + torch.sin(places * places))).sum())


def _hash(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def compare_weights(recorded: dict[str, TensorRecord], found: dict[str, TensorRecord]) -> list[WeightDifference]:
    """Every tensor that is not the recorded one. A tensor rounded to bf16 is."""
    differences = []
    for name, record in recorded.items():
        if name not in found:
            differences.append(WeightDifference(name, "missing", f"{name} is missing"))
        elif not _is_same(record, found[name]):
            differences.append(_how(name, record, found[name]))
    surplus = [name for name in found if name not in recorded]
    words = "was not there when the bundle was recorded"
    return differences + [WeightDifference(name, "surplus", f"{name} {words}") for name in surplus]


def _is_same(recorded: TensorRecord, found: TensorRecord) -> bool:
    if recorded.shape != found.shape:
        return False
    if recorded.dtype == found.dtype:
        return recorded.sha256 == found.sha256
    return "bfloat16" in (recorded.dtype, found.dtype) and recorded.sha256_bf16 == found.sha256_bf16 != ""


def _how(name: str, recorded: TensorRecord, found: TensorRecord) -> WeightDifference:
    is_transposed = _close(recorded.rows, found.columns) and _close(recorded.columns, found.rows)
    if is_transposed and sorted(recorded.shape) == sorted(found.shape):
        return WeightDifference(name, "transposed", f"{name} is transposed: its rows are the recorded columns")
    if recorded.shape != found.shape:
        words = f"{name} has shape {list(found.shape)}, recorded {list(recorded.shape)}"
        return WeightDifference(name, "shape", words)
    rows_stay, columns_stay = _close(recorded.rows, found.rows), _close(recorded.columns, found.columns)
    if _close(recorded.sorted_rows, found.sorted_rows) and columns_stay and not rows_stay:
        return WeightDifference(name, "rows permuted", f"{name} has the recorded rows in another order")
    if _close(recorded.sorted_columns, found.sorted_columns) and rows_stay and not columns_stay:
        return WeightDifference(name, "columns permuted", f"{name} has the recorded columns in another order")
    factor = (found.sum_squares / recorded.sum_squares) ** 0.5 if recorded.sum_squares > 0 else 1.0
    is_scaled = _close(recorded.rows * factor, found.rows) and _close(recorded.columns * factor, found.columns)
    if is_scaled and not _close(factor, 1.0):
        return WeightDifference(name, "scaled", f"{name} is the recorded tensor times {factor:.6g}")
    norms = f"{found.sum_squares**0.5:.6g}, recorded {recorded.sum_squares**0.5:.6g}"
    return WeightDifference(name, "other", f"{name} holds other numbers (norm {norms})")


def _close(one: float, other: float) -> bool:
    return abs(one - other) <= _SAME * max(abs(one), abs(other), 1e-300)
