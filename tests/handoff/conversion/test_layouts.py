"""Round trips of random models of every layout: the same tensors, bit for bit or within what rounding may cost."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from crosschip.errors import HandoffError
from crosschip.handoff.conversion.declared import (
    checkpoint_layout,
    dtype_layout,
    is_quantised_weight,
    quantised_layout,
    stored_layout,
)
from crosschip.handoff.conversion.layout import Layout
from crosschip.handoff.conversion.operators import Tensors
from crosschip.handoff.conversion.sources import CheckpointSource, LayoutSource
from crosschip.model import ModelConfig, load_model
from crosschip.model.quantised import Quantisation, rounding_steps, scale_name
from crosschip.model.weights import exported_tensors, own_tensors
from tests.handoff.conversion.models import SQUARE, MemorySource, save_training_checkpoint
from tests.model.configs import configs, random_model

KINDS = [Quantisation("fp8", (16, 8)), Quantisation("fp8"), Quantisation("w8a8")]


def exported(layout: Layout, tensors: Tensors) -> Tensors:
    return {name: each for made in layout.export(MemorySource(tensors)) for name, each in made.items()}


def imported(layout: Layout, tensors: Tensors) -> Tensors:
    return {name: each for made in layout.import_(MemorySource(tensors)) for name, each in made.items()}


def assert_same(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), other[name].contiguous().view(torch.uint8)), name


def published(config: ModelConfig) -> Tensors:
    return dict(exported_tensors(random_model(config)))


@given(configs())
@settings(deadline=None, max_examples=15)
def test_our_checkpoints_become_the_published_tensors_and_come_back(config: ModelConfig) -> None:
    model = random_model(config)
    own = {name: tensor.clone() for name, tensor in own_tensors(model).items()}
    layout = checkpoint_layout(config)
    made = exported(layout, own)
    assert_same(made, dict(exported_tensors(model)))
    assert_same(imported(layout, made), own)


@given(configs())
@settings(deadline=None, max_examples=10)
def test_fp32_comes_back_bit_for_bit_and_bf16_from_its_own_side(config: ModelConfig) -> None:
    tensors = published(config)
    same = dtype_layout(MemorySource(tensors), torch.float32)
    assert_same(imported(same, exported(same, tensors)), tensors)
    halved = dtype_layout(MemorySource(tensors), torch.bfloat16)
    made = exported(halved, tensors)
    biases = [name for name in made if name.endswith("e_score_correction_bias")]
    assert all(made[name].dtype == torch.float32 for name in biases)
    assert_same(exported(halved, imported(halved, made)), made)


@pytest.mark.parametrize("how", KINDS, ids=str)
@given(config=configs())
@settings(deadline=None, max_examples=8)
def test_8_bits_come_back_within_half_a_step_and_bit_for_bit_from_their_own_side(
    how: Quantisation, config: ModelConfig
) -> None:
    tensors = published(config)
    layout = quantised_layout(MemorySource(tensors), how, torch.float32)
    made = exported(layout, tensors)
    back = imported(layout, made)
    assert_same(exported(layout, back), made)
    for name, tensor in tensors.items():
        if not is_quantised_weight(name):
            assert torch.equal(back[name], tensor)
            continue
        scale = made[scale_name(name, made[name].dtype)]
        most = rounding_steps(made[name], scale, how.block) * (0.5 + 2**-16)
        assert torch.all((back[name] - tensor).abs() <= most), name


def test_what_is_quantised_is_what_deepseek_quantises() -> None:
    names = {name for name in published(SQUARE) if is_quantised_weight(name)}
    kept = {re.sub(r"^model\.layers\.\d+\.", "", name) for name in published(SQUARE) if name not in names}
    assert kept == {
        *("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
        *("embed_tokens.weight", "enorm.weight", "hnorm.weight", "eh_proj.weight"),
        *("shared_head.norm.weight", "shared_head.head.weight"),
        *("input_layernorm.weight", "post_attention_layernorm.weight"),
        *("self_attn.q_a_layernorm.weight", "self_attn.kv_a_layernorm.weight"),
        *("mlp.gate.weight", "mlp.gate.e_score_correction_bias"),
    }
    assert "model.layers.1.mlp.experts.3.down_proj.weight" in names
    assert "model.layers.0.self_attn.kv_a_proj_with_mqa.weight" in names


@given(configs())
@settings(deadline=None, max_examples=5)
def test_a_training_checkpoint_is_seen_as_the_model_that_it_loads_as(config: ModelConfig) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = save_training_checkpoint(random_model(config), Path(name))
        source = LayoutSource(CheckpointSource(directory), checkpoint_layout(config))
        expected = dict(exported_tensors(load_model(directory)))
        found = {name: source.read(name) for name in source.names()}
        assert_same(found, expected)
        assert all(source.shape(name) == tuple(tensor.shape) for name, tensor in found.items())
        assert all(source.dtype(name) == tensor.dtype for name, tensor in found.items())


def test_reading_out_of_order_and_twice_gives_the_same() -> None:
    own = {name: tensor.clone() for name, tensor in own_tensors(random_model(SQUARE)).items()}
    source = LayoutSource(MemorySource(own), checkpoint_layout(SQUARE))
    names = list(source.names())
    for name in [*reversed(names), names[0], names[0]]:
        assert torch.equal(source.read(name), exported(checkpoint_layout(SQUARE), own)[name])


@pytest.mark.parametrize("kind", ["fp8", "w8a8"])
def test_scales_without_weights_and_weights_without_scales_are_refused(kind: str) -> None:
    how = Quantisation(kind)
    tensors = published(SQUARE)
    made = exported(quantised_layout(MemorySource(tensors), how, torch.bfloat16), tensors)
    weight = "model.layers.1.mlp.experts.2.up_proj.weight"
    scale = scale_name(weight, made[weight].dtype)
    with pytest.raises(HandoffError, match=f"{weight} is stored in 8 bits but {scale} is missing"):
        stored_layout(MemorySource({k: v for k, v in made.items() if k != scale}), how)
    with pytest.raises(HandoffError, match=f"{scale} belongs to no {kind} weight"):
        stored_layout(MemorySource({**made, weight: tensors[weight]}), how)
    with pytest.raises(HandoffError, match=f"{scale} belongs to no {kind} weight"):
        stored_layout(MemorySource({k: v for k, v in made.items() if k != weight}), how)


def test_a_source_that_lacks_or_exceeds_what_the_layout_takes_is_refused() -> None:
    tensors = {"a": torch.zeros(2), "b": torch.zeros(2)}
    layout = dtype_layout(MemorySource(tensors), torch.float32)
    with pytest.raises(HandoffError, match="lacks 1 of 2 tensors, the first: b"):
        list(layout.export(MemorySource({"a": torch.zeros(2)})))
    with pytest.raises(HandoffError, match="holds 1 tensors that the layout float32 does not know, the first: c"):
        list(layout.export(MemorySource({**tensors, "c": torch.zeros(2)})))
