"""Each fault of a model's files, planted between the conversion and the gates, is caught and named by a gate.

The rows of the catalogue that are marked for the handoff, and faults that are in no catalogue. An honest conversion of
the same model passes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from crosschip.chips.faults import CATALOGUE, faults_from, plant_files
from crosschip.data import train_tokenizer
from crosschip.handoff.handing_off import hand_off
from crosschip.handoff.targets import TARGETS
from crosschip.model import ModelConfig, save_model
from tests.model.configs import random_model

OUTSIDE = "crosschip.chips.faults.file_mutations"
FILES_GATES = {"tensor manifest", "configuration fields", "tokenizer and chat template"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with experts and square matrices, whose weights are large enough for every part to matter."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("source") / "model"
    tokenizer = train_tokenizer(["What is 12 + 7?", "1 + 2 = 3 so the answer is 3."] * 20, 300)
    config = ModelConfig(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        n_routed_experts=4,
        kv_lora_rank=32,
        v_head_dim=32,
        routed_scaling_factor=2.5,
        max_position_embeddings=128,
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )
    save_model(random_model(config, seed=3), directory, torch.float32)
    tokenizer.save(directory)
    return directory


def gates_with(
    spec: str, to: str, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """What the fault changed, and the gates of the handoff by their names."""
    honest, changed = TARGETS[to], []

    def export(*args: Any, **kwargs: Any) -> None:
        honest.export(*args, **kwargs)
        for names in plant_files(faults_from(f"sim:{spec}"), args[1]).values():
            changed.extend(names)

    with monkeypatch.context() as patched:
        patched.setitem(TARGETS, to, replace(honest, export=export))
        dtype = "float32" if to == "hf" else None
        result = hand_off(source, to, out=out / to, engines=("model",), chip="cpu", dtype=dtype)
    document = result.certificate.document
    assert (result.exit_code == 1) == (document["verdict"] == "FAIL")
    return changed, {gate["name"]: gate for gate in document["gates"]}


@pytest.mark.parametrize("to", ["hf", "fp8", "w8a8"])
def test_an_honest_conversion_passes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    _, gates = gates_with("0", to, source, tmp_path, monkeypatch)
    assert {name: gate["verdict"] for name, gate in gates.items() if gate["verdict"] == "FAIL"} == {}
    assert all(gates[name]["verdict"] == "PASS" for name in FILES_GATES)


@pytest.mark.parametrize(
    ("spec", "to", "gate"),
    [
        ("H1", "hf", "tensor manifest"),
        ("H1,mode=shuffle,seed=1", "hf", "tensor manifest"),
        ("H1,tensor=*q_proj.weight", "fp8", "tensor manifest"),
        ("H1,tensor=*q_proj.weight", "w8a8", "tensor manifest"),
        ("H6", "hf", "tensor manifest"),
        ("H6,mode=uninitialised", "hf", "tensor manifest"),
        ("H6,mode=zeros,seed=2", "fp8", "tensor manifest"),
        ("H7", "fp8", "tensor manifest"),
        ("H7,mode=dropped", "fp8", "tensor manifest"),
        ("H7", "w8a8", "tensor manifest"),
        ("H10,mode=values", "fp8", "tensor manifest"),
        ("H13", "hf", "configuration fields"),
        ("H13", "fp8", "configuration fields"),
        ("H13,which=rope_theta", "hf", "configuration fields"),
        ("H13,which=rope_interleave", "hf", "configuration fields"),
        ("H13,which=routed_scaling_factor", "hf", "configuration fields"),
        ("H13,which=norm_topk_prob", "hf", "configuration fields"),
        (f"{OUTSIDE}:ExpertsSwapped", "hf", "tensor manifest"),
        (f"{OUTSIDE}:ExpertsSwapped", "fp8", "tensor manifest"),
        (f"{OUTSIDE}:SquareTransposed,tensor=*o_proj.weight", "hf", "tensor manifest"),
        (f"{OUTSIDE}:SquareTransposed,tensor=*o_proj.weight", "w8a8", "tensor manifest"),
        (f"{OUTSIDE}:OlderShard", "hf", "tensor manifest"),
        (f"{OUTSIDE}:OlderShard,drift=0.001", "hf", "tensor manifest"),
        (f"{OUTSIDE}:StaleTokenizer", "hf", "tokenizer and chat template"),
        (f"{OUTSIDE}:TemplateCharacter", "hf", "tokenizer and chat template"),
    ],
)
def test_a_fault_is_caught_and_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, to: str, gate: str
) -> None:
    changed, gates = gates_with(spec, to, source, tmp_path, monkeypatch)
    assert changed != []
    assert gates[gate]["verdict"] == "FAIL"
    said = f"{gates[gate]['subject']} {gates[gate]['message']}"
    assert any(name.removesuffix("_scale_inv").removesuffix("_scale") in said for name in changed), said
    others = {name for name in FILES_GATES - {gate} if gates[name]["verdict"] == "FAIL"}
    assert others == set()  # no gate blames what is as it was
    row = spec.partition(",")[0]
    if row in CATALOGUE:
        assert gate in CATALOGUE[row].caught_by


def test_h10_bytes_under_the_other_label_are_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes that are NaN in one dialect tell; the message names a tensor and both dialects."""
    _, gates = gates_with("H10", "fp8", source, tmp_path, monkeypatch)
    said, verdict = gates["tensor manifest"]["message"], gates["tensor manifest"]["verdict"]
    assert verdict == "FAIL"
    assert "e4m3fn" in said or "is the recorded tensor times" in said
    assert ".weight" in said


def test_a_fault_that_finds_nothing_is_not_applicable(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FP8 faults in a directory without FP8 change nothing, and nothing is accused."""
    changed, gates = gates_with("H7+H10", "hf", source, tmp_path, monkeypatch)
    assert changed == []
    assert "FAIL" not in {gate["verdict"] for gate in gates.values()}


def test_two_faults_at_once_are_both_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed, gates = gates_with("H1+H13,which=rope_theta", "hf", source, tmp_path, monkeypatch)
    assert gates["tensor manifest"]["subject"] == changed[0]
    assert gates["configuration fields"]["subject"] == "rope_theta"
