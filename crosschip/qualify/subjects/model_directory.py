"""A model directory in the Hugging Face layout as a subject: `config.json` alone is enough, weights are then random.

DeepSeek-V3 goes to our own transformer, which is what `train` and `serve` run; anything else to transformers, without
ever running code from the directory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crosschip.errors import ModelError, QualifyError
from crosschip.model import read_config
from crosschip.model.weights import has_weights
from crosschip.qualify.subjects.recipe_subject import TransformerSubject
from crosschip.qualify.subjects.subject import DtypeSetting, Subject
from crosschip.recipe import StageSettings
from crosschip.rundir import read_json

__all__ = ["load_model_directory"]

_STAGE = StageSettings(steps=1000, batch_size=16, seq_len=256)


def load_model_directory(path: Path, origin: str) -> Subject:
    """Read `config.json` and decide who runs the model.

    Raises:
        CrosschipError: the configuration is damaged, or nobody here can run it.
    """
    document = read_json(path / "config.json")
    if not isinstance(document, dict):
        raise QualifyError(f"{path / 'config.json'} is not an object", "give a model directory's own config.json")
    dtype = _dtype_setting(document)
    if document.get("model_type") == "deepseek_v3":
        found = _own(path, origin, dtype)
        if found is not None:
            return found
    from crosschip.qualify.subjects.transformers_subject import load_transformers_subject

    return load_transformers_subject(path, origin, document, dtype)


def _own(path: Path, origin: str, dtype: DtypeSetting) -> TransformerSubject | None:
    try:
        config, _ = read_config(path)
    except ModelError:  # a variant that our transformer does not compute
        return None
    stage = _STAGE.model_copy(update={"seq_len": min(_STAGE.seq_len, config.max_position_embeddings)})
    weights = path if has_weights(path) else None
    return TransformerSubject(path.resolve().name, origin, config, stage, dtype, weights)


def _dtype_setting(document: dict[str, Any]) -> DtypeSetting:
    """The dtype of the published weights, where it is one that we compute in."""
    named = document.get("dtype") or document.get("torch_dtype")
    if named == "float32":
        return "float32"
    return "bfloat16" if named == "bfloat16" else "auto"
