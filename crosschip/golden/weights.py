"""What a bundle knows of the weights it was made for: for each tensor its hash and statistics that tell its order.

Hashes say *that* a tensor differs; norms of rows and columns, with their places and without, say *how*: permuted rows,
a transposed expert, a factor. Histograms and checksums of a transfer show none of that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from crosschip.errors import GoldenError, ModelError, RunDirectoryError
from crosschip.model import load_model
from crosschip.model.quantised import (
    FP8_DTYPES,
    QUANTISED_DTYPES,
    check_dialect,
    dequantise,
    quantisation_of,
    rounding_steps,
    scale_name,
)
from crosschip.model.weights import exported_tensors, is_training_checkpoint
from crosschip.rundir import read_json

__all__ = ["Rounding", "TensorRecord", "WeightDifference", "compare_weights", "records_of", "tensor_record"]

# Sums of the same numbers in another order, in fp64, differ by less.
_SAME = 1e-9
# Of rounding noise, which is a sum of many small independent parts: one in a billion honest tensors is further away.
_DEVIATIONS = 6.0
_NUM_PROJECTIONS = 6
_AT_ONCE = 1 << 22  # numbers of a tensor: 32 MiB in fp64


@dataclass(frozen=True)
class Rounding:
    """What rounding to a coarse format does to the statistics of a tensor.

    Numbers lie evenly in the step that they are rounded to, but for the steps at zero and beside it: all there may lie
    at its lower end. What that would take away is `..._slack`.
    """

    norm: float  # the most that the norm of the error can be
    rows: Shift
    columns: Shift
    projections: tuple[float, ...]  # their standard deviations
    sum_squares: float  # what is lost of it
    sum_squares_slack: float


@dataclass(frozen=True)
class Shift:
    """How much smaller a statistic becomes, by how much that is uncertain, and the noise on top."""

    lost: float
    slack: float
    deviation: float


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
    projections: tuple[float, ...] = ()  # on irregular signs of rows and columns; older bundles are without
    # Of a tensor that is compared, never of a recorded one: what rounding to 8 bits did, and the hash of fp32 in fp16.
    rounding: Rounding | None = None
    sha256_fp16: str = ""  # where fp16 holds the same numbers: an export of a model in fp16 is in fp32

    def document(self) -> dict[str, Any]:
        """The record for JSON."""
        return {key: value for key, value in asdict(self).items() if key not in ("rounding", "sha256_fp16")}

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> TensorRecord:
        """Read a record back."""
        lists = {"shape": tuple(document["shape"]), "projections": tuple(document.get("projections", ()))}
        return cls(**{**document, **lists})


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
    """A record of every tensor of a model directory, in the published names; weights in 8 bits are multiplied out.

    Raises:
        GoldenError: it has no weights, a file cannot be read, or a tensor is there twice.
    """
    if is_training_checkpoint(directory):
        return {name: tensor_record(tensor) for name, tensor in exported_tensors(load_model(directory))}
    file_of = _files_of_names(directory)
    block = _block_of(directory)
    scales = {f"{name}{end}" for name in file_of for end in ("_scale_inv", "_scale") if f"{name}{end}" in file_of}
    found = {}
    for name in [name for name in file_of if name not in scales]:
        tensor = _read(file_of[name], name)
        scale = scale_name(name, tensor.dtype)
        if tensor.dtype not in QUANTISED_DTYPES:
            found[name] = tensor_record(tensor)
        elif scale in scales:
            found[name] = _quantised_record(name, tensor, _read(file_of[scale], scale), block)
            scales.remove(scale)
        else:
            found[name] = tensor_record(tensor.view(torch.int8))
    return found | {name: tensor_record(_read(file_of[name], name)) for name in sorted(scales)}


def _files_of_names(directory: Path) -> dict[str, Path]:
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise GoldenError(f"{directory} has no *.safetensors file", "give a model directory in the published layout")
    file_of: dict[str, Path] = {}
    for file in files:
        for name in _opened(file).keys():  # noqa: SIM118  (not a dict)
            if name in file_of:
                there = f"{name} is in both {file_of[name].name} and {file.name} of {directory}"
                raise GoldenError(there, "remove the files of the other conversion")
            file_of[name] = file
    return file_of


def _opened(file: Path) -> Any:
    from safetensors import safe_open

    try:
        return safe_open(file, framework="pt")
    except Exception as error:  # safetensors raises its own type for a cut or damaged header
        raise GoldenError(f"{file} cannot be read as safetensors: {error}", "copy or make it again") from None


def _read(file: Path, name: str) -> Tensor:
    tensor: Tensor = _opened(file).get_tensor(name)
    return tensor


def _block_of(directory: Path) -> tuple[int, int]:
    """The block size of FP8 scales, as config.json says; another kind of quantisation is the model's own to refuse."""
    try:
        how = quantisation_of(read_json(directory / "config.json"))
    except (ModelError, RunDirectoryError):
        how = None
    return how.block if how else (128, 128)


