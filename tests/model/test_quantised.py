"""Weights in 8 bits: what rounding may cost, what comes back bit for bit, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from crosschip.errors import ModelError
from crosschip.model import ModelConfig, checkpoint_dtype, load_model, save_model
from crosschip.model.quantised import (
    QUANTISED_DTYPES,
    check_dialect,
    dequantise,
    quantisation_of,
    quantise_blocks,
    quantise_channels,
    rounding_steps,
    scale_name,
)
from tests.model.configs import random_model

CONFIG = ModelConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, n_routed_experts=4)
WEIGHT = "model.layers.0.self_attn.o_proj.weight"
W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
        }
    },
}


@st.composite
def matrices(draw: st.DrawFn) -> torch.Tensor:
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    matrix = torch.randn(rows, columns, generator=generator) * 10.0 ** draw(st.integers(-20, 20))
    matrix[:, : draw(st.integers(0, columns))] *= draw(st.sampled_from([0.0, 1e-3, 1.0]))
    return matrix.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))


@given(matrices(), st.sampled_from([(16, 8), (128, 128), (1, 3)]))
@settings(deadline=None, max_examples=60)
def test_blocks_round_to_half_a_step_and_come_back_bit_for_bit(matrix: torch.Tensor, block: tuple[int, int]) -> None:
    before = matrix.clone()
    codes, scale = quantise_blocks(matrix, block)
    assert torch.equal(matrix, before)
    exact = dequantise("w", codes, scale, block)
    # Half a step, and the last bit of the division by the scale.
    assert torch.all((exact - matrix.float()).abs() <= rounding_steps(codes, scale, block) * (0.5 + 2**-18))
    again, same = quantise_blocks(exact, block)
    assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(same, scale)


@given(matrices())
@settings(deadline=None, max_examples=60)
def test_channels_round_to_half_a_step_and_come_back_bit_for_bit(matrix: torch.Tensor) -> None:
    codes, scale = quantise_channels(matrix)
    assert scale.shape == (matrix.shape[0], 1)
    exact = dequantise("w", codes, scale, (128, 128))
    assert torch.all((exact - matrix.float()).abs() <= scale * (0.5 + 2**-16))
    again, same = quantise_channels(exact)
    assert torch.equal(again, codes)
    assert torch.equal(same, scale)


def test_long_matrices_are_worked_on_in_stripes_and_the_scales_stay_in_their_places() -> None:
    matrix = torch.randn(3000, 700) * torch.logspace(-3, 3, 3000)[:, None]
    codes, scale = quantise_blocks(matrix)
    assert scale.shape == (24, 6)
    exact = dequantise("w", codes, scale, (128, 128))
    assert (exact - matrix).norm(dim=1).div(matrix.norm(dim=1)).max() < 2**-4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_has_no_form_in_8_bits(value: float) -> None:
    matrix = torch.ones(4, 4)
    matrix[2, 1] = value
    for quantise in (quantise_blocks, quantise_channels):
        with pytest.raises(ModelError, match="NaN or infinity"):
            quantise(matrix)


def test_bytes_of_one_dialect_under_the_label_of_the_other_are_told() -> None:
    matrix = torch.randn(64, 64)
    fn, _ = quantise_blocks(matrix, (16, 16))
    largest = matrix.abs().unflatten(0, (4, 16)).unflatten(2, (4, 16)).amax((1, 3))
    scale = (largest / 240).repeat_interleave(16, 0).repeat_interleave(16, 1)
    fnuz = (matrix / scale).clamp(-240, 240).to(torch.float8_e4m3fnuz)
    check_dialect("w", fn)
    check_dialect("w", fnuz)
    with pytest.raises(ModelError, match=r"labelled e4m3fn and holds \d+ codes 0x7f.*these are e4m3fnuz bytes"):
        check_dialect("w", fnuz.view(torch.float8_e4m3fn))
    fn[0, 0] = -0.0
    with pytest.raises(ModelError, match=r"labelled e4m3fnuz and holds \d+ codes 0x80.*these are e4m3fn bytes"):
        check_dialect("w", fn.view(torch.float8_e4m3fnuz))
    damaged = fnuz.view(torch.uint8).clone()
    damaged[0, 0] = 0x80
    with pytest.raises(ModelError, match="no dialect fits"):
        check_dialect("w", damaged.view(torch.float8_e4m3fn))


def test_the_factor_of_2_between_the_dialects_is_why_it_matters() -> None:
    codes, scale = quantise_blocks(torch.randn(8, 8) + 0.1)
    wrong = dequantise("w", codes.view(torch.float8_e4m3fnuz), scale, (128, 128))
    assert torch.equal(2 * wrong, dequantise("w", codes, scale, (128, 128)))


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method is 'gptq'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size = \[128\]"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "weight_block_size"),
        ({**W8A8, "format": "pack-quantized"}, "format is 'pack-quantized'"),
        ({**W8A8, "config_groups": {}}, "config_groups is {}"),
        ({**W8A8, "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}}}, "group_0.weights is"),
        ("gptq", "quantization_config of config.json is 'gptq'"),
        ("fp8", "quantization_config of config.json is 'fp8'"),
        ("compressed-tensors", "quantization_config of config.json is 'compressed-tensors'"),
        (["fp8"], "quantization_config of config.json is"),
    ],
)
def test_what_is_not_read_is_refused_by_name(settings_: object, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        quantisation_of({"quantization_config": settings_})


def quantised_directory(tmp_path: Path, kind: str) -> Path:
    """A model whose one matrix is stored in 8 bits."""
    save_model(random_model(CONFIG), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    codes, scale = (quantise_blocks if kind == "fp8" else quantise_channels)(tensors[WEIGHT])
    tensors |= {WEIGHT: codes, scale_name(WEIGHT, codes.dtype): scale}
    save_file(tensors, tmp_path / "model.safetensors")
    document = json.loads((tmp_path / "config.json").read_text())
    document["quantization_config"] = {"quant_method": "fp8"} if kind == "fp8" else W8A8
    (tmp_path / "config.json").write_text(json.dumps(document))
    return tmp_path


@pytest.mark.parametrize("kind", ["fp8", "w8a8"])
def test_our_model_loads_a_directory_in_8_bits(tmp_path: Path, kind: str) -> None:
    exact = random_model(CONFIG).layers[0].self_attn.o_proj.weight.detach()
    found = load_model(quantised_directory(tmp_path, kind), torch.float32).layers[0].self_attn.o_proj.weight.detach()
    codes, scale = (quantise_blocks if kind == "fp8" else quantise_channels)(exact)
    assert torch.equal(found, dequantise("w", codes, scale, (128, 128)))
    assert not torch.equal(found, exact)


@pytest.mark.parametrize("kind", ["fp8", "w8a8"])
@pytest.mark.parametrize(
    ("stored", "computed"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float8_e4m3fn, torch.bfloat16)],
)
def test_the_embedding_says_what_a_directory_in_8_bits_is_computed_in(
    tmp_path: Path, kind: str, stored: torch.dtype, computed: torch.dtype
) -> None:
    directory = quantised_directory(tmp_path, kind)

    def store(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.embed_tokens.weight"
        tensors[name] = tensors[name].to(stored)
        if stored in QUANTISED_DTYPES:
            tensors[scale_name(name, stored)] = torch.ones(1, 1)

    change(directory, store)
    assert checkpoint_dtype(directory) == computed
    assert load_model(directory).lm_head.weight.dtype == computed


def change(directory: Path, how) -> None:
    tensors = load_file(directory / "model.safetensors")
    how(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("kind", "how", "words"),
    [
        ("w8a8", lambda t: t.pop(f"{WEIGHT}_scale"), f"{WEIGHT}_scale is missing"),
        ("w8a8", lambda t: t.update({f"{WEIGHT}_scale": torch.ones(1)}), f"{WEIGHT}: scales of shape"),
        ("fp8", lambda t: t.update({f"{WEIGHT}_scale_inv": torch.ones(3, 1)}), f"{WEIGHT}: scales of shape"),
        ("fp8", lambda t: t.update({f"{WEIGHT}_scale_inv": torch.ones(1, 1, dtype=torch.int32)}), "scales are torch"),
        ("fp8", lambda t: t.update({WEIGHT: torch.zeros(32, 32)}), f"{WEIGHT} is not in 8 bits|has shape"),
        ("fp8", lambda t: t[WEIGHT].view(torch.uint8).fill_(0x7F), "labelled e4m3fn.*NaN there"),
        ("fp8", lambda t: t.update({"model.norm.weight_scale_inv": torch.ones(1, 1)}), "model.norm.weight is not in 8"),
        ("fp8", lambda t: t.update({"model.extra_scale_inv": torch.ones(1, 1)}), "holds model.extra_scale_inv"),
    ],
)
def test_wrong_scales_and_codes_are_named(tmp_path: Path, kind: str, how, words: str) -> None:
    directory = quantised_directory(tmp_path, kind)
    change(directory, how)
    with pytest.raises(ModelError, match=words):
        load_model(directory)
