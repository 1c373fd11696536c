"""Low-rank adapters: their gradients, the merged weights, and what a checkpoint of them holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from crosschip.errors import RecipeError
from crosschip.model import Transformer, load_model, save_model
from crosschip.train.adapters import attach_adapters
from tests.model.configs import random_model
from tests.train.rl.made import small_config


def loss_of(model: Transformer) -> torch.Tensor:
    ids = torch.arange(24).reshape(2, 12) % 60
    return model.loss(ids, ids.roll(-1, 1)).loss_sum


def test_gradients_are_those_of_the_factors_of_what_is_added() -> None:
    model = random_model(small_config())
    adapters = attach_adapters(model, 2, 4.0, seed=0, num_ranks=1)
    for up in adapters.up.values():
        torch.nn.init.normal_(up, std=0.02)
    adapters.merge()
    loss_of(model).backward()
    key = "layers-1-mlp-experts-gate_up_proj"
    base = model.layers[1].mlp.experts.gate_up_proj.detach().clone()
    down, up = (table[key].detach().clone().requires_grad_() for table in (adapters.down, adapters.up))
    plain = base - adapters.scale * (up @ down).detach()

    def replaced(weight: torch.Tensor) -> torch.Tensor:
        names = {"layers.1.mlp.experts.gate_up_proj": weight}
        ids = torch.arange(24).reshape(2, 12) % 60
        state = _logits(model, names, ids)
        return torch.nn.functional.cross_entropy(state.flatten(0, 1), ids.roll(-1, 1).flatten(), reduction="sum")

    replaced(plain + adapters.scale * (up @ down)).backward()
    for found, expected in ((adapters.down[key].grad, down.grad), (adapters.up[key].grad, up.grad)):
        assert found is not None
        assert expected is not None
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-5)


def _logits(model: Transformer, names: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = torch.func.functional_call(model, names, (ids,))
    return logits


def test_only_adapters_are_trained_and_the_weights_hold_their_sum() -> None:
    model = random_model(small_config())
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    adapters = attach_adapters(model, 2, 4.0, seed=0, num_ranks=1)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2, weight_decay=0.0)
    optimizer.register_step_post_hook(lambda *_: adapters.merge())
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        assert all(weight.grad is None for name, weight in model.named_parameters() if name in before)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, weight in model.named_parameters():
        if name not in before:
            continue
        key = name.replace(".", "-")
        added = adapters.scale * (adapters.up[key] @ adapters.down[key]) if key in adapters.up else 0.0
        assert torch.allclose(weight, before[name] + added, atol=1e-5), name
    assert torch.equal(model.lm_head.weight, before["lm_head.weight"])


def test_a_model_directory_of_adapted_weights_is_a_plain_one(tmp_path: Path) -> None:
    model = random_model(small_config())
    adapters = attach_adapters(model, 2, 4.0, seed=0, num_ranks=1)
    torch.nn.init.normal_(adapters.up["layers-1-mlp-experts-down_proj"], std=0.1)
    adapters.merge()
    save_model(model, tmp_path)
    ids = torch.arange(12)[None]
    assert torch.equal(load_model(tmp_path)(ids), model(ids))


def test_several_ranks_are_refused() -> None:
    with pytest.raises(RecipeError, match="one process"):
        attach_adapters(random_model(small_config()), 2, 4.0, seed=0, num_ranks=2)
