"""How a model's files differ from those that a bundle was recorded from."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from crosschip.errors import GoldenError, ModelError, RunDirectoryError
from crosschip.golden.bundle import Bundle
from crosschip.golden.config_fields import TIED, FieldDifference, compare_fields, fields_of_document, numeric_fields
from crosschip.golden.weights import TensorRecord, WeightDifference, compare_weights, records_of
from crosschip.model import ModelConfig, read_config
from crosschip.rundir import read_json

__all__ = [
    "FileCheck",
    "check_files",
    "dtype_of_directory",
    "dtype_of_records",
    "field_differences",
    "fields_in",
    "fields_of",
]

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # as safetensors calls them
_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class FileCheck:
    """Every field and tensor that differs, and the dtype that the files are meant to be computed in."""

    fields: list[FieldDifference]
    weights: list[WeightDifference]
    dtype: str | None  # None: it cannot be told

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> FileCheck:
        """What `document` gave, after a way through JSON."""
        fields = [FieldDifference(**each) for each in document["fields"]]
        return cls(fields, [WeightDifference(**each) for each in document["weights"]], document["dtype"])


def check_files(bundle: Bundle, model_directory: Path, quantised: str | None = None) -> FileCheck:
    """Compare tensor by tensor and field by field; quantised tensors are compared within their rounding.

    Raises:
        GoldenError: there are no files, or most tensors hold other numbers, so the bundle is another model's.
    """
    try:
        fields = compare_fields(bundle.manifest["config"], fields_of(model_directory, bundle.route))
        fields += _wrongly_tied(bundle, read_json(model_directory / "config.json"))
    except (ModelError, RunDirectoryError) as error:
        if not model_directory.is_dir():
            raise
        fields = [FieldDifference("config.json", "readable", error.problem)]
    records = records_of(model_directory)
    dtype = dtype_of_records(records)
    if quantised is not None and not any(record.rounding for record in records.values()):
        return FileCheck(fields, [], dtype)  # a form whose rounding is not known here
    weights = compare_weights(bundle.weights, records)
    foreign = [each for each in weights if not each.is_same_numbers and each.kind not in ("scaled", "surplus")]
    # Of a quantised form it cannot be told from a conversion that has gone wrong everywhere, as without its scales.
    if quantised is None and len(foreign) > len(bundle.weights) / 2:
        raise GoldenError(
            f"the bundle {bundle.path} was made for other weights: {len(foreign)} of {len(bundle.weights)} tensors of "
            f"{model_directory} hold other numbers, the first: {foreign[0].words}",
            "record a bundle of these weights; for a quantised form of them give --quantised",
        )
    return FileCheck(fields, weights, dtype)


def field_differences(bundle: Bundle, document: dict[str, Any]) -> list[FieldDifference]:
    """Every field of a `config.json`, which was read already, that is not the recorded one.

    Raises:
        ModelError: our own model is the bundle's route and cannot run this configuration.
    """
    found = compare_fields(bundle.manifest["config"], fields_in(document, bundle.route))
    return found + _wrongly_tied(bundle, document)


def _wrongly_tied(bundle: Bundle, document: dict[str, Any]) -> list[FieldDifference]:
    """A `config.json` that ties the output to the embedding, where the recorded tensors are two.

    On the route through transformers the field is compared as all others are.
    """
    embedding, output = bundle.weights.get(_EMBEDDING), bundle.weights.get(_OUTPUT)
    are_two = embedding is not None and output is not None and embedding.sha256 != output.sha256
    if bundle.route == "model" and are_two and document.get(TIED):
        return [FieldDifference(TIED, False, document[TIED])]
    return []


def fields_of(model_directory: Path, route: str) -> dict[str, Any]:
    """The fields of the configuration that change numbers, as a bundle of this route keeps them.

    Raises:
        ModelError: our own model is the route and cannot run this configuration, or there is none.
        RunDirectoryError: it is no JSON.
    """
    if route == "model":
        config, document = read_config(model_directory)
        return numeric_fields(asdict(config), document)
    document = read_json(model_directory / "config.json")
    if not isinstance(document, dict):
        raise ModelError(f"{model_directory}/config.json holds no object", "copy it again")
    return fields_of_document(document)


def fields_in(document: dict[str, Any], route: str) -> dict[str, Any]:
    """As `fields_of`, from a `config.json` that was read already.

    Raises:
        ModelError: our own model is the route and cannot run this configuration.
    """
    if route != "model":
        return fields_of_document(document)
    return numeric_fields(asdict(ModelConfig.from_hf(document)), document)


def dtype_of_directory(model_directory: Path) -> str | None:
    """As `dtype_of_records`, from the headers of the files alone."""
    sizes: Counter[str] = Counter()
    for file in sorted(model_directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (not a dict)
                part = opened.get_slice(name)
                if name == _EMBEDDING:
                    return _DTYPES.get(part.get_dtype(), part.get_dtype())
                sizes[_DTYPES.get(part.get_dtype(), "")] += math.prod(part.get_shape())
    sizes.pop("", None)
    return sizes.most_common(1)[0][0] if sizes else None


def dtype_of_records(records: dict[str, TensorRecord]) -> str | None:
    """The dtype that files are meant to be computed in: the embedding's, else that of most of their numbers."""
    if _EMBEDDING in records:
        return records[_EMBEDDING].dtype
    sizes: Counter[str] = Counter()
    for record in records.values():
        if "float" in record.dtype:
            sizes[record.dtype] += math.prod(record.shape)
    return sizes.most_common(1)[0][0] if sizes else None
