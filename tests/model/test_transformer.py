from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from crosschip.model import ModelConfig, Transformer, init_weights
from crosschip.model.attention import causal_attention
from crosschip.model.cross_entropy import linear_cross_entropy
from tests.model.configs import random_model, relative_error

CONFIG = ModelConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_nextn_predict_layers=2)


def test_weights_are_the_same_for_a_seed_and_differ_between_seeds() -> None:
    first, again, other = (Transformer(CONFIG) for _ in range(3))
    init_weights(first, 5)
    init_weights(again, 5)
    init_weights(other, 6)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert first.lm_head.weight.std().item() == pytest.approx(CONFIG.initializer_range, rel=0.1)


def test_multi_token_prediction_loss_is_that_of_the_written_out_module() -> None:
    model = random_model(CONFIG)
    ids = torch.randint(0, 97, (2, 12))
    labels = ids[:, 1:].clone()
    labels[0, 3] = -100
    parts = model.loss(ids[:, :-1], labels)
    loads: list[torch.Tensor] = []
    state = model._hidden(ids[:, :-1], torch.float32, loads)
    expected, count = torch.zeros(()), 0
    for depth, module in enumerate(model.mtp, start=1):
        length = 11 - depth
        ahead = F.embedding(ids[:, depth : depth + length], model.embed_tokens.weight)
        state = module(state[:, :length], ahead, model._rope(length, ids.device), loads)
        logits = model.lm_head(state).flatten(0, 1)
        expected = expected + F.cross_entropy(logits, labels[:, depth:].flatten(), reduction="sum")
        count += int((labels[:, depth:] != -100).sum())
    assert int(parts.num_tokens) == 21
    assert int(parts.mtp_num_tokens) == count
    assert parts.mtp_loss_sum.item() == pytest.approx(expected.item(), rel=1e-5)


def test_multi_token_prediction_never_sees_its_target() -> None:
    model = random_model(CONFIG)
    ids = torch.randint(0, 97, (1, 12), generator=torch.Generator().manual_seed(6))
    labels = torch.full((1, 11), -100)
    labels[0, 5] = 7  # the target of state 4 through module 1 and of state 3 through module 2
    before = model.loss(ids[:, :-1], labels).mtp_loss_sum.item()
    changed = ids.clone()
    changed[0, 6:] = (changed[0, 6:] + 1) % 97
    # Other tokens sort the experts' rows anew, so sums may be rounded otherwise; nothing more may change.
    assert model.loss(changed[:, :-1], labels).mtp_loss_sum.item() == pytest.approx(before, rel=1e-5)
    changed[0, 5] = (changed[0, 5] + 1) % 97  # a token both modules read
    assert model.loss(changed[:, :-1], labels).mtp_loss_sum.item() != pytest.approx(before, rel=1e-3)


def test_router_bias_moves_against_the_load() -> None:
    model = random_model(CONFIG)
    before = [router.e_score_correction_bias.clone() for router in model.routers()]
    load = torch.tensor([[10, 0, 5, 5, 5, 5, 5, 5]]).expand(len(before), -1)
    model.update_router_bias(load, 0.5)
    for old, router in zip(before, model.routers(), strict=True):
        moved = router.e_score_correction_bias - old
        assert torch.allclose(moved, torch.tensor([-0.5, 0.5, 0, 0, 0, 0, 0, 0]))


def test_expert_load_counts_every_choice() -> None:
    model = random_model(CONFIG)
    parts = model.loss(torch.randint(0, 97, (2, 9)), torch.randint(0, 97, (2, 9)))
    # One layer with experts in the body, and one in each of the two modules, which see 8 and 7 positions.
    assert parts.expert_load_LE.sum(1).tolist() == [2 * 9 * 2, 2 * 8 * 2, 2 * 7 * 2]


@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_linear_cross_entropy_is_cross_entropy(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    monkeypatch.setattr("crosschip.model.cross_entropy._CHUNK_LOGITS", 97 * 64)  # several chunks
    hidden = torch.randn(tokens, 16, requires_grad=True)
    weight = torch.randn(97, 16, requires_grad=True)
    labels = torch.randint(0, 97, (tokens,))
    labels[::3] = -100
    expected = F.cross_entropy(hidden @ weight.t(), labels, reduction="sum")
    wanted = torch.autograd.grad(3 * expected, (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, labels)
    found = torch.autograd.grad(3 * loss, (hidden, weight))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(found, wanted, strict=True):
        assert relative_error(a, b) < 1e-5 or b.norm() == 0


def test_labels_that_are_all_ignored_give_zero_and_no_nan() -> None:
    model = random_model(CONFIG)
    parts = model.loss(torch.randint(0, 97, (2, 9)), torch.full((2, 9), -100))
    parts.loss_sum.backward()
    assert parts.loss_sum.item() == 0
    assert int(parts.num_tokens) == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("length", [1, 127, 128, 129, 300, 1025])
def test_causal_attention_equals_the_definition(length: int) -> None:
    q, k, v = (torch.randn(1, length, 2, width) for width in (12, 12, 7))
    scores = torch.einsum("bthx,bshx->bhts", q, k).double() * 0.3
    scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
    expected = torch.einsum("bhts,bshv->bthv", scores.softmax(-1), v.double())
    assert relative_error(causal_attention(q, k, v, 0.3), expected) < 1e-5


def test_an_expert_without_tokens_gets_a_zero_gradient() -> None:
    model = random_model(CONFIG)
    for router in model.routers():
        router.e_score_correction_bias[0] = -100.0
    parts = model.loss(torch.randint(0, 97, (2, 9)), torch.randint(0, 97, (2, 9)))
    parts.loss_sum.backward()
    assert parts.expert_load_LE[0, 0] == 0
    gradient = model.layers[1].mlp.experts.gate_up_proj.grad
    assert not gradient[0].any()
    assert gradient[1].any()
