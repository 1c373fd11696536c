"""Honest chips pass, and each class of defect gets its name: conversion, config field, operator, length."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from crosschip.chips import find_chip
from crosschip.errors import GoldenError
from crosschip.golden.bundle import Bundle, load_bundle
from crosschip.golden.judge import Judgement, judge
from crosschip.golden.record import RecordPlan, record
from crosschip.golden.replay import long_and_short, replay
from crosschip.golden.training_curve import CurvePlan
from crosschip.model import load_model, save_model
from tests.golden.conftest import CONFIG, Tensors
from tests.model.configs import random_model

SLOW = ("naive", "noisy", "flush")  # half a minute each on a busy machine

Changed = Callable[[Callable[[Tensors], None]], Path]


def judged(bundle: Bundle, model: Path, chip: str = "cpu", with_curve: bool = False) -> Judgement:
    return judge(replay(bundle, model, find_chip(chip), with_curve=with_curve))


def test_the_chip_that_recorded_gives_the_same_again_bit_for_bit(bundle: Bundle, model_dir: Path) -> None:
    comparison = replay(bundle, model_dir, find_chip("cpu"))
    alone = comparison.views[0]
    assert (alone.kl.mean, alone.largest_logprob_difference, alone.num_flips) == (0.0, 0.0, 0)
    assert comparison.curve is not None
    assert (comparison.curve.loss, comparison.curve.gradient_norm) == (0.0, 0.0)
    judgement = judge(comparison)
    assert (judgement.verdict, judgement.findings, judgement.diagnosis.cause) == ("PASS", [], "none")
    assert judgement.not_covered == [
        "real text: the bundle holds made-up token ids only",
        "multi-token prediction: only its loss in the training curve",
    ]


@pytest.mark.parametrize(
    "variant", ["sim", "sim:reordered", *(pytest.param(f"sim:{each}", marks=pytest.mark.slow) for each in SLOW)]
)
def test_honest_chips_that_compute_otherwise_pass(bundle: Bundle, model_dir: Path, variant: str) -> None:
    judgement = judged(bundle, model_dir, variant, with_curve=True)
    assert (judgement.verdict, judgement.findings) == ("PASS", [])


@pytest.fixture(scope="module")
def bf16_dir(model_dir: Path) -> Path:
    torch.set_num_threads(1)
    directory = model_dir.parent / "bundle-bf16"
    plan = RecordPlan(reorderings=1, curve=CurvePlan(num_steps=0))
    record(model_dir, find_chip("cpu"), directory, dtype=torch.bfloat16, plan=plan)
    return directory


@pytest.mark.parametrize("variant", ["sim", "sim:fp32", "sim:reordered", "sim:noisy"])
def test_honest_chips_pass_in_16_bits(bf16_dir: Path, model_dir: Path, variant: str) -> None:
    judgement = judged(load_bundle(bf16_dir), model_dir, variant)
    assert judgement.verdict in ("PASS", "PASS WITH LIMITS")


@pytest.mark.parametrize("fault", ["sim:N2", "sim:N11", "sim:N4"])
def test_a_faulty_operator_is_named_in_16_bits(bf16_dir: Path, model_dir: Path, fault: str) -> None:
    judgement = judged(load_bundle(bf16_dir), model_dir, fault)
    assert (judgement.verdict, judgement.diagnosis.cause) == ("FAIL", "operator")
    assert judgement.diagnosis.subject == "layers.0.self_attn"


@pytest.mark.parametrize("fault", ["sim:N2", "sim:N11", "sim:N4", "sim:N21,mode=tf32"])
def test_a_faulty_operator_is_named_by_the_layer_it_first_shows_in(bundle: Bundle, model_dir: Path, fault: str) -> None:
    judgement = judged(bundle, model_dir, fault)
    assert (judgement.verdict, judgement.diagnosis.cause) == ("FAIL", "operator")
    assert judgement.diagnosis.subject == "layers.0.self_attn"
    assert fault in judgement.diagnosis.words


def test_a_fault_of_the_experts_alone_is_named_by_the_first_layer_that_has_some(
    bundle: Bundle, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from crosschip.model import experts

    honest = experts.combine
    monkeypatch.setattr(experts, "combine", lambda chosen, weights: honest(chosen, weights) * 1.001)
    judgement = judged(bundle, model_dir)
    assert (judgement.diagnosis.cause, judgement.diagnosis.subject) == ("operator", "layers.1.mlp")


def test_a_backward_that_is_wrong_alone_is_named_by_the_training_curve(
    bundle: Bundle, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from crosschip.model import layers

    honest = layers._RMSNormFunction.backward

    def wrong(ctx: object, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        grad_x, grad_weight, _ = honest(ctx, grad)
        return grad_x * 1.02, grad_weight, None

    monkeypatch.setattr(layers._RMSNormFunction, "backward", staticmethod(wrong))
    judgement = judged(bundle, model_dir, with_curve=True)
    assert (judgement.diagnosis.cause, judgement.diagnosis.subject) == ("operator", "training step")
    assert {each["check"] for each in judgement.findings} >= {"training curve, gradient norm"}


def test_a_mask_that_is_ignored_beyond_a_length_is_a_length(bundle: Bundle, model_dir: Path) -> None:
    judgement = judged(bundle, model_dir, "sim:N1,limit=50")
    assert (judgement.verdict, judgement.diagnosis.cause) == ("FAIL", "length")
    assert judgement.diagnosis.subject == "more than 33 tokens"
    assert "of 63 and more wrong" in judgement.diagnosis.words
    assert "layers.0.self_attn" in judgement.diagnosis.words


def test_answers_that_break_off_beyond_a_position_are_a_length(
    bundle: Bundle, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from crosschip.model.attention import LatentAttention

    honest = LatentAttention.forward

    def wrong(self: LatentAttention, x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        out = honest(self, x, rope)
        out[:, 100:] = 0.0
        return out

    monkeypatch.setattr(LatentAttention, "forward", wrong)
    judgement = judged(bundle, model_dir)
    assert (judgement.diagnosis.cause, judgement.diagnosis.subject) == ("length", "position 100")


def exchange_heads(tensors: Tensors) -> None:
    """The rows of one head's keys and values in the place of another's: what a wrong restacking does."""
    weight = tensors["model.layers.1.self_attn.kv_b_proj.weight"]
    head = weight.shape[0] // CONFIG.num_attention_heads
    weight[: 2 * head] = torch.cat((weight[head : 2 * head], weight[:head]))


def transpose_an_expert(tensors: Tensors) -> None:
    name = "model.layers.2.mlp.experts.3.down_proj.weight"
    tensors[name] = tensors[name].t()


def scale_a_tensor(tensors: Tensors) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1.25


def drop_a_tensor(tensors: Tensors) -> None:
    del tensors["model.layers.1.self_attn.o_proj.weight"]


def zero_a_tensor(tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.shared_experts.up_proj.weight"].zero_()


@pytest.mark.parametrize(
    ("how", "tensor", "words"),
    [
        (exchange_heads, "model.layers.1.self_attn.kv_b_proj.weight", "rows in another order"),
        (transpose_an_expert, "model.layers.2.mlp.experts.3.down_proj.weight", "is transposed"),
        (scale_a_tensor, "model.layers.0.mlp.up_proj.weight", "times 1.25"),
        (drop_a_tensor, "model.layers.1.self_attn.o_proj.weight", "is missing"),
        (zero_a_tensor, "model.layers.1.mlp.shared_experts.up_proj.weight", "the recorded tensor times 0"),
    ],
)
def test_a_wrong_conversion_is_named_by_its_tensor(
    bundle: Bundle, changed_model: Changed, how: Callable[[Tensors], None], tensor: str, words: str
) -> None:
    judgement = judged(bundle, changed_model(how))
    assert (judgement.verdict, judgement.diagnosis.cause) == ("FAIL", "conversion")
    assert judgement.diagnosis.subject == tensor
    assert words in judgement.diagnosis.words
    assert "tensor manifest" in {each["check"] for each in judgement.findings}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rms_norm_eps", 1e-5),
        ("rope_theta", 50000.0),
        ("routed_scaling_factor", 1.5),
        ("norm_topk_prob", False),
        ("rope_interleave", False),
        ("tie_word_embeddings", True),
        ("topk_method", None),
    ],
)
def test_a_field_of_the_configuration_is_named(
    bundle: Bundle, model_dir: Path, tmp_path: Path, field: str, value: object
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(model_dir, copy)
    document = json.loads((copy / "config.json").read_text())
    assert document[field] != value
    document[field] = value
    if value is None:  # what vLLM drops the router's bias without
        del document[field]
    if field in document["rope_parameters"]:
        document["rope_parameters"][field] = value
    (copy / "config.json").write_text(json.dumps(document))
    judgement = judged(bundle, copy)
    assert (judgement.verdict, judgement.diagnosis.cause) == ("FAIL", "config field")
    assert judgement.diagnosis.subject == field


def test_a_bundle_of_other_weights_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    save_model(random_model(CONFIG, seed=1), tmp_path / "other")
    with pytest.raises(GoldenError, match="was made for other weights"):
        replay(bundle, tmp_path / "other", find_chip("cpu"))


def test_an_export_in_16_bits_is_the_same_model_and_needs_a_recording_in_16_bits(
    bundle: Bundle, bf16_dir: Path, model_dir: Path, tmp_path: Path
) -> None:
    save_model(load_model(model_dir), tmp_path / "export", torch.bfloat16)
    with pytest.raises(GoldenError, match="recorded in float32 and replayed in bfloat16"):
        replay(bundle, tmp_path / "export", find_chip("cpu"))
    judgement = judged(load_bundle(bf16_dir), tmp_path / "export")
    assert judgement.verdict in ("PASS", "PASS WITH LIMITS")
    assert not [each for each in judgement.findings if each["check"] == "tensor manifest"]


def test_a_chip_that_raises_fails_and_says_what(bundle: Bundle, model_dir: Path) -> None:
    judgement = judged(bundle, model_dir, "sim:W3,operator=silu")
    assert judgement.verdict == "FAIL"
    assert "silu" in judgement.findings[0]["message"]


def test_a_chip_without_room_for_the_weights_fails_and_says_so(
    bundle: Bundle, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*given: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr("crosschip.golden.replay.load_multiplied_out", no_room)
    judgement = judged(bundle, model_dir)
    assert judgement.verdict == "FAIL"
    assert "tried to allocate 20 GiB" in judgement.findings[0]["message"]


def test_without_time_nothing_is_claimed(bundle: Bundle, model_dir: Path) -> None:
    comparison = replay(bundle, model_dir, find_chip("cpu"), has_time=lambda share: False)
    assert (comparison.rows_made, comparison.rows_planned) == (0, len(bundle.lengths))
    assert judge(comparison).verdict == "INCONCLUSIVE"


def test_long_and_short_rows_come_by_turns() -> None:
    assert long_and_short([1, 4, 2, 3]) == [1, 0, 3, 2]
