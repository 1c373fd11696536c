"""What a certificate says of the target and the source, and which dtype a handoff means where nobody says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from crosschip.certificate import Certificate
from crosschip.checkpoints import run_of
from crosschip.errors import CrosschipError, HandoffError
from crosschip.golden.bundle import Bundle
from crosschip.golden.limits import QUANTISED
from crosschip.golden.weights import compare_weights, tensor_record
from crosschip.handoff.certificate.arrived import open_arrived, recorded_form
from crosschip.handoff.conversion.declared import is_quantised_weight
from crosschip.handoff.conversion.layout import TensorSource
from crosschip.handoff.export import HANDOFF_FILE, HANDOFF_SCHEMA
from crosschip.handoff.source import ModelSource
from crosschip.handoff.targets import TARGETS, Target
from crosschip.rundir import RunDirectory, read_json

__all__ = [
    "chosen_dtype",
    "computed_in",
    "described_source",
    "described_target",
    "earlier_source",
    "quantisation",
]


def chosen_dtype(target: Target, model: ModelSource, run: RunDirectory | None) -> str:
    """What the recipe says, else the source's own, where the target is written in it; else the target's usual."""
    wishes: list[str] = []
    if run is not None and run.resolved_recipe.is_file():
        from crosschip.recipe import parse_recipe

        wishes.append(parse_recipe(read_json(run.resolved_recipe), str(run.resolved_recipe)).handoff.dtype)
    wishes.append(str(model.config.get("torch_dtype") or model.config.get("dtype") or _dtype_of_weights(model)))
    return next((wish for wish in wishes if wish in target.dtypes), target.dtypes[0])


def _dtype_of_weights(model: ModelSource) -> str | None:
    """Of a model whose config.json is silent: the embedding's."""
    names = model.tensors.names()
    embedding = next((name for name in names if name.endswith("embed_tokens.weight")), None)
    return None if embedding is None else str(model.tensors.dtype(embedding)).removeprefix("torch.")


def computed_in(dtype: str) -> str:
    """What a model in this dtype computes in: `q8_0` of GGUF is multiplied out to fp32."""
    return dtype if dtype in ("float32", "bfloat16", "float16") else "float32"


def quantisation(of_target: str | None, dtype: str) -> str | None:
    """The kind of quantisation, which GGUF has in its dtype and other targets in their name."""
    return of_target or (dtype if dtype in QUANTISED else None)


def described_target(directory: Path, earlier: Certificate | None, bundle: Bundle, dtype: str | None) -> dict[str, Any]:
    """The target of files that lie there already."""
    if earlier is not None:
        known = {"quantised": None, **earlier.document["target"]}
        return {**known, "computed_in": dtype or known["computed_in"]}
    record = directory / HANDOFF_FILE
    name, written = _recorded_target(record) if record.is_file() else _foreign_target(directory, bundle)
    quantised = quantisation(TARGETS[name].quantised if name in TARGETS else None, written)
    return {"name": name, "dtype": written, "computed_in": dtype or computed_in(written), "quantised": quantised}


def _recorded_target(record: Path) -> tuple[str, str]:
    """Name and dtype, as the export wrote them."""
    document = read_json(record)
    version = document.get("schema_version") if isinstance(document, dict) else None
    if not isinstance(version, int):
        raise HandoffError(f"{record} is no record of a handoff", "remove it, or hand the model off again")
    if version > HANDOFF_SCHEMA:
        raise HandoffError(
            f"{record} has schema version {version}; this crosschip knows {HANDOFF_SCHEMA}", "use a newer crosschip"
        )
    return str(document.get("target")), str(document.get("dtype"))


def _foreign_target(directory: Path, bundle: Bundle) -> tuple[str, str]:
    """The target whose form the files of another program have, and their dtype.

    Files in 8 bits from which the bundle itself was recorded are to be the same to the last bit, as of `hf`.
    """
    try:
        arrived = open_arrived(directory, recorded_form(bundle))
        in_8_bits = TARGETS[arrived.target].quantised is not None
        target = "hf" if in_8_bits and _is_recorded(arrived.tensors, bundle) else arrived.target
    except CrosschipError:  # the gates say what is wrong with it
        target = "hf"
    return target, "q8_0" if target == "gguf-q8_0" else bundle.dtype


def _is_recorded(tensors: TensorSource, bundle: Bundle) -> bool:
    """Whether the matrices that are kept in 8 bits are the recorded ones: rounding leaves hardly any as it was."""
    names = [name for name in tensors.names() if is_quantised_weight(name) and name in bundle.weights]
    for name in sorted(names, key=lambda each: math.prod(tensors.shape(each))):  # the first that differs is enough
        if compare_weights({name: bundle.weights[name]}, {name: tensor_record(tensors.read(name))}):
            return False
    return bool(names)


def described_source(source: Path, model: ModelSource, run: RunDirectory | None) -> dict[str, Any]:
    """Where a model came from, in words and numbers."""
    kind = "run" if run is not None else "checkpoint" if (source / "dcp").is_dir() else "directory"
    # Other trainers call theirs so, too, with as many digits as they like.
    step = model.directory.name.removeprefix("step-") if model.directory.name.startswith("step-") else None
    return {
        "kind": kind,
        "path": str(source),
        "checkpoint": str(model.directory),
        "step": int(step) if step is not None and step.isdigit() else None,
        "stage": model.directory.parents[1].name if run_of(model.directory) is not None else None,
        "architecture": model.config.get("model_type"),
    }


def earlier_source(earlier: Certificate) -> dict[str, Any]:
    """The source as an earlier certificate names it; the hash over its tensors is made anew."""
    return {key: value for key, value in earlier.document["source"].items() if key != "weights"}
