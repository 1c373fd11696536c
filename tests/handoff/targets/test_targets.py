"""The files of each target: what they hold, what other readers make of them, and what the golden replay says."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from crosschip.chips import find_chip
from crosschip.errors import HandoffError, RunDirectoryError
from crosschip.golden.bundle import load_bundle
from crosschip.golden.record import RecordPlan, record
from crosschip.golden.replay import replay
from crosschip.golden.training_curve import CurvePlan
from crosschip.handoff.certificate.arrived import open_arrived
from crosschip.handoff.certificate.fields import fields_gate
from crosschip.handoff.certificate.tensors import manifest_gate
from crosschip.handoff.conversion.declared import is_quantised_weight
from crosschip.handoff.export import export_model
from crosschip.handoff.source import open_source
from crosschip.handoff.targets import TARGETS
from crosschip.model import save_model
from tests.handoff.conversion.models import FAMILY, SQUARE, save_family
from tests.model.configs import random_model

PLAN = RecordPlan(max_tokens=700, reorderings=1, curve=CurvePlan(num_steps=0))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("targets") / "model"
    save_model(random_model(SQUARE), directory)
    return directory


def config_of(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


def dtypes_of(directory: Path) -> dict[str, str]:
    with safe_open(directory / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


def test_fp8_is_written_as_deepseek_publishes(published: Path, tmp_path: Path) -> None:
    out = export_model(open_source(published), TARGETS["fp8"], tmp_path / "out")
    settings = config_of(out)["quantization_config"]
    kept = settings.pop("modules_to_not_convert")
    assert {"lm_head", "model.layers.1.mlp.gate", "model.layers.2.eh_proj"} <= set(kept)
    assert settings == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
    }
    assert config_of(out)["torch_dtype"] == "bfloat16"
    dtypes = dtypes_of(out)
    for name, dtype in dtypes.items():
        if is_quantised_weight(name):
            assert (dtype, dtypes[f"{name}_scale_inv"]) == ("F8_E4M3", "F32")
        elif name.endswith(("_scale_inv", "e_score_correction_bias")):
            assert dtype == "F32"
        else:
            assert dtype == "BF16"


def test_w8a8_names_every_matrix_that_is_not_int8_in_its_ignore_list(published: Path, tmp_path: Path) -> None:
    out = export_model(open_source(published), TARGETS["w8a8"], tmp_path / "out")
    settings = config_of(out)["quantization_config"]
    assert settings["format"] == "int-quantized"
    assert settings["config_groups"]["group_0"]["input_activations"]["dynamic"] is True
    dtypes = dtypes_of(out)
    with safe_open(out / "model.safetensors", "pt") as file:
        matrices = {name for name in dtypes if len(file.get_slice(name).get_shape()) == 2 and "_scale" not in name}
    kept = {name.removesuffix(".weight") for name in matrices if dtypes[name] != "I8"}
    assert kept - set(settings["ignore"]) == {"model.embed_tokens", "model.layers.2.embed_tokens"}
    assert {"lm_head", "model.layers.1.mlp.gate", "model.layers.2.eh_proj"} <= set(settings["ignore"])
    for name in matrices - {f"{name}.weight" for name in kept}:
        assert dtypes[f"{name}_scale"] == "F32"


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("kind", ["fp8", "w8a8"])
def test_other_families_are_quantised_alike(family: str, kind: str, tmp_path: Path) -> None:
    source = open_source(save_family(family, tmp_path / "model"))
    out = export_model(source, TARGETS[kind], tmp_path / "out")
    stored = [name for name, dtype in dtypes_of(out).items() if dtype in ("F8_E4M3", "I8")]
    assert len(stored) == 3 * 7
    settings = config_of(out)["quantization_config"]
    assert settings["ignore" if kind == "w8a8" else "modules_to_not_convert"] == ["lm_head"]


def test_the_routers_of_qwen3_are_named_as_not_quantised_and_transformers_leaves_them(tmp_path: Path) -> None:
    import transformers
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

    fields = {**FAMILY, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = transformers.Qwen3MoeConfig(**fields)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "model")
    kept = [f"model.layers.{layer}.mlp.gate" for layer in range(config.num_hidden_layers)]
    names = {}
    for kind, field in (("w8a8", "ignore"), ("fp8", "modules_to_not_convert")):
        out = export_model(open_source(tmp_path / "model"), TARGETS[kind], tmp_path / kind)
        names[kind] = config_of(out)["quantization_config"][field]
        assert open_source(out).quantised is not None
    assert names["fp8"] == names["w8a8"] == ["lm_head", *kept]
    settings = transformers.FineGrainedFP8Config(**config_of(tmp_path / "fp8")["quantization_config"])
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM(config)
    replaced = replace_with_fp8_linear(model, settings.modules_to_not_convert, settings, pre_quantized=True)
    kinds = {name: type(module).__name__ for name, module in replaced.named_modules()}
    assert {kinds[name] for name in ("lm_head", *kept)}.isdisjoint({"FP8Linear"})
    assert kinds["model.layers.0.self_attn.q_proj"] == "FP8Linear"


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_transformers_answers_alike_after_fp32(family: str, tmp_path: Path) -> None:
    import transformers

    directory = save_family(family, tmp_path / "model", tied=True)
    out = export_model(open_source(directory), TARGETS["hf"], tmp_path / "out", "float32")
    ids = torch.arange(20)[None]
    one, other = (transformers.AutoModelForCausalLM.from_pretrained(each) for each in (directory, out))
    assert torch.equal(one(ids).logits, other(ids).logits)


@pytest.mark.parametrize("query_rank", [24, None])
def test_rotary_halves_leave_in_pairs_which_engines_rotate_whatever_config_says(
    query_rank: int | None, tmp_path: Path
) -> None:
    import transformers

    settings = replace(SQUARE, rope_interleave=False, attention_bias=True, q_lora_rank=query_rank)
    save_model(random_model(settings), tmp_path / "halves")
    out = export_model(open_source(tmp_path / "halves"), TARGETS["hf"], tmp_path / "out", "float32")
    assert config_of(out)["rope_interleave"] is True
    ids = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    models = [transformers.AutoModelForCausalLM.from_pretrained(each) for each in (tmp_path / "halves", out)]
    logits = [model(ids).logits for model in models]
    assert torch.allclose(*logits, atol=1e-5)
    models[0].config.rope_interleave = True  # as an engine that does not read the field
    assert not torch.allclose(models[0](ids).logits, logits[0], atol=1e-2)
    back = open_arrived(out, {"rope_interleave": False})
    for name, tensor in load_file(tmp_path / "halves" / "model.safetensors").items():
        assert torch.equal(back.tensors.read(name), tensor), name


def test_a_certificate_covers_rotary_parts_that_were_turned_and_sees_those_that_were_not(tmp_path: Path) -> None:
    save_model(random_model(replace(SQUARE, rope_interleave=False)), tmp_path / "halves")
    source = open_source(tmp_path / "halves")
    record(tmp_path / "halves", find_chip("cpu"), tmp_path / "bundle", plan=PLAN)
    bundle = load_bundle(tmp_path / "bundle")
    out = export_model(source, TARGETS["w8a8"], tmp_path / "out")
    for like in (source.config, {"rope_interleave": False}):  # with the source at hand, and where only the bundle is
        arrived = open_arrived(out, like)
        assert manifest_gate(bundle, arrived.tensors, source=source.tensors, quantised="int8")[0].verdict == "PASS"
        assert fields_gate(bundle, arrived.config)[0].verdict == "PASS"
    plain = export_model(source, TARGETS["hf"], tmp_path / "plain", "float32")
    (plain / "model.safetensors").write_bytes((tmp_path / "halves" / "model.safetensors").read_bytes())
    gate, _ = manifest_gate(bundle, open_arrived(plain, source.config).tensors)
    assert (gate.verdict, gate.subject) == ("FAIL", "model.layers.0.self_attn.kv_a_proj_with_mqa.weight")


def test_an_architecture_that_would_be_quantised_by_half_is_refused(tmp_path: Path) -> None:
    directory = save_family("llama", tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.0.block_sparse_moe.experts.0.w1.weight"] = torch.zeros(4, 4)
    save_file(tensors, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "made_up"}))
    with pytest.raises(HandoffError, match=r"experts\.0\.w1\.weight \[4, 4\] is named like no weight"):
        export_model(open_source(directory), TARGETS["w8a8"], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_dtype_that_a_target_has_not_and_a_foreign_directory_are_refused(published: Path, tmp_path: Path) -> None:
    with pytest.raises(HandoffError, match=r"hf is not written in float16.*"):
        export_model(open_source(published), TARGETS["hf"], tmp_path / "out", "float16")
    (tmp_path / "mine").mkdir()
    with pytest.raises(RunDirectoryError, match="not an export"):
        export_model(open_source(published), TARGETS["hf"], tmp_path / "mine")
    (tmp_path / "file").write_text("")
    with pytest.raises(HandoffError, match=r"writing .* failed"):
        export_model(open_source(published), TARGETS["hf"], tmp_path / "file" / "out")


def test_two_processes_do_not_write_the_same_place(published: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    held = os.open(tmp_path / ".out.partial", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(HandoffError, match="another process writes"):
        export_model(open_source(published), TARGETS["hf"], tmp_path / "out")
    os.close(held)
    assert export_model(open_source(published), TARGETS["hf"], tmp_path / "out").is_dir()


def test_a_failed_export_leaves_the_older_one_and_nothing_else(published: Path, tmp_path: Path, monkeypatch) -> None:
    out = export_model(open_source(published), TARGETS["hf"], tmp_path / "out", "float32")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    broken = open_source(published)
    monkeypatch.setattr(broken.tensors, "read", lambda name: (_ for _ in ()).throw(OSError("the disk is gone")))
    with pytest.raises(HandoffError, match="the disk is gone"):
        export_model(broken, TARGETS["hf"], out, "bfloat16")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture(scope="module")
def bundle_dir(published: Path) -> Path:
    torch.set_num_threads(1)
    record(published, find_chip("cpu"), published.parent / "bundle", plan=PLAN)
    return published.parent / "bundle"


def mean_kl(bundle_dir: Path, directory: Path, key: str) -> tuple[float, float]:
    """The upper bound of the mean KL of our own replay, and its limit."""
    torch.set_num_threads(1)
    comparison = replay(load_bundle(bundle_dir), directory, find_chip("cpu"), quantised=key, with_curve=False)
    return comparison.views[0].kl.upper_95, comparison.limit.mean_kl


@pytest.mark.parametrize(("kind", "key"), [("fp8", "fp8"), ("w8a8", "int8")])
def test_the_golden_replay_of_a_quantised_model_is_below_its_limit_and_without_its_scales_above(
    kind: str, key: str, published: Path, bundle_dir: Path, tmp_path: Path
) -> None:
    out = export_model(open_source(published), TARGETS[kind], tmp_path / "out", "float32")
    assert TARGETS[kind].quantised == key
    honest, limit = mean_kl(bundle_dir, out, key)
    plain = export_model(open_source(out), TARGETS["hf"], tmp_path / "plain", "float32")
    in_fp32, _ = mean_kl(bundle_dir, plain, key)
    tensors = load_file(out / "model.safetensors")
    dropped = {name: torch.ones_like(each) if "_scale" in name else each for name, each in tensors.items()}
    save_file(dropped, out / "model.safetensors")
    without, _ = mean_kl(bundle_dir, out, key)
    print(f"{kind}: KL {honest:.2e} in bf16, {in_fp32:.2e} in fp32, {without:.2e} without scales, limit {limit:g}")
    assert max(honest, in_fp32) < limit
    assert without > 10 * limit


def test_the_bias_of_the_router_and_the_small_files_are_kept(published: Path, tmp_path: Path) -> None:
    (published / "tokenizer.json").write_text('{"made": "up"}')
    out = export_model(open_source(published), TARGETS["hf"], tmp_path / "out", "bfloat16")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    one, other = (load_file(each / "model.safetensors")[name] for each in (published, out))
    assert torch.equal(one, other)
    assert (out / "tokenizer.json").read_bytes() == (published / "tokenizer.json").read_bytes()
    (published / "tokenizer.json").unlink()
