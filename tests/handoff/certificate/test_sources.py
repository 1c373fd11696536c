"""Handed off whole, from sources of every kind: a checkpoint by its path, weights in fp16, tensors that are derived."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from crosschip.data import train_tokenizer
from crosschip.golden.bundle import Bundle
from crosschip.handoff.handing_off import HandoffResult, _without_a_place, hand_off
from crosschip.handoff.source import open_source
from crosschip.rundir import RunDirectory
from tests.handoff.certificate.conftest import Tensors
from tests.handoff.gguf.conftest import TEXT, VOCAB, save_dense, with_tokenizer
from tests.handoff.test_source import run_with

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
TABLE = "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.fixture
def dense(tmp_path: Path) -> Callable[..., Path]:
    """A Llama with a tokenizer whose tensors a function changes; keywords change fields."""

    def make(how: Callable[[Tensors], None], **fields: Any) -> Path:
        train_tokenizer(TEXT, VOCAB).save(tmp_path / "tokenizer")
        directory = with_tokenizer(save_dense(tmp_path / "model", "llama", **fields), tmp_path / "tokenizer")
        tensors = load_file(directory / "model.safetensors")
        how(tensors)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory

    return make


def manifest(result: HandoffResult) -> dict[str, Any]:
    return next(each for each in result.certificate.document["gates"] if each["name"] == "tensor manifest")


@pytest.mark.parametrize(("target", "dtype"), [("hf", None), ("w8a8", "float32"), ("gguf-q8_0", None)])
def test_weights_in_fp16_pass(dense: Callable[..., Path], tmp_path: Path, target: str, dtype: str | None) -> None:
    def to_halves(tensors: Tensors) -> None:
        tensors |= {name: tensor.half() for name, tensor in tensors.items()}

    directory = dense(to_halves)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    result = hand_off(directory, target, out=tmp_path / "out", dtype=dtype, engines=["transformers"], chip="cpu")
    assert (manifest(result)["verdict"], result.exit_code) == ("PASS", 0), manifest(result)["message"]


def test_a_gguf_file_without_what_is_derived_passes_and_says_so(dense: Callable[..., Path], tmp_path: Path) -> None:
    def derived(tensors: Tensors) -> None:
        tensors |= {OUTPUT: tensors[EMBEDDING].clone(), TABLE: torch.rand(8)}

    directory = dense(derived, tie_word_embeddings=True)
    result = hand_off(directory, "gguf", out=tmp_path / "out", engines=["transformers"], chip="cpu")
    assert (manifest(result)["verdict"], result.exit_code) == ("PASS", 0), manifest(result)["message"]
    (words,) = manifest(result)["not_covered"]
    assert words == f"2 tensors that this form has no place for: {TABLE}, {OUTPUT}"


@pytest.mark.parametrize(
    ("is_tied", "is_same", "without"), [(True, True, [OUTPUT]), (True, False, []), (False, True, [])]
)
def test_an_output_that_is_not_the_embedding_has_a_place(
    bundle: Bundle, is_tied: bool, is_same: bool, without: list[str]
) -> None:
    weights = dict(bundle.manifest["weights"])
    weights[OUTPUT] = {**weights[OUTPUT], "sha256": weights[EMBEDDING]["sha256"] if is_same else "another"}
    config = {**bundle.manifest["config"], "tie_word_embeddings": is_tied}
    other = Bundle(bundle.path, {**bundle.manifest, "weights": weights, "config": config}, bundle.arrays)
    assert _without_a_place(other) == without


def test_a_checkpoint_by_its_path_leaves_its_files_where_the_run_has_those_it_hands_off(tmp_path: Path) -> None:
    run = RunDirectory(run_with(tmp_path, {"sft": (2, 3)}))
    checkpoints = run.stage("sft") / "checkpoints"
    result = hand_off(checkpoints / "step-00000002", "hf", engines=["model"], chip="cpu")
    assert (result.exit_code, result.directory) == (0, run.handoff("step-00000002-hf"))
    assert (run.path / "golden-step-00000002" / "COMPLETE").is_file()
    assert not run.handoff("hf").exists(), "that is the run's own"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000002", "step-00000003"]
    assert open_source(run.path).directory.name == "step-00000003"


def test_a_source_that_was_corrected_is_not_held_against_what_an_earlier_handoff_recorded(
    model_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(model_dir, tmp_path / "model")
    settings: dict[str, Any] = {"out": tmp_path / "hf", "engines": ["model"], "chip": "cpu"}
    assert hand_off(tmp_path / "model", "hf", **settings).exit_code == 0
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    told: list[str] = []
    again = hand_off(tmp_path / "model", "hf", **settings, tell=told.append)
    fields = next(each for each in again.certificate.document["gates"] if each["name"] == "configuration fields")
    assert (again.exit_code, fields["verdict"]) == (0, "PASS")
    assert any("is not used: rms_norm_eps" in line for line in told)
