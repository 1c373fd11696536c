"""What cannot be a GGUF file is refused by name, and broken input does not become half a file."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from crosschip.errors import HandoffError
from crosschip.handoff.gguf import GgufSource, export_gguf, imported
from crosschip.handoff.gguf.architectures import architecture_of
from crosschip.handoff.source import open_source
from crosschip.handoff.targets.gguf import GGUF, GGUF_FILE, GGUF_Q8_0
from tests.handoff.gguf.conftest import DEEPSEEK, SAME_MSCALE, Made

CONFIG = DEEPSEEK.to_hf()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"q_lora_rank": None}, "q_lora_rank = None; with 3 layers"),
        ({"num_hidden_layers": 27}, "q_lora_rank = 24; with 27 layers"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"n_shared_experts": 0}, "n_shared_experts = 0"),
        ({"n_routed_experts": 0}, "n_routed_experts = 0"),
        ({"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        ({"topk_method": "greedy"}, "topk_method = 'greedy'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq = 2"),
        ({"rope_scaling": {**SAME_MSCALE, "mscale": 1.0}}, "mscale = 1.0, mscale_all_dim = 0.707"),
        ({"rope_scaling": {**SAME_MSCALE, "mscale": 0, "mscale_all_dim": 0}}, "must be the same and not 0"),
        ({"rope_scaling": {**SAME_MSCALE, "truncate": False}}, "rope_scaling.truncate = False"),
        ({"rope_scaling": {**SAME_MSCALE, "attention_factor": 1.2}}, "rope_scaling.attention_factor = 1.2"),
        ({"rope_scaling": {**SAME_MSCALE, "new": 3}}, "rope_scaling.new = 3"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type = 'linear'"),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, "rope_scaling.type = 'llama3'"),
        ({"rope_scaling": {"type": "yarn"}}, "no factor"),
        ({"rope_theta": 5.0}, "several values of rope_theta"),
        ({"logit_soft_cap": 30.0}, "logit_soft_cap = 30.0 is not known here"),
        ({"kv_lora_rank": "many"}, "wrong kind"),
        ({"model_type": "mamba"}, "model_type 'mamba'"),
    ],
)
def test_fields_without_a_key_are_named(fields: dict[str, Any], words: str) -> None:
    config = {**CONFIG, **fields}
    if "rope_scaling" in fields:
        config["rope_parameters"] = None
    with pytest.raises(HandoffError) as refused:
        architecture_of(config).check(config)
    assert words in str(refused.value)


def test_a_model_without_a_low_rank_of_its_queries_may_have_26_layers() -> None:
    config = {**CONFIG, "q_lora_rank": None, "num_hidden_layers": 26}
    architecture_of(config).check(config)


def test_a_missing_field_is_named() -> None:
    config = {name: value for name, value in CONFIG.items() if name != "kv_lora_rank"}
    with pytest.raises(HandoffError, match="no field 'kv_lora_rank'"):
        architecture_of(config).check(config)


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("llama", {"attention_bias": True}, "attention_bias = True"),
        ("llama", {"mlp_bias": True}, "mlp_bias = True"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("llama", {"rope_theta": 1e39}, "a field of the wrong kind: float too large"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.low_freq_factor is missing"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "rope_scaling.type = 'linear'"),
        ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'; it was not tried"),
    ],
)
def test_fields_of_dense_models_are_named(kind: str, fields: dict[str, Any], words: str) -> None:
    config = {
        "model_type": kind,
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
    }
    architecture_of(config).check(config)
    with pytest.raises(HandoffError) as refused:
        architecture_of(config).check({**config, **fields})
    assert words in str(refused.value)


Change = Callable[[dict[str, Any]], object]


def changed(directory: Path, change: Change, file: str = "tokenizer.json") -> None:
    document = json.loads((directory / file).read_text(encoding="utf-8"))
    change(document)
    (directory / file).write_text(json.dumps(document), encoding="utf-8")


def digits_in_threes(document: dict[str, Any]) -> None:
    document["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = False


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (digits_in_threes, "no name for"),
        (lambda document: document.update(pre_tokenizer=None), "no name for: none"),
        (lambda document: document.update(normalizer={"type": "Lowercase"}), "normalises text (Lowercase)"),
        (lambda document: document["model"].update(type="Unigram"), "a Unigram tokenizer"),
        (lambda document: document["model"].update(byte_fallback=True), "with byte fallback"),
        (lambda document: document["model"].update(end_of_word_suffix="</w>"), "model.end_of_word_suffix"),
        (lambda document: document["model"]["vocab"].update(surplus=999), "has token 999"),
        (lambda document: document["model"].update(ignore_merges=True), "ignore_merges"),
        (lambda document: document["model"].pop("merges"), "not as expected"),
        (lambda document: document["model"]["vocab"].update(surplus="a text"), "not as expected"),
        (lambda document: document["pre_tokenizer"].update(pretokenizers=["ByteLevel"]), "not as expected"),
    ],
)
def test_tokenizers_that_would_make_other_tokens_are_refused(deepseek: Made, change: Change, words: str) -> None:
    directory = deepseek()
    changed(directory, change)
    source = open_source(directory)
    with pytest.raises(HandoffError) as refused:
        export_gguf(source.tensors, source.config, source.tokenizer_files, directory / "x.gguf", "float32")
    assert words in str(refused.value)
    assert not (directory / "x.gguf").exists()


def test_a_tokenizer_that_is_missing_or_cut_is_refused(deepseek: Made) -> None:
    directory = deepseek()
    text = (directory / "tokenizer.json").read_text()
    (directory / "tokenizer.json").write_text(text[: len(text) // 2])
    with pytest.raises(HandoffError, match="cannot be read"):
        exported(directory)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(HandoffError, match=r"tokenizer\.json is missing"):
        exported(directory)


def exported(directory: Path, dtype: str = "float32") -> Path:
    source, path = open_source(directory), directory / "x.gguf"
    export_gguf(source.tensors, source.config, source.tokenizer_files, path, dtype)
    return path


def test_a_dtype_that_is_not_written(deepseek: Made) -> None:
    with pytest.raises(HandoffError, match="'q4_0' is not written here"):
        exported(deepseek(), "q4_0")


@pytest.mark.parametrize(
    ("value", "dtype", "words"),
    [
        (float("nan"), "float32", "not finite"),
        (float("inf"), "q8_0", "not finite"),
        (1e9, "q8_0", "too large for the scales"),
        (3.4e38, "bfloat16", "too large for bfloat16"),
    ],
)
def test_numbers_that_the_form_cannot_hold_are_refused(deepseek: Made, value: float, dtype: str, words: str) -> None:
    directory = deepseek()
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.2.mlp.experts.1.up_proj.weight"][3, 5] = value
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(HandoffError) as refused:
        exported(directory, dtype)
    assert words in str(refused.value)
    assert "blk.2.ffn_up_exps.weight" in str(refused.value)


@pytest.mark.parametrize("change", ["missing", "surplus", "shape"])
def test_tensors_that_do_not_fit_the_architecture_are_refused(deepseek: Made, change: str) -> None:
    directory = deepseek()
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    if change == "missing":
        del tensors[name]
    elif change == "surplus":
        tensors["model.layers.1.self_attn.strange.weight"] = torch.zeros(2)
    else:
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(HandoffError):
        exported(directory)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.98])
def test_a_file_that_was_cut_is_refused(deepseek: Made, share: float) -> None:
    path = exported(deepseek())
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(HandoffError, match=r"cannot be read as GGUF|was cut"):
        imported(path)


def test_files_that_are_no_gguf_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HandoffError, match="cannot be read"):
        GgufSource(tmp_path / "nothing.gguf")
    (tmp_path / "text.gguf").write_text("a text of some length, which is no model")
    with pytest.raises(HandoffError, match="cannot be read"):
        GgufSource(tmp_path / "text.gguf")


def test_the_target_writes_a_directory(deepseek: Made, tmp_path: Path) -> None:
    directory, told = deepseek(num_nextn_predict_layers=1), list[str]()
    for target in (GGUF, GGUF_Q8_0):
        out = tmp_path / target.name
        out.mkdir()
        (out / GGUF_FILE).write_bytes(b"half of a conversion that was interrupted")
        target.export(open_source(directory), out, "float32", told.append)
        kind = GgufSource(out / GGUF_FILE).kind("blk.0.ffn_up.weight")
        assert kind == ("F32" if target is GGUF else "Q8_0")
        assert {"config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"} <= {
            path.name for path in out.iterdir()
        }
        (note,) = json.loads((out / "not_in_the_file.json").read_text())["not_in_the_file"]
        assert "multi-token prediction" in note
    assert any("not in the file" in line for line in told)


def test_a_target_that_cannot_be_written_says_so(deepseek: Made, tmp_path: Path) -> None:
    source = open_source(deepseek())
    with pytest.raises(HandoffError, match="cannot be written"):
        export_gguf(source.tensors, source.config, source.tokenizer_files, tmp_path / "no" / "x.gguf", "float32")


def test_the_converter_is_a_program_too(deepseek: Made, tmp_path: Path) -> None:
    def convert(model: Path) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "crosschip.handoff.gguf", str(model), "--outfile", str(tmp_path / "a.gguf")]
        return subprocess.run(words, stdout=subprocess.PIPE, text=True)

    directory = deepseek()
    assert convert(directory).returncode == 0
    assert GgufSource(tmp_path / "a.gguf").architecture == "deepseek2"
    before = (tmp_path / "a.gguf").read_bytes()
    shutil.copytree(directory, tmp_path / "other")
    changed(tmp_path / "other", lambda document: document.update(scoring_func="softmax"), "config.json")
    failed = convert(tmp_path / "other")
    assert failed.returncode == 2
    assert "Error" in failed.stdout
    assert "scoring_func" in failed.stdout
    assert (tmp_path / "a.gguf").read_bytes() == before
    assert not list(tmp_path.glob("*.unfinished"))
