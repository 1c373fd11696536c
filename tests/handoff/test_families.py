"""What a directory of a published family must hold, against what transformers really writes."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from crosschip.errors import CrosschipError, HandoffError
from crosschip.golden.config_fields import compare_fields
from crosschip.handoff import bundles
from crosschip.handoff.export import export_model
from crosschip.handoff.families import expected_tensors
from crosschip.handoff.handing_off import hand_off
from crosschip.handoff.source import open_source
from crosschip.handoff.targets import TARGETS
from crosschip.model import save_model
from crosschip.rundir import COMPLETE
from tests.handoff.conversion.models import FAMILY, SQUARE, save_family
from tests.model.configs import random_model

LATENT = {
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
GROUPS = {"num_nextn_predict_layers": 0, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
EXPERTS = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
UP_PROJ = "model.layers.1.mlp.up_proj.weight"
Tensors = dict[str, torch.Tensor]


def changed(directory: Path, how: Callable[[Tensors], object]) -> Path:
    tensors = load_file(directory / "model.safetensors")
    how(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("Llama", {}),
        ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("Mistral", {"head_dim": 24}),
        ("Qwen2", {}),
        ("Qwen3", {"attention_bias": True, "head_dim": 24}),
        ("Qwen3Moe", {**EXPERTS, "mlp_only_layers": [0], "decoder_sparse_step": 1}),
        ("Qwen3Moe", {**EXPERTS, "decoder_sparse_step": 2}),
        ("Qwen3Moe", {key: value for key, value in EXPERTS.items() if key != "head_dim"}),  # the width over the heads
        ("DeepseekV2", {**LATENT, "q_lora_rank": None}),
        ("DeepseekV2", {**LATENT, "q_lora_rank": None, "mlp_bias": True}),
        ("DeepseekV2", {**LATENT, "q_lora_rank": 24, "n_shared_experts": 2, "attention_bias": True}),
        ("DeepseekV3", {**LATENT, **GROUPS, "q_lora_rank": 24, "n_shared_experts": 2}),
        ("DeepseekV3", {**LATENT, **GROUPS, "q_lora_rank": None, "n_shared_experts": 1, "attention_bias": True}),
    ],
)
def test_the_declaration_is_what_transformers_writes(tmp_path: Path, kind: str, fields: dict[str, Any]) -> None:
    import transformers

    config = getattr(transformers, f"{kind}Config")(**{**FAMILY, **fields})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    written = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    expected = expected_tensors(json.loads((tmp_path / "config.json").read_text()))
    assert expected is not None
    if fields.get("tie_word_embeddings"):
        expected.pop("lm_head.weight")
    assert expected == written
    assert set(open_source(tmp_path).tensors.names()) == set(written)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (lambda t: t.pop("lm_head.weight"), "lacks 1 tensors, the first: lm_head.weight"),
        (
            lambda t: [t.pop(f"model.layers.{layer}.mlp.up_proj.weight") for layer in range(3)],
            "lacks 3 tensors, the first: model.layers.0.mlp.up_proj.weight",
        ),
        (
            lambda t: t.update({"model.layers.1.self_attn.q_norm.weight": torch.ones(16)}),
            "holds 1 tensors that a llama of this config.json does not have, the first: model.layers.1.self_attn.q_",
        ),
        (
            lambda t: t.update({UP_PROJ: torch.ones(100, 64)}),
            f"{UP_PROJ} has shape [100, 64], config.json means [128, 64]",
        ),
    ],
)
def test_a_tensor_that_readers_would_make_up_or_pass_over_is_named(
    tmp_path: Path, how: Callable[[Tensors], object], words: str
) -> None:
    directory = changed(save_family("llama", tmp_path), how)
    with pytest.raises(HandoffError) as refused:
        open_source(directory)
    assert words in refused.value.problem


@pytest.mark.parametrize(("field", "value"), [("hidden_size", None), ("num_hidden_layers", "three")])
def test_a_field_that_says_no_shape_is_named(tmp_path: Path, field: str, value: object) -> None:
    path = save_family("llama", tmp_path) / "config.json"
    document = {**json.loads(path.read_text()), field: value}
    path.write_text(json.dumps({key: each for key, each in document.items() if each is not None}))
    with pytest.raises(HandoffError, match=f"no field '{field}'" if value is None else "num_hidden_layers = 'three'"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("llama", "num_attention_heads", 0),
        ("llama", "head_dim", 0),
        ("llama", "num_key_value_heads", "2"),
        ("llama", "hidden_size", -64),
        ("qwen3_moe", "decoder_sparse_step", 0),
        ("qwen3_moe", "num_experts", -1),
        ("qwen3_moe", "mlp_only_layers", 0.5),
        ("deepseek_v2", "moe_layer_freq", 0),
        ("deepseek_v2", "q_lora_rank", [24]),
        ("deepseek_v2", "first_k_dense_replace", "one"),
        ("deepseek_v2", "n_routed_experts", 4.0),
        ("deepseek_v2", "n_shared_experts", -1),
    ],
)
def test_a_number_that_counts_nothing_is_refused_by_its_field(kind: str, field: str, value: object) -> None:
    config: dict[str, Any] = {"model_type": kind, **FAMILY, **(EXPERTS if kind == "qwen3_moe" else LATENT)}
    config |= {"first_k_dense_replace": 0} if kind == "deepseek_v2" else {}
    assert expected_tensors(config)
    with pytest.raises(HandoffError) as refused:
        expected_tensors({**config, field: value})
    assert f"config.json has {field} = {value!r}, which is no " in refused.value.problem


def test_prediction_modules_that_transformers_left_out_are_told_from_a_broken_download(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    save_model(random_model(SQUARE), directory)
    later = f"model.layers.{SQUARE.num_hidden_layers}."
    changed(directory, lambda t: [t.pop(name) for name in list(t) if name.startswith(later)])
    with pytest.raises(HandoffError, match="num_nextn_predict_layers = 1 and the files hold nothing of") as refused:
        open_source(directory)
    assert "set num_nextn_predict_layers to 0" in refused.value.remedy


def test_what_transformers_leaves_out_and_other_engines_need_is_written_out(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    save_model(random_model(replace(SQUARE, num_nextn_predict_layers=0)), directory)
    path = directory / "config.json"
    written = json.loads(path.read_text())
    left_out = ("topk_method", "scoring_func")
    path.write_text(json.dumps({key: value for key, value in written.items() if key not in left_out}))
    made = hand_off(directory, "hf", chip="cpu")
    config = json.loads((made.directory / "config.json").read_text())
    assert [config[key] for key in left_out] == ["noaux_tc", "sigmoid"]
    (fields,) = [each for each in made.certificate.document["gates"] if each["name"] == "configuration fields"]
    assert fields["verdict"] == "PASS", fields["message"]


def test_a_field_that_is_lost_differs_and_one_that_is_written_out_does_not() -> None:
    silent, said = {"topk_method": None}, {"topk_method": "noaux_tc"}
    assert compare_fields(silent, said) == []
    assert [each.field for each in compare_fields(said, silent)] == ["topk_method"]
    assert [each.field for each in compare_fields(silent, {"topk_method": "greedy"})] == ["topk_method"]
    assert [each.field for each in compare_fields({}, said)] == ["topk_method"], "of another architecture"


@pytest.mark.parametrize("target", ["hf", "w8a8"])
def test_a_number_that_is_none_is_refused_by_the_tensors_name(tmp_path: Path, target: str) -> None:
    directory = changed(save_family("llama", tmp_path / "model"), lambda t: t[UP_PROJ][3, 4].fill_(float("nan")))
    with pytest.raises(CrosschipError, match=f"{UP_PROJ} holds NaN or infinity"):
        hand_off(directory, target, engines=["transformers"], chip="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing is left, no bundle either"


def test_a_bundle_that_was_there_before_a_refused_handoff_stays(tmp_path: Path) -> None:
    directory = save_family("llama", tmp_path / "model")
    hand_off(directory, "hf", engines=["transformers"], chip="cpu")
    out = tmp_path / "model-hf"
    shutil.rmtree(out)
    held = tmp_path / ".model-hf.partial"
    held.mkdir()
    lock = os.open(held, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(HandoffError, match="another process writes"):
        hand_off(directory, "hf", engines=["transformers"], chip="cpu")
    os.close(lock)
    assert (tmp_path / "model-hf-golden" / "COMPLETE").is_file()


@pytest.mark.parametrize(
    ("to", "out", "words"),
    [
        ("hf", "model", "holds the model that is handed off"),
        ("hf", "mine", "is not an export"),
        ("gguf", "out", "tokenizer.json"),
    ],
)
def test_what_is_refused_is_refused_before_a_bundle_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, out: str, words: str
) -> None:
    directory = save_family("llama", tmp_path / "model")
    (tmp_path / "mine").mkdir()
    monkeypatch.setattr(bundles, "record", lambda *each, **more: pytest.fail("a bundle was recorded"))
    with pytest.raises(CrosschipError, match=words):
        hand_off(directory, to, out=tmp_path / out, chip="cpu")


def test_a_quantiser_names_the_tensor_it_cannot_take(tmp_path: Path) -> None:
    directory = changed(save_family("llama", tmp_path / "model"), lambda t: t[UP_PROJ][3, 4].fill_(float("inf")))
    with pytest.raises(CrosschipError, match=f"{UP_PROJ}: a weight holds NaN or infinity"):
        export_model(open_source(directory), TARGETS["w8a8"], tmp_path / "out")


FULL = "No space left on device"


@pytest.mark.parametrize("error", [SafetensorError(f"Error while serializing: I/O error: {FULL}"), OSError(28, FULL)])
def test_a_disk_that_fills_while_the_bundle_is_recorded_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*words: object, **settings: object) -> None:
        raise error

    monkeypatch.setattr(bundles, "record", full)
    with pytest.raises(HandoffError, match=rf"model-hf-golden failed: .*{FULL}") as refused:
        hand_off(save_family("llama", tmp_path / "model"), "hf", engines=["transformers"], chip="cpu")
    assert f"make room in {tmp_path}," in refused.value.remedy


def test_what_is_multiplied_out_to_record_from_lies_beside_the_bundle_and_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = export_model(open_source(save_family("llama", tmp_path / "model")), TARGETS["w8a8"], tmp_path / "w8a8")
    seen: list[Path] = []

    def full(directory: Path, *words: object, **settings: object) -> None:
        assert (directory / "model.safetensors").is_file()
        seen.append(directory)
        raise OSError(28, FULL)

    monkeypatch.setattr(bundles, "record", full)
    place = tmp_path / "elsewhere"
    with pytest.raises(HandoffError, match=FULL):
        hand_off(model, "hf", out=place / "hf", engines=["transformers"], chip="cpu")
    assert [each.parent for each in seen] == [place]
    assert list(place.iterdir()) == []
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(HandoffError, match=f"{place} has 10 B free, the files need"):
        hand_off(model, "hf", out=place / "hf", engines=["transformers"], chip="cpu")
    assert (len(seen), list(place.iterdir())) == (1, [])


def test_a_quantised_model_of_another_family_is_a_source(tmp_path: Path) -> None:
    first = hand_off(save_family("llama", tmp_path / "model"), "w8a8", engines=["transformers"], chip="cpu")
    second = hand_off(first.directory, "fp8", engines=["transformers"], chip="cpu")
    gates = {each["name"]: each["verdict"] for each in second.certificate.document["gates"]}
    assert gates["tensor manifest"] == gates["golden replay"] == "PASS"


@pytest.mark.parametrize("out", ["model", "."])
def test_a_model_is_never_replaced_by_what_is_made_of_it(tmp_path: Path, out: str) -> None:
    directory = save_family("llama", tmp_path / "model")
    (tmp_path / out / COMPLETE).touch()
    with pytest.raises(HandoffError, match="holds the model that is handed off"):
        export_model(open_source(directory), TARGETS["w8a8"], tmp_path / out)
    assert (directory / "model.safetensors").is_file()


def linear(directory: Path) -> Path:
    """A DeepSeek-V3 with modules of multi-token prediction that our model does not compute: rotary parts are scaled."""
    save_model(random_model(SQUARE), directory)
    document = json.loads((directory / "config.json").read_text())
    document.pop("rope_parameters")
    document["rope_scaling"] = {"type": "linear", "factor": 2.0}
    (directory / "config.json").write_text(json.dumps(document))
    return directory


def test_a_variant_of_v3_that_our_model_does_not_compute_passes_whole(tmp_path: Path) -> None:
    source = open_source(linear(tmp_path))
    assert (source.settings, "model.layers.2.eh_proj.weight" in source.tensors.names()) == (None, True)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.kv_a_layernorm.weight", BIAS])
def test_a_variant_of_v3_that_lacks_a_tensor_is_refused(tmp_path: Path, name: str) -> None:
    directory = changed(linear(tmp_path), lambda tensors: tensors.pop(name))
    with pytest.raises(HandoffError, match=f"lacks 1 tensors, the first: {name}"):
        open_source(directory)


def test_a_variant_of_v3_that_chooses_experts_otherwise_needs_no_bias_of_the_router(tmp_path: Path) -> None:
    directory = changed(linear(tmp_path), lambda tensors: tensors.pop(BIAS))
    document = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**document, "topk_method": "group_limited_greedy"}))
    assert open_source(directory).settings is None


def test_a_variant_of_v3_with_a_tensor_too_many_is_refused(tmp_path: Path) -> None:
    directory = changed(linear(tmp_path), lambda tensors: tensors.update({"model.extra.weight": torch.ones(3)}))
    with pytest.raises(HandoffError, match=r"does not have, the first: model\.extra\.weight"):
        open_source(directory)
