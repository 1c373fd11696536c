"""A GGUF file has one spelling of the configuration, config.json several: those that mean the same do not differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from crosschip.golden.config_fields import compare_fields, fields_of_document
from crosschip.handoff.gguf.architectures import architecture_of
from crosschip.handoff.handing_off import hand_off
from tests.handoff.gguf.conftest import LLAMA_3_ROPE, Made
from tests.handoff.gguf.test_round_trip import imported, written

SILENT = ("head_dim", "hidden_act", "attention_bias", "mlp_bias", "tie_word_embeddings")  # as Llama 2's config.json


def change_config(directory: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """Change fields of config.json; None takes one away."""
    path = directory / "config.json"
    document = {**json.loads(path.read_text()), **fields}
    document = {field: value for field, value in document.items() if value is not None}
    path.write_text(json.dumps(document))
    return document


def differing(found: dict[str, Any], recorded: dict[str, Any]) -> dict[str, Any]:
    """The fields that a file says otherwise than it was recorded."""
    recorded = fields_of_document(recorded)
    spelled = architecture_of(found).spelled_like(found, recorded)
    differences = compare_fields(recorded, fields_of_document(spelled))
    return {each.field: each.found for each in differences if each.found is not None}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("llama", {}), ("llama", {"rope_parameters": LLAMA_3_ROPE}), ("qwen3", {"tie_word_embeddings": True})],
)
def test_what_transformers_writes_is_handed_off_as_gguf(dense: Made, kind: str, fields: dict[str, Any]) -> None:
    directory = dense(kind, **fields)
    result = hand_off(directory, "gguf", engines=["transformers"], chip="cpu")
    gates = {each["name"]: each for each in result.certificate.document["gates"]}
    assert gates["configuration fields"]["verdict"] == "PASS", gates["configuration fields"]["message"]
    assert result.exit_code == 0


@pytest.mark.parametrize("rope", [{"rope_theta": 10000.0}, {"rope_parameters": {"rope_theta": 10000.0}}, {}])
def test_an_older_config_that_is_silent_means_the_same(dense: Made, rope: dict[str, Any]) -> None:
    directory = dense("llama")
    recorded = change_config(directory, {"rope_parameters": None, **dict.fromkeys(SILENT), **rope})
    _, found = imported(written(directory))
    assert differing(found, recorded) == {}


@pytest.mark.parametrize(
    ("field", "value"),
    [("rope_theta", 5e4), ("head_dim", 32), ("rms_norm_eps", 1e-4), ("hidden_act", "gelu"), ("attention_bias", True)],
)
def test_a_file_that_means_something_else_still_differs(dense: Made, field: str, value: Any) -> None:
    directory = dense("llama")
    recorded = change_config(directory, {"head_dim": None})
    _, found = imported(written(directory))
    assert field in differing({**found, field: value}, recorded)


def test_a_tied_file_of_a_model_that_does_not_say_so_differs(dense: Made) -> None:
    directory = dense("llama", tie_word_embeddings=True)
    _, found = imported(written(directory))
    recorded = change_config(directory, {"tie_word_embeddings": None})
    assert differing(found, recorded) == {"tie_word_embeddings": True}
