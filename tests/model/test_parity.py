"""Our model against transformers' DeepseekV3ForCausalLM: logits, gradients, and weights in both directions."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings

from crosschip.model import ModelConfig, Transformer, load_model, save_model
from tests.model.configs import configs, random_model, relative_error, transformers_model

TOLERANCE = 1e-5  # relative, fp32: about 80 roundings of 2^-23
LENGTH = 21


def their_parameter(name: str) -> str:
    return name if name.startswith("lm_head") else f"model.{name}"


def assert_same_logits_and_gradients(ours: Transformer, directory: Path) -> None:
    theirs = transformers_model(directory)
    ids = torch.randint(0, ours.config.vocab_size, (2, LENGTH + 1), generator=torch.Generator().manual_seed(3))
    logits = theirs(ids[:, :-1]).logits
    assert relative_error(ours(ids[:, :-1]), logits) < TOLERANCE
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    ours.loss(ids[:, :-1], ids[:, 1:]).loss_sum.backward()
    reference = dict(theirs.named_parameters())
    largest = max(p.grad.norm().item() for p in reference.values() if p.grad is not None)
    for name, parameter in ours.named_parameters():
        if name.startswith("mtp."):
            continue  # transformers has these modules for drafting only
        expected = reference[their_parameter(name)].grad
        if ours.config.tie_word_embeddings and name == "embed_tokens.weight":
            expected = expected + reference["lm_head.weight"].grad
        # A gradient that is zero by cancellation is compared with the largest one's rounding, not with itself.
        error = (parameter.grad.double() - expected.double()).norm()
        assert error < TOLERANCE * max(expected.norm().item(), 1e-2 * largest), name


@settings(max_examples=24, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(config=configs())
def test_logits_gradients_and_conversion_agree_with_transformers(config: ModelConfig) -> None:
    ours = random_model(config)
    with TemporaryDirectory() as first, TemporaryDirectory() as second:
        save_model(ours, Path(first))
        assert_same_logits_and_gradients(ours, Path(first))
        back = load_model(Path(first))
        expected = ours.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in back.state_dict().items())
        if not config.num_nextn_predict_layers:  # transformers does not write these modules
            transformers_model(Path(first)).save_pretrained(second)
            theirs = load_model(Path(second)).state_dict()
            assert all(torch.equal(tensor, theirs[name]) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("parameter", "index"),
    [
        ("layers.1.self_attn.kv_b_proj.weight", slice(0, 8)),
        ("layers.1.mlp.experts.gate_up_proj", 2),
        ("layers.1.mlp.gate.e_score_correction_bias", slice(None)),
        ("layers.1.self_attn.kv_a_layernorm.weight", slice(None)),
    ],
)
def test_parity_notices_a_permuted_or_changed_weight(tmp_path: Path, parameter: str, index: int | slice) -> None:
    config = ModelConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, n_routed_experts=4)
    ours = random_model(config)
    save_model(ours, tmp_path)
    with torch.no_grad():
        part = ours.state_dict()[parameter][index]
        part.copy_(part.flip(0))
    with pytest.raises(AssertionError):
        assert_same_logits_and_gradients(ours, tmp_path)


def test_bfloat16_stays_near_float32() -> None:
    ours = random_model(ModelConfig(vocab_size=97, hidden_size=32, num_nextn_predict_layers=1))
    ids = torch.randint(0, 97, (2, 33))
    exact, rounded = (ours.loss(ids[:, :-1], ids[:, 1:], dtype) for dtype in (torch.float32, torch.bfloat16))
    assert rounded.loss_sum.dtype == torch.float32
    # bf16 keeps 8 bits: a relative error of 2^-9 a rounding, some tens of roundings deep.
    assert rounded.loss_sum.item() == pytest.approx(exact.loss_sum.item(), rel=40 * 2**-9)
    assert rounded.loss_sum.item() != exact.loss_sum.item()
