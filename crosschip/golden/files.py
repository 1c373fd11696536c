"""How a model's files differ from those that a bundle was recorded from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from crosschip.errors import GoldenError, ModelError
from crosschip.golden.bundle import Bundle
from crosschip.golden.config_fields import FieldDifference, compare_fields, numeric_fields
from crosschip.golden.weights import WeightDifference, compare_weights, records_of
from crosschip.model import read_config

__all__ = ["FileCheck", "check_files"]

_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class FileCheck:
    """Every field and tensor that differs, and the dtype that the files are meant to be computed in."""

    fields: list[FieldDifference]
    weights: list[WeightDifference]
    dtype: str | None  # None: it cannot be told


def check_files(bundle: Bundle, model_directory: Path, quantised: str | None = None) -> FileCheck:
    """Compare tensor by tensor and field by field; quantised tensors are other numbers and are not compared.

    Raises:
        GoldenError: there are no files, or most tensors hold other numbers, so the bundle is another model's.
    """
    try:
        config, document = read_config(model_directory)
        fields = compare_fields(bundle.manifest["config"], numeric_fields(asdict(config), document))
    except ModelError as error:
        if not model_directory.is_dir():
            raise
        fields = [FieldDifference("config.json", "readable", error.problem)]
    records = records_of(model_directory)
    dtype = records[_EMBEDDING].dtype if _EMBEDDING in records else None
    if quantised is not None:
        return FileCheck(fields, [], dtype)
    weights = compare_weights(bundle.weights, records)
    foreign = [each for each in weights if not each.is_same_numbers and each.kind not in ("scaled", "surplus")]
    if len(foreign) > len(bundle.weights) / 2:
        raise GoldenError(
            f"the bundle {bundle.path} was made for other weights: {len(foreign)} of {len(bundle.weights)} tensors of "
            f"{model_directory} hold other numbers, the first: {foreign[0].words}",
            "record a bundle of these weights; for a quantised form of them give --quantised",
        )
    return FileCheck(fields, weights, dtype)