def _quantised_record(name: str, codes: Tensor, scale: Tensor, block: tuple[int, int]) -> TensorRecord:
    try:
        if codes.dtype in FP8_DTYPES:
            check_dialect(name, codes)
        exact = dequantise(name, codes, scale, block)
    except ModelError as error:
        raise GoldenError(error.problem, error.remedy) from None
    return tensor_record(exact, rounding_steps(codes, scale, block))


def tensor_record(tensor: Tensor, steps: Tensor | None = None) -> TensorRecord:
    """The record of one tensor. `steps`, of its shape, is how far its format's neighbouring numbers lie apart."""
    matrix = tensor.reshape(tensor.shape[0], -1) if tensor.dim() > 1 else tensor.reshape(-1, 1)
    row_squares, column_squares = _squares(matrix)
    row_norms, column_norms = row_squares.sqrt(), column_squares.sqrt()
    return TensorRecord(
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        sha256=_hash(matrix),
        sha256_bf16=_hash(matrix, torch.bfloat16) if tensor.dtype.is_floating_point else "",
        sum_squares=float(row_squares.sum()),
        rows=_weighed(row_norms),
        columns=_weighed(column_norms),
        sorted_rows=_weighed(row_norms.sort().values),
        sorted_columns=_weighed(column_norms.sort().values),
        projections=tuple(_rounded(one) for one in _projections(matrix)),
        rounding=None if steps is None else _rounding(matrix.double(), steps.double().reshape(matrix.shape)),
        sha256_fp16=_hash_in_fp16(matrix),
    )


