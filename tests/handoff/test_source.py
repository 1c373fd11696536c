"""What can be a source, what is seen of it, and what is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from crosschip.data import train_tokenizer
from crosschip.errors import CrosschipError, HandoffError, ModelError, RunDirectoryError
from crosschip.handoff.describing import chosen_dtype, described_source
from crosschip.handoff.export import export_model
from crosschip.handoff.source import open_source
from crosschip.handoff.targets import TARGETS
from crosschip.model import ModelConfig, load_model, save_model
from crosschip.model.weights import TensorView, exported_tensors, published_views
from crosschip.rundir import COMPLETE, RunDirectory, atomic_directory
from tests.handoff.conversion.models import SQUARE, save_family, save_training_checkpoint
from tests.model.configs import random_model


@pytest.fixture
def published(tmp_path: Path) -> Path:
    save_model(random_model(SQUARE), tmp_path / "model")
    return tmp_path / "model"


def run_with(tmp_path: Path, stages: dict[str, tuple[int, ...]]) -> Path:
    """A run with training checkpoints at these steps; each step is its own model."""
    run = RunDirectory(tmp_path / "run")
    with atomic_directory(run.tokenizer) as directory:
        train_tokenizer(["1 + 2 = 3"] * 20, 280).save(directory)
    for stage, steps in stages.items():
        for step in steps:
            with atomic_directory(run.stage(stage) / "checkpoints" / f"step-{step:08d}") as directory:
                save_training_checkpoint(random_model(SQUARE, seed=step), directory)
    return run.path


def edit(directory: Path, **fields: object) -> None:
    document = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**document, **fields}))


def test_a_run_is_its_newest_checkpoint_of_its_last_stage(tmp_path: Path) -> None:
    run = run_with(tmp_path, {"pretrain": (9,), "sft": (2, 3)})
    newest = run / "train" / "sft" / "checkpoints" / "step-00000003"
    source = open_source(run)
    assert source.directory == newest
    assert {path.name for path in source.tokenizer_files} >= {"tokenizer.json", "tokenizer_config.json"}
    expected = dict(exported_tensors(random_model(SQUARE, seed=3)))
    assert set(source.tensors.names()) == set(expected)
    assert all(torch.equal(source.tensors.read(name), tensor) for name, tensor in expected.items())
    (newest / COMPLETE).unlink()
    assert open_source(run).directory.name == "step-00000002"


def test_a_run_without_a_checkpoint_and_a_directory_of_nothing_are_refused(tmp_path: Path) -> None:
    run = run_with(tmp_path, {"pretrain": (1,)})
    (run / "train" / "pretrain" / "checkpoints" / "step-00000001" / COMPLETE).unlink()
    with pytest.raises(RunDirectoryError, match="no complete checkpoint of its last stage, pretrain"):
        open_source(run)
    with pytest.raises(HandoffError, match="there is no directory"):
        open_source(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunDirectoryError, match="neither a model directory"):
        open_source(tmp_path / "empty")


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_other_families_keep_their_names_and_are_not_untied(family: str, tied: bool, tmp_path: Path) -> None:
    directory = save_family(family, tmp_path / "model", dtype=torch.bfloat16, tied=tied)
    expected = load_file(directory / "model.safetensors")
    assert ("lm_head.weight" in expected) is not tied
    out = export_model(open_source(directory), TARGETS["hf"], tmp_path / "out", "bfloat16")
    found = load_file(out / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is tied


def test_a_model_of_a_family_that_lacks_a_tensor_or_a_layer_is_refused(tmp_path: Path) -> None:
    directory = save_family("qwen3", tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.1.self_attn.k_norm.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, directory / "model.safetensors")
    with pytest.raises(HandoffError, match=f"lacks 1 tensors, the first: {name}"):
        open_source(directory)
    save_file({k: v for k, v in tensors.items() if ".layers.2." not in k}, directory / "model.safetensors")
    with pytest.raises(HandoffError, match=r"lacks 11 tensors, the first: model\.layers\.2\."):
        open_source(directory)


def test_a_variant_that_our_model_does_not_compute_is_still_handed_off(published: Path, tmp_path: Path) -> None:
    edit(published, scoring_func="softmax")
    source = open_source(published)
    assert source.settings is None
    out = export_model(source, TARGETS["hf"], tmp_path / "out", "bfloat16")
    assert json.loads((out / "config.json").read_text())["scoring_func"] == "softmax"


def cut(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def doubled(directory: Path) -> None:
    shutil.copyfile(directory / "model.safetensors", directory / "other.safetensors")


def missing(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors.pop("model.layers.1.mlp.experts.2.up_proj.weight")
    save_file(tensors, directory / "model.safetensors")


def not_in_index(directory: Path) -> None:
    weight_map = dict.fromkeys(load_file(directory / "model.safetensors"), "model-00001-of-00002.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def bad_index(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text("[]")


def pickled(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def unexplained(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(torch.int8)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (cut, r"model\.safetensors cannot be read as safetensors"),
        (doubled, r"is in both model\.safetensors and other\.safetensors"),
        (missing, r"lacks 1 tensors, the first: model\.layers\.1\.mlp\.experts\.2\.up_proj\.weight"),
        (not_in_index, r"is in model\.safetensors, model\.safetensors\.index\.json says model-00001"),
        (bad_index, r"index\.json is damaged"),
        (pickled, r"has no \*\.safetensors file, but pytorch_model\.bin"),
        (unexplained, r"mlp\.up_proj\.weight is int8 and .* has no quantization_config"),
        (lambda d: edit(d, quantization_config={"quant_method": "awq"}), "quant_method is 'awq'"),
        (lambda d: edit(d, model_type=None), "names no model_type"),
        (lambda d: (d / "config.json").write_text("[1]"), r"config\.json names no model_type"),
        (lambda d: (d / "config.json").write_text("{"), r"config\.json is not JSON"),
        (lambda d: edit(d, quantization_config={"quant_method": "fp8"}, num_hidden_layers=4), "lacks"),
    ],
)
def test_a_broken_directory_is_refused_by_name(published: Path, how, words: str) -> None:
    how(published)
    with pytest.raises((HandoffError, ModelError, RunDirectoryError), match=words):
        open_source(published)


@pytest.mark.parametrize("kind", ["fp8", "w8a8"])
def test_a_quantised_directory_is_a_source_and_its_numbers_are_those_that_our_model_loads(
    kind: str, published: Path, tmp_path: Path
) -> None:
    stored = export_model(open_source(published), TARGETS[kind], tmp_path / "stored", "float32")
    source = open_source(stored)
    assert source.quantised is not None
    assert source.quantised.kind == kind
    assert "quantization_config" not in source.config
    expected = dict(exported_tensors(load_model(stored, torch.float32)))
    assert set(source.tensors.names()) == set(expected)
    assert all(torch.equal(source.tensors.read(name), tensor) for name, tensor in expected.items())
    plain = export_model(source, TARGETS["hf"], tmp_path / "plain", "float32")
    again = export_model(open_source(plain), TARGETS[kind], tmp_path / "again", "float32")
    one, other = (load_file(each / "model.safetensors") for each in (stored, again))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[n].view(torch.uint8), other[n].view(torch.uint8)) for n in one if one[n].dim())


def test_scales_of_the_wrong_shape_and_the_wrong_dialect_are_refused(published: Path, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    stored = export_model(open_source(published), TARGETS["fp8"], tmp_path / "stored", "bfloat16")
    tensors = load_file(stored / "model.safetensors")
    save_file({**tensors, f"{name}_scale_inv": torch.ones(2, 1)}, stored / "model.safetensors")
    with pytest.raises(CrosschipError, match=f"{name}: scales of shape"):
        open_source(stored)
    codes = tensors[name].float().clamp(-240, 240).to(torch.float8_e4m3fnuz)
    codes.view(torch.uint8)[0, 0] = 0x7F
    save_file({**tensors, name: codes.view(torch.float8_e4m3fn)}, stored / "model.safetensors")
    with pytest.raises(ModelError, match=f"{name} is labelled e4m3fn .*NaN there"):
        open_source(stored).tensors.read(name)
    save_file({**tensors, name: codes}, stored / "model.safetensors")
    assert torch.isfinite(open_source(stored).tensors.read(name)).all()


def test_a_checkpoint_that_is_named_relative_to_it_keeps_its_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = run_with(tmp_path, {"sft": (3,)}) / "train" / "sft" / "checkpoints"
    monkeypatch.chdir(checkpoints)
    source = open_source(Path("step-00000003"))
    assert source.directory == checkpoints / "step-00000003"
    assert "tokenizer.json" in {path.name for path in source.tokenizer_files}


def test_what_lies_among_the_checkpoints_of_a_run_is_none_by_its_beginning_alone(tmp_path: Path) -> None:
    run = run_with(tmp_path, {"sft": (3,)})
    checkpoints = run / "train" / "sft" / "checkpoints"
    with atomic_directory(checkpoints / "step-00000003-hf-golden") as directory:
        (directory / "manifest.json").write_text("{}")
    assert open_source(run).directory == checkpoints / "step-00000003"


def test_a_directory_that_is_called_like_a_checkpoint_is_described(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published.rename(tmp_path / "step-1000")
    monkeypatch.chdir(tmp_path)
    described = described_source(Path("step-1000"), open_source(Path("step-1000")), None)
    assert (described["kind"], described["step"], described["stage"]) == ("directory", 1000, None)


def test_a_tokenizer_of_another_library_goes_along(published: Path, tmp_path: Path) -> None:
    """Kimi's tokens are in tiktoken.model, Mistral's own in tekken.json: the files without them answer nobody."""
    for name in ("tiktoken.model", "tekken.json"):
        (published / name).write_bytes(b"tokens")
    export_model(open_source(published), TARGETS["hf"], tmp_path / "out", "float32")
    assert {"tiktoken.model", "tekken.json"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_where_config_json_is_silent_the_dtype_is_that_of_the_weights(published: Path, tmp_path: Path) -> None:
    save_model(load_model(published), tmp_path / "halves", torch.bfloat16)
    for directory, dtype in ((published, "float32"), (tmp_path / "halves", "bfloat16")):
        document = json.loads((directory / "config.json").read_text())
        for field in ("torch_dtype", "dtype"):
            document.pop(field, None)
        (directory / "config.json").write_text(json.dumps(document))
        assert chosen_dtype(TARGETS["hf"], open_source(directory), None) == dtype


def test_the_layout_is_gone_through_once_however_many_experts(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek-V3 has 46,000 tensors; for each of them all were listed again."""
    calls = []

    def counted(config: ModelConfig) -> Iterator[TensorView]:
        calls.append(config)
        return published_views(config)

    monkeypatch.setattr("crosschip.handoff.source.published_views", counted)
    open_source(published)
    assert len(calls) == 1
