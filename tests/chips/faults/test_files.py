"""Each fault of files changes what it says in a real model directory, and nothing else; the same seed does the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from crosschip.chips.faults import CATALOGUE, faults_from, plant_files
from crosschip.chips.faults.model_files import ModelFiles
from crosschip.errors import ChipError

OUTSIDE = "crosschip.chips.faults.file_mutations"
FILE_ROWS = [row.id for row in CATALOGUE.values() if row.acts_on_files]
CONFIG = {
    "hidden_size": 8,
    "rms_norm_eps": 1e-6,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "routed_scaling_factor": 2.5,
    "num_experts_per_tok": 2,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
}


def tensors() -> dict[str, torch.Tensor]:
    made: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "o_proj"):
            made[f"{prefix}.self_attn.{name}.weight"] = torch.randn(8, 8, generator=generator)
        made[f"{prefix}.input_layernorm.weight"] = torch.ones(8)
        for expert in range(3):
            for name in ("up_proj", "down_proj"):
                made[f"{prefix}.mlp.experts.{expert}.{name}.weight"] = torch.randn(8, 4, generator=generator)
    weight = torch.randn(8, 8, generator=generator)
    made["model.layers.0.mlp.gate_proj.weight"] = (weight * 100).to(torch.float8_e4m3fn)
    made["model.layers.0.mlp.gate_proj.weight_scale_inv"] = torch.tensor([[0.01]])
    return made


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory in two shards, with an index, a configuration, a tokenizer and a template."""
    directory = tmp_path / "model"
    directory.mkdir()
    made = tensors()
    names = sorted(made)
    shards = {"model-00001-of-00002.safetensors": names[:12], "model-00002-of-00002.safetensors": names[12:]}
    for file, mine in shards.items():
        save_file({name: made[name] for name in mine}, directory / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, mine in shards.items() for name in mine}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1, "c": 2}}}))
    (directory / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}{{ '<|assistant|>' }}"
    )
    return directory


def read(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    as_bytes = (each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other))
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(*as_bytes)


def others(directory: Path) -> list[str]:
    """The tensors that are not those that were written."""
    before, after = tensors(), read(directory)
    return sorted(name for name in before if name not in after or not same(before[name], after[name]))


def plant(spec: str, directory: Path) -> list[str]:
    (changed,) = plant_files(faults_from(f"sim:{spec}"), directory).values()
    return changed