def _blocks(matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some rows after the other, with their place, so that what is made of them stays small beside a large tensor."""
    step = max(1, _AT_ONCE // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), step):
        part = slice(start, min(start + step, len(matrix)))
        yield part, matrix[part]


def _squares(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of squares of each row, and of each column, in fp64."""
    rows = torch.empty(matrix.shape[0], dtype=torch.float64)
    columns = torch.zeros(matrix.shape[1], dtype=torch.float64)
    for part, block in _blocks(matrix):
        squares = block.double().square_() if block.dtype != torch.float64 else block.square()
        rows[part] = squares.sum(dim=1)
        columns += squares.sum(dim=0)
    return rows, columns


def _rounding(matrix: Tensor, steps: Tensor) -> Rounding:
    """What rounding to the nearest of numbers `steps` apart does: at most half a step, its square a twelfth of it."""
    variance = steps.square() / 12
    size = matrix.abs()
    unsure = torch.where(size == 0, variance, torch.where(size < 1.5 * steps, size * steps, 0.0))
    return Rounding(
        norm=float(steps.square().sum().sqrt()) / 2,
        rows=_shift(matrix, variance, unsure),
        columns=_shift(matrix.T, variance.T, unsure.T),
        projections=tuple(one**0.5 for one in _projections(variance, power=2)),
        sum_squares=float(variance.sum()),
        sum_squares_slack=float(unsure.sum()),
    )


def _shift(matrix: Tensor, variance: Tensor, unsure: Tensor) -> Shift:
    """Of the weighed norms of the rows."""
    squares, lost = matrix.square(), variance.sum(dim=1)
    power = squares.sum(dim=1)
    before = (power + lost).sqrt()
    variances = (squares * variance).sum(dim=1) / power.clamp_min(1e-300)
    weights = _places(len(power))
    return Shift(
        lost=float(((before - power.sqrt()) * weights).sum()),
        slack=float(((before - (power + lost - unsure.sum(dim=1)).clamp_min(0).sqrt()) * weights).sum()),
        deviation=float((variances * weights.square()).sum().sqrt()),
    )


def _projections(matrix: Tensor, power: int = 1) -> list[float]:
    """The matrix summed with irregular signs of its rows and columns, which every change of order changes.

    One sum misses a change by chance, about once in ten times in FP8; several are independent.
    """
    paces = [1 + 0.618 * number for number in range(_NUM_PROJECTIONS)]
    rows_PR = torch.stack([_signs(matrix.shape[0], pace) for pace in paces])
    # Columns go at another pace: else a transposed matrix would have the same sum.
    columns_PC = torch.stack([_signs(matrix.shape[1], 0.7071 * pace) for pace in paces])
    rows_PR, columns_PC = rows_PR**power, columns_PC**power
    found = torch.zeros(_NUM_PROJECTIONS, dtype=torch.float64)
    for part, block in _blocks(matrix):
        found += ((rows_PR[:, part] @ block.double()) * columns_PC).sum(dim=1)
    return found.tolist()


def _rounded(value: float) -> float:
    """Six digits: there are many tensors, and rounding to 8 bits leaves less."""
    return float(f"{value:.5e}")


def _places(number: int) -> Tensor:
    """A weight for each place, irregular so that an exchange of two shows whichever they are."""
    return 1.5 + _signs(number)


def _signs(number: int, pace: float = 1.0) -> Tensor:
    places = torch.arange(1, number + 1, dtype=torch.float64)
    return torch.sin(pace * places * places)


def _weighed(values: Tensor) -> float:
    return float((values * _places(len(values))).sum())


def _hash(matrix: Tensor, dtype: torch.dtype | None = None) -> str:
    """SHA-256 over the bytes, row by row, of the matrix in `dtype`; None leaves it as it is."""
    found = hashlib.sha256()
    for _, block in _blocks(matrix):
        found.update(block.to(dtype or block.dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _hash_in_fp16(matrix: Tensor) -> str:
    """Of a matrix in fp32 whose numbers fp16 all holds; "" for any other."""
    if matrix.dtype != torch.float32:
        return ""
    if not all(torch.equal(block.half().float(), block) for _, block in _blocks(matrix)):
        return ""
    return _hash(matrix, torch.float16)


def compare_weights(recorded: dict[str, TensorRecord], found: dict[str, TensorRecord]) -> list[WeightDifference]:
    """Every tensor that is not the recorded one. One rounded to bf16 is, and one in fp32 with the numbers of the fp16
    that was recorded; one in 8 bits is, if rounding explains it."""
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
    if recorded.dtype == found.dtype and recorded.sha256 == found.sha256:
        return True
    if "bfloat16" in (recorded.dtype, found.dtype) and recorded.sha256_bf16 == found.sha256_bf16 != "":
        return True
    if recorded.dtype == "float16" and recorded.sha256 == found.sha256_fp16:
        return True
    if found.rounding is None:
        return False
    same = _Sameness(recorded, found)
    return same.size and same.rows and same.columns and same.projections


class _Sameness:
    """Which statistics of two records agree: to the last bits, or within what rounding to 8 bits explains."""

    def __init__(self, recorded: TensorRecord, found: TensorRecord) -> None:
        self._rounding = rounding = found.rounding
        norm, found_norm = recorded.sum_squares**0.5, found.sum_squares**0.5
        self.factor = found_norm / norm if norm > 0 else 1.0
        self.size = abs(found_norm - norm) <= max(_SAME * norm, rounding.norm if rounding else 0.0)
        self._unit, self._slack = 1.0, 0.0
        if rounding is not None and self.size and norm > 0:
            # Rounding shrinks or stretches all of a tensor a little; its order is compared without that factor.
            power = found.sum_squares + rounding.sum_squares
            self._unit, self._slack = norm / power**0.5, rounding.sum_squares_slack / (2 * power)
        rows, columns = (rounding.rows, rounding.columns) if rounding else (None, None)
        self.rows = self._close(recorded.rows, found.rows, rows)
        self.columns = self._close(recorded.columns, found.columns, columns)
        self.sorted_rows = self._close(recorded.sorted_rows, found.sorted_rows, rows)
        self.sorted_columns = self._close(recorded.sorted_columns, found.sorted_columns, columns)
        self.transposed = self._close(recorded.rows, found.columns, columns) and self._close(
            recorded.columns, found.rows, rows
        )
        self.scaled = self._close(recorded.rows * self.factor, found.rows, rows) and self._close(
            recorded.columns * self.factor, found.columns, columns
        )
        self.projections = all(
            abs(one - self._unit * other) <= max(_DEVIATIONS * self._unit * deviation, 1e-5 * abs(one))
            for one, other, deviation in zip(
                recorded.projections, found.projections, rounding.projections if rounding else (), strict=False
            )
        )

    def _close(self, recorded: float, found: float, shift: Shift | None) -> bool:
        least = _SAME * max(abs(recorded), abs(found), 1e-300)
        if shift is None:
            return abs(recorded - found) <= least
        expected = self._unit * (found + shift.lost)
        allowed = self._unit * (_DEVIATIONS * shift.deviation + shift.slack) + self._slack * abs(expected)
        return abs(recorded - expected) <= max(least, allowed)


def _how(name: str, recorded: TensorRecord, found: TensorRecord) -> WeightDifference:
    if found.dtype == "int8" and recorded.dtype != "int8":
        return WeightDifference(name, "scaled", f"{name} is stored in 8 bits and its scales are missing")
    same = _Sameness(recorded, found)
    if same.transposed and sorted(recorded.shape) == sorted(found.shape) and not (same.rows and same.columns):
        return WeightDifference(name, "transposed", f"{name} is transposed: its rows are the recorded columns")
    if recorded.shape != found.shape:
        words = f"{name} has shape {list(found.shape)}, recorded {list(recorded.shape)}"
        return WeightDifference(name, "shape", words)
    if same.sorted_rows and same.columns and not same.rows:
        return WeightDifference(name, "rows permuted", f"{name} has the recorded rows in another order")
    if same.sorted_columns and same.rows and not same.columns:
        return WeightDifference(name, "columns permuted", f"{name} has the recorded columns in another order")
    if same.scaled and not same.size:
        return WeightDifference(name, "scaled", f"{name} is the recorded tensor times {same.factor:.6g}")
    norms = f"{found.sum_squares**0.5:.6g}, recorded {recorded.sum_squares**0.5:.6g}"
    return WeightDifference(name, "other", f"{name} holds other numbers (norm {norms})")
