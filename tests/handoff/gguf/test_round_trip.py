"""A model written as GGUF and read back: the same tensors and fields, or what the form costs."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from crosschip.errors import HandoffError
from crosschip.handoff.gguf import GgufSource, differing_keys, export_gguf, imported
from crosschip.handoff.gguf.architectures import architecture_named, architecture_of
from crosschip.handoff.gguf.deepseek2 import reasons_against
from crosschip.handoff.source import open_source
from crosschip.model import ModelConfig, save_model
from tests.handoff.gguf.conftest import LLAMA_3_ROPE, SAME_MSCALE, Made, with_tokenizer
from tests.model.configs import configs, random_model

# Half a step of a block's scale over its largest number, and the scale's own rounding to fp16: 11 bits, or the
# spacing of fp16's subnormals (2^-24) where the scale is below 2^-14, which up to 127 steps multiply.
Q8_0_OF_LARGEST = 0.5 / 127 + 2.0**-11
Q8_0_OF_SUBNORMAL_SCALE = 127 * 2.0**-25
BF16 = 2.0**-8


def written(directory: Path, dtype: str = "float32") -> Path:
    source, path = open_source(directory), directory / f"{dtype}.gguf"
    export_gguf(source.tensors, source.config, source.tokenizer_files, path, dtype)
    return path


def originals(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def read_back(path: Path, like: dict[str, Any] | None = None) -> dict[str, torch.Tensor]:
    tensors, _ = imported(path, like)
    return {name: tensors.read(name) for name in tensors.names()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name].float(), tensor.float()), name


@pytest.mark.parametrize("fields", [{}, {"rope_interleave": False}, {"rope_scaling": SAME_MSCALE}])
def test_every_tensor_of_deepseek_comes_back(deepseek: Made, fields: dict[str, Any]) -> None:
    directory = deepseek(**fields)
    source = open_source(directory)
    assert_same(read_back(written(directory), source.config), originals(directory))


@pytest.mark.parametrize(("kind", "fields"), [("llama", {}), ("qwen3", {}), ("llama", {"tie_word_embeddings": True})])
def test_every_tensor_of_dense_models_comes_back(dense: Made, kind: str, fields: dict[str, Any]) -> None:
    directory = dense(kind, **fields)
    assert_same(read_back(written(directory)), originals(directory))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("llama", "rope.freq_base", "text"),
        ("llama", "attention.layer_norm_rms_epsilon", float("nan")),
        ("llama", "embedding_length", [64, 64]),
        ("llama", "general.crosschip_rope_scaling", "{"),
        ("llama", "general.crosschip_rope_scaling", '{"rope_type": "llama3", "factor": 8.0}'),
        ("llama", "general.crosschip_rope_scaling", '{"rope_type": "llama3", "factor": "eight"}'),
        ("deepseek2", "rope.dimension_count", "text"),
        ("deepseek2", "expert_weights_scale", float("inf")),
    ],
)
def test_a_key_of_a_file_that_is_no_number_is_refused_by_its_name(
    deepseek: Made, dense: Made, name: str, key: str, value: Any
) -> None:
    file = GgufSource(written(dense("llama") if name == "llama" else deepseek()))
    whole = key if key.startswith("general.") else f"{name}.{key}"
    with pytest.raises(HandoffError, match=f"key {key} is "):
        architecture_named(name).fields_of({**file.metadata, whole: value})


def as_llama_cpp_writes(path: Path, factor: float = 8.0) -> Path:
    """The file without our key and the width of a head, its factors computed in fp32."""
    data = path.read_bytes()
    for key in (b"general.crosschip_rope_scaling", b"llama.attention.key_length"):
        assert data.count(key) == 1
        data = data.replace(key, key[:-1] + b"X")
    other = path.with_name("theirs.gguf")
    other.write_bytes(data)
    turns = 24.0 / (2 * torch.pi * 10000.0 ** (torch.arange(0, 16, 2, dtype=torch.float32) / 16))
    smooth = ((turns - 1.0) / 3.0).clamp(0, 1)
    tensor = next(each for each in GGUFReader(other, "r+").tensors if each.name == "rope_freqs.weight")
    tensor.data[:] = (1 / ((1 - smooth) / factor + smooth)).numpy()
    return other


def test_llama_cpps_own_file_of_llama_3_is_read_by_the_scaling_of_the_model(dense: Made) -> None:
    directory = dense("llama", rope_parameters=LLAMA_3_ROPE)
    ours = written(directory)
    config = open_source(directory).config
    like = {"rope_parameters": config["rope_parameters"]}
    theirs = as_llama_cpp_writes(ours)
    assert_same(read_back(theirs, like), originals(directory))
    assert imported(theirs, like)[1]["rope_scaling"]["factor"] == 8.0
    with pytest.raises(HandoffError, match="is not what rope_scaling means"):
        imported(as_llama_cpp_writes(ours, factor=4.0), like)
    with pytest.raises(HandoffError, match="is missing, and rope_scaling"):
        imported(written(dense("llama")), like)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=configs(), is_expressible=st.booleans())
def test_random_models_come_back_or_are_refused_by_name(
    config: ModelConfig, is_expressible: bool, tokenizer_dir: Path
) -> None:
    config = replace(config, vocab_size=304, bos_token_id=0, eos_token_id=1)
    if is_expressible:
        scaling = SAME_MSCALE if config.rope_scaling else None
        config = replace(config, q_lora_rank=12, attention_bias=False, rope_scaling=scaling)
        assert reasons_against(config.to_hf()) == []
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place) / "model"
        save_model(random_model(config), directory)
        with_tokenizer(directory, tokenizer_dir)
        source = open_source(directory)
        if reasons := reasons_against(source.config):
            with pytest.raises(HandoffError) as refused:
                written(directory)
            assert all(reason in str(refused.value) for reason in reasons)
            return
        past = f"model.layers.{config.num_hidden_layers}."
        later = {f"model.layers.{config.num_hidden_layers + index}." for index in range(2)} | {past}
        expected = {name: each for name, each in originals(directory).items() if not name.startswith(tuple(later))}
        assert_same(read_back(written(directory), source.config), expected)


def test_llama_3s_rotary_scaling_becomes_factors_and_comes_back(dense: Made) -> None:
    directory = dense(rope_parameters=LLAMA_3_ROPE)
    source, path = open_source(directory), written(directory)
    factors = GgufSource(path).read("rope_freqs.weight")
    assert factors.shape == (8,)
    assert 1.0 <= float(factors.min()) < 1.1  # 24 positions are 3.8 turns of the fastest pair, just below 4
    assert float(factors.max()) == 8.0
    assert len(factors.unique()) > 2  # and some between
    assert_same(read_back(path), originals(directory))
    _, config = imported(path)
    assert config["rope_scaling"] == {name: each for name, each in LLAMA_3_ROPE.items() if name != "rope_theta"}
    other = {**source.config, "rope_parameters": {**LLAMA_3_ROPE, "factor": 4.0}}
    with pytest.raises(HandoffError, match="not what rope_scaling means"):
        read_back_all(path, other)


def read_back_all(path: Path, like: dict[str, Any]) -> None:
    """Run every operator, also one that gives no tensor."""
    from crosschip.handoff.conversion.layout import run

    layout = architecture_of(like).layout(like, {"lm_head.weight"}).inverse
    for operator in layout.operators:
        run(operator, GgufSource(path))


def test_halves_lie_in_pairs_without_the_models_own_config(deepseek: Made) -> None:
    directory = deepseek(rope_interleave=False)
    _, config = imported(written(directory))
    assert config["rope_interleave"] is True
    found, expected = read_back(directory / "float32.gguf"), originals(directory)
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    rotated = expected[name][32:]
    assert torch.equal(found[name][:32], expected[name][:32])
    assert torch.equal(found[name][32:], torch.stack((rotated[:4], rotated[4:]), 1).flatten(0, 1))


def test_bf16_rounds_matrices_once_and_keeps_what_decides(deepseek: Made) -> None:
    directory = deepseek()
    path, expected = written(directory, "bfloat16"), originals(directory)
    source = GgufSource(path)
    assert source.kind("blk.1.ffn_gate_inp.weight") == source.kind("blk.1.exp_probs_b.bias") == "F32"
    assert source.kind("blk.1.attn_norm.weight") == "F32"
    for name, tensor in read_back(path).items():
        kept = expected[name] if tensor.dtype == torch.float32 else expected[name].to(torch.bfloat16)
        assert torch.equal(tensor, kept), name


def test_bf16_weights_come_back_bit_for_bit(deepseek: Made) -> None:
    directory = deepseek(dtype=torch.bfloat16)
    assert_same(read_back(written(directory, "bfloat16")), originals(directory))
    assert_same(read_back(written(directory, "float32")), originals(directory))


def test_q8_0_is_within_half_a_step_of_each_block(deepseek: Made) -> None:
    directory = deepseek()
    path, expected = written(directory, "q8_0"), originals(directory)
    kinds = {name: GgufSource(path).kind(name) for name in GgufSource(path).names()}
    assert kinds["blk.1.ffn_up_exps.weight"] == "Q8_0"
    assert kinds["blk.1.attn_k_b.weight"] == "F32"  # rows of 16 numbers
    assert kinds["output_norm.weight"] == "F32"
    found = read_back(path)
    for name, kind in (("model.layers.1.mlp.experts.3.up_proj.weight", "Q8_0"), ("model.norm.weight", "F32")):
        blocks = expected[name].reshape(-1, 32) if kind == "Q8_0" else expected[name][:, None]
        error = (found[name].reshape(blocks.shape) - blocks).abs().amax(1)
        most = Q8_0_OF_LARGEST if kind == "Q8_0" else 0.0
        assert bool((error <= most * blocks.abs().amax(1)).all()), name


def test_what_was_q8_0_stays_the_same_when_it_is_written_again(deepseek: Made) -> None:
    directory = deepseek()
    first = read_back(written(directory, "q8_0"))
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in first.items()}, directory / "model.safetensors")
    assert_same(read_back(written(directory, "q8_0")), first)


def test_multi_token_prediction_is_left_out_and_said_so(deepseek: Made) -> None:
    directory = deepseek(num_nextn_predict_layers=1)
    source, told = open_source(directory), list[str]()
    notes = export_gguf(
        source.tensors, source.config, source.tokenizer_files, directory / "x.gguf", "float32", tell=told.append
    )
    assert len(notes) == 1
    assert "multi-token prediction" in notes[0]
    assert any(notes[0] in line for line in told)
    assert not [name for name in GgufSource(directory / "x.gguf").names() if name.startswith("blk.3.")]


def test_fields_come_back(deepseek: Made, dense: Made) -> None:
    for directory in (deepseek(rope_scaling=SAME_MSCALE), deepseek("plain"), dense("llama"), dense("qwen3")):
        source = open_source(directory)
        _, config = imported(written(directory))
        architecture = architecture_of(source.config)
        assert architecture.metadata_of(config) == architecture.metadata_of(source.config)
        for field in ("rms_norm_eps", "hidden_size", "num_hidden_layers", "vocab_size"):
            assert config[field] == source.config[field]


@pytest.mark.parametrize(
    ("field", "value", "key"),
    [
        ("rms_norm_eps", 1e-5, "attention.layer_norm_rms_epsilon"),
        ("routed_scaling_factor", 1.0, "expert_weights_scale"),
        ("norm_topk_prob", False, "expert_weights_norm"),
        ("topk_group", 2, "expert_group_used_count"),
        ("rope_theta", 5e4, "rope.freq_base"),
        ("num_experts_per_tok", 1, "expert_used_count"),
    ],
)
def test_a_field_that_differs_is_named(deepseek: Made, field: str, value: Any, key: str) -> None:
    directory = deepseek()
    source, path = open_source(directory), written(directory)
    assert differing_keys(path, source.config, source.tokenizer_files) == []
    other = {**source.config, field: value}
    if field == "rope_theta":
        other |= {"rope_parameters": None}
    (words,) = differing_keys(path, other, source.tokenizer_files)
    assert words.startswith(f"deepseek2.{key} is ")


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 4),
    blocks=st.integers(1, 3),
    exponent=st.integers(-10, 12),
    seed=st.integers(0, 10),
)
def test_q8_0_is_idempotent_and_bounded(rows: int, blocks: int, exponent: int, seed: int) -> None:
    from gguf import GGMLQuantizationType

    from crosschip.handoff.gguf.encoding import decoded, encoded

    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(rows, 32 * blocks, generator=generator) * 2.0**exponent
    kind = GGMLQuantizationType.Q8_0
    data = encoded("x", tensor, kind)
    back = decoded("x", data, tuple(tensor.shape), kind)
    assert (encoded("x", back, kind) == data).all()
    error = (back - tensor).reshape(-1, 32).abs().amax(1)
    largest = tensor.reshape(-1, 32).abs().amax(1)
    assert bool((error <= Q8_0_OF_LARGEST * largest + Q8_0_OF_SUBNORMAL_SCALE).all())