@pytest.mark.parametrize("spec", ["H1", "H1,mode=shuffle,seed=3", "H1,tensor=*k_proj.weight,parts=4"])
def test_h1_has_the_same_rows_in_another_order(directory: Path, spec: str) -> None:
    (name,) = plant(spec, directory)
    assert others(directory) == [name]
    assert "self_attn" in name
    before, after = tensors()[name], read(directory)[name]
    assert sorted(map(tuple, before.tolist())) == sorted(map(tuple, after.tolist()))
    if "shuffle" not in spec:
        parts = 4 if "parts" in spec else 2
        assert torch.equal(after, torch.cat([before[start :: 8 // parts] for start in range(8 // parts)]))


def test_h1_permutes_bytes_of_fp8_as_well(directory: Path) -> None:
    name = "model.layers.0.mlp.gate_proj.weight"
    assert plant(f"H1,tensor={name}", directory) == [name]
    assert read(directory)[name].dtype == torch.float8_e4m3fn


def test_h6_takes_a_tensor_out_of_file_and_index(directory: Path) -> None:
    (name,) = plant("H6", directory)
    assert name not in read(directory)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors()) - {name}


@pytest.mark.parametrize("mode", ["uninitialised", "zeros"])
def test_h6_leaves_a_tensor_unfilled(directory: Path, mode: str) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    assert plant(f"H6,mode={mode},tensor={name}", directory) == [name]
    assert others(directory) == [name]
    found = read(directory)[name]
    assert (found == 0).all() if mode == "zeros" else abs(float(found.std()) - 1.0) < 0.5


def test_h7_drops_scales_or_sets_them_to_one(directory: Path) -> None:
    name = "model.layers.0.mlp.gate_proj.weight_scale_inv"
    assert plant("H7", directory) == [name]
    assert read(directory)[name].tolist() == [[1.0]]
    assert plant("H7", directory) == []  # they are one already
    assert plant("H7,mode=dropped", directory) == [name]
    assert name not in read(directory)


def test_h10_is_another_label_over_the_same_bytes(directory: Path) -> None:
    name = "model.layers.0.mlp.gate_proj.weight"
    assert plant("H10", directory) == [name]
    after = read(directory)
    assert after[name].dtype == torch.float8_e4m3fnuz
    assert torch.equal(after[name].view(torch.uint8), tensors()[name].view(torch.uint8))
    assert others(directory) == [name]


def test_h10_values_are_half_as_large(directory: Path) -> None:
    """e4m3fnuz has its exponents one lower; the finest numbers of e4m3fn lose their last bit in it."""
    name = "model.layers.0.mlp.gate_proj.weight"
    assert plant("H10,mode=values", directory) == [name]
    before, after = tensors()[name].float(), read(directory)[name]
    assert after.dtype == torch.float8_e4m3fn
    large = before.abs() >= 2.0**-5
    assert torch.equal(after.float()[large], before[large] / 2)


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        ("", "rms_norm_eps", 1e-5),
        (",which=rope_theta", "rope_theta", 100000.0),
        (",which=norm_topk_prob", "norm_topk_prob", False),
        (",which=routed_scaling_factor", "routed_scaling_factor", 5.0),
        (",which=hidden_act", "hidden_act", "gelu"),
        (",which=num_experts_per_tok", "num_experts_per_tok", 3),
        (",which=rope_interleave,value=true", "rope_interleave", True),
        (",which=rms_norm_eps,value=1e-3", "rms_norm_eps", 1e-3),
    ],
)
def test_h13_changes_one_field(directory: Path, words: str, field: str, value: Any) -> None:
    assert plant(f"H13{words}", directory) == [field]
    after = json.loads((directory / "config.json").read_text())
    flat = {**CONFIG, **CONFIG["rope_parameters"]}  # type: ignore[dict-item]
    found = {**after, **after["rope_parameters"]}
    assert found[field] == pytest.approx(value)
    changed = {name for name in found if name != "rope_parameters" and found[name] != flat.get(name)}
    assert changed == {field}
    assert others(directory) == []


def test_h13_of_an_unknown_field_or_the_same_value_changes_nothing(directory: Path) -> None:
    before = (directory / "config.json").read_bytes()
    assert plant("H13,which=q_lora_rank", directory) == []
    assert plant("H13,which=hidden_size,value=8", directory) == []
    assert (directory / "config.json").read_bytes() == before


def test_two_experts_are_swapped_whole(directory: Path) -> None:
    changed = plant(f"{OUTSIDE}:ExpertsSwapped", directory)
    assert len(changed) == 4
    assert others(directory) == changed
    before, after = tensors(), read(directory)
    for name in changed:
        assert any(same(after[name], before[other]) for other in changed if other != name)


def test_a_square_matrix_is_transposed(directory: Path) -> None:
    (name,) = plant(f"{OUTSIDE}:SquareTransposed,tensor=*self_attn*", directory)
    assert torch.equal(read(directory)[name], tensors()[name].T)


def test_a_shard_of_an_older_step(directory: Path, tmp_path: Path) -> None:
    older = tmp_path / "older"
    shutil.copytree(directory, older)
    drifted = plant(f"{OUTSIDE}:OlderShard", directory)
    assert drifted == others(directory)
    assert all(ModelFiles(directory).place[name].name.startswith("model-00002") for name in drifted)
    assert plant(f"{OUTSIDE}:OlderShard,older={older}", directory) == drifted
    assert others(directory) == []


def test_tokenizer_and_template(directory: Path) -> None:
    assert plant(f"{OUTSIDE}:StaleTokenizer", directory) == ["tokenizer.json"]
    vocabulary = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(vocabulary.values()) == [0, 1, 2]
    assert vocabulary != {"a": 0, "b": 1, "c": 2}
    before = (directory / "chat_template.jinja").read_text()
    assert plant(f"{OUTSIDE}:TemplateCharacter", directory) == ["chat_template.jinja"]
    assert (directory / "chat_template.jinja").read_text() == before.replace("|>'", "|> '")


def test_a_template_within_the_tokenizers_settings(directory: Path) -> None:
    (directory / "chat_template.jinja").unlink()
    assert plant(f"{OUTSIDE}:TemplateCharacter", directory) == []
    (directory / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert plant(f"{OUTSIDE}:TemplateCharacter", directory) == ["tokenizer_config.json"]


@pytest.mark.parametrize("name", [*FILE_ROWS, f"{OUTSIDE}:ExpertsSwapped", f"{OUTSIDE}:OlderShard"])
def test_the_same_seed_does_the_same(directory: Path, tmp_path: Path, name: str) -> None:
    twin = tmp_path / "twin"
    shutil.copytree(directory, twin)
    torch.manual_seed(1)
    first = plant(name, directory)
    torch.manual_seed(2)
    assert plant(name, twin) == first != []
    assert [file.name for file in sorted(directory.iterdir())] == [file.name for file in sorted(twin.iterdir())]
    assert all((twin / file.name).read_bytes() == file.read_bytes() for file in directory.iterdir())


def test_faults_compose(directory: Path) -> None:
    changed = plant_files(faults_from("sim:H1+H13,which=rope_theta+H7"), directory)
    assert list(changed) == ["H1", "H13", "H7"]
    assert others(directory) == sorted([*changed["H1"], *changed["H7"]])


def test_a_directory_without_anything_to_change_is_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in [*FILE_ROWS, *(f"{OUTSIDE}:{each}" for each in ("ExpertsSwapped", "OlderShard", "StaleTokenizer"))]:
        assert plant(name, tmp_path) == []
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("H1,tensor=*absent*", "no tensor fits"),
        ("H7,tensor=*absent*", "no tensor fits"),
        ("H6,tensor=absent", "no tensor fits"),
        ("N1", "acts on a chip and not on files"),
        ("H13,which=rope_parameters", "say what it becomes"),
    ],
)
def test_what_cannot_be_planted_is_refused(directory: Path, spec: str, words: str) -> None:
    with pytest.raises(ChipError, match=words.replace("*", ".")):
        plant(spec, directory)
    assert others(directory) == []


def test_a_cut_file_and_a_missing_directory_are_named(directory: Path, tmp_path: Path) -> None:
    file = directory / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ChipError, match=r"model-00001-of-00002\.safetensors cannot be read"):
        plant("H1", directory)
    (directory / "config.json").write_text("[1")
    with pytest.raises(ChipError, match=r"config\.json cannot be read"):
        plant("H13", directory)
    for name in ("H1", "H13"):
        with pytest.raises(ChipError, match="there is no directory"):
            plant(name, tmp_path / "absent")
