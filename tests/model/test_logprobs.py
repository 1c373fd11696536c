"""Log-probs with gradient, and routers that take the experts they are told to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from crosschip.errors import ModelError
from crosschip.model import ModelConfig, Transformer
from crosschip.model.cross_entropy import linear_logprobs
from crosschip.model.experts import route
from tests.model.configs import random_model, relative_error
from tests.train.group.conftest import run_together

CONFIG = ModelConfig(vocab_size=97, hidden_size=32, num_hidden_layers=3, num_nextn_predict_layers=1, n_routed_experts=6)
ROOT = Path(__file__).parents[2]


def made_batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 97, (3, 13))
    labels = ids[:, 1:].clone()
    labels[0, :4] = -100
    labels[2] = -100
    return ids[:, :-1], labels


def made_routes(batch: int, time: int, layers: int = 2) -> torch.Tensor:
    """Any two experts for each token and layer."""
    return torch.rand(batch, time, layers, CONFIG.n_routed_experts).argsort(-1)[..., :2]


def own_routes(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    """What the routers of the main model choose by themselves, [B, T, L, K]."""
    chosen: list[torch.Tensor] = []
    hooks = [
        router.register_forward_hook(lambda _module, _args, out: chosen.append(out[0])) for router in model.routers()
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return torch.stack(chosen, dim=1).unflatten(0, ids.shape)


@pytest.mark.parametrize(("tokens", "temperature"), [(1, 1.0), (5, 1.0), (300, 1.0), (300, 0.6), (5, 2.0)])
def test_logprobs_and_entropy_are_those_of_a_plain_log_softmax(
    monkeypatch: pytest.MonkeyPatch, tokens: int, temperature: float
) -> None:
    monkeypatch.setattr("crosschip.model.cross_entropy._CHUNK_LOGITS", 97 * 64)  # several chunks
    hidden = torch.randn(tokens, 16, requires_grad=True)
    weight = torch.randn(97, 16, requires_grad=True)
    labels = torch.randint(0, 97, (tokens,))
    labels[::3] = -100
    upstream = torch.randn(tokens)  # another factor for each token, as advantages and ratios give
    plain = (hidden @ weight.t() / temperature).log_softmax(-1)
    trained = labels != -100
    expected = torch.where(trained, plain.gather(1, labels.clamp(min=0)[:, None]).squeeze(1), 0.0)
    wanted = torch.autograd.grad((expected * upstream).sum(), (hidden, weight))
    found, entropy = linear_logprobs(hidden, weight, labels, temperature)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(entropy, torch.where(trained, -(plain.exp() * plain).sum(-1), 0.0), atol=1e-5)
    assert not entropy.requires_grad
    for ours, theirs in zip(torch.autograd.grad((found * upstream).sum(), (hidden, weight)), wanted, strict=True):
        assert relative_error(ours, theirs) < 1e-5 or theirs.norm() == 0
    assert not found[~trained].any()


def test_the_models_logprobs_are_those_of_its_logits_and_add_up_to_its_loss() -> None:
    model = random_model(CONFIG)
    ids, labels = made_batch()
    found = model.logprobs(ids, labels)
    expected = model(ids).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    assert torch.allclose(found.logprobs_BT, torch.where(labels == -100, 0.0, expected), atol=1e-5)
    loss = model.loss(ids, labels)
    assert -found.logprobs_BT.sum().item() == pytest.approx(loss.loss_sum.item(), rel=1e-5)
    assert torch.equal(found.expert_load_LE, loss.expert_load_LE[:2]), "the main model's layers alone"
    wanted = torch.autograd.grad(loss.loss_sum, list(model.layers.parameters()), allow_unused=True)
    ours = torch.autograd.grad(-found.logprobs_BT.sum(), list(model.layers.parameters()), allow_unused=True)
    for one, other in zip(ours, wanted, strict=True):
        assert one is not None
        assert other is not None
        assert relative_error(one, other) < 1e-4


def test_bf16_computes_in_bf16_and_gives_fp32() -> None:
    model = random_model(CONFIG)
    ids, labels = made_batch()
    found, exact = (model.logprobs(ids, labels, dtype).logprobs_BT for dtype in (torch.bfloat16, torch.float32))
    assert found.dtype == torch.float32
    assert 1e-5 < relative_error(found.detach(), exact.detach()) < 0.1
    found.sum().backward()


def test_ones_own_routes_change_nothing_and_others_do() -> None:
    model = random_model(CONFIG)
    ids, labels = made_batch()
    free = model.logprobs(ids, labels)
    own = own_routes(model, ids)
    replayed = model.logprobs(ids, labels, routes=own.to(torch.uint8))
    assert torch.equal(replayed.logprobs_BT, free.logprobs_BT)
    assert torch.equal(replayed.expert_load_LE, free.expert_load_LE)
    shifted = model.logprobs(ids, labels, routes=(own + 1) % CONFIG.n_routed_experts)
    assert (shifted.logprobs_BT - free.logprobs_BT).abs().max() > 1e-2, "the negative control"
    assert torch.equal(shifted.expert_load_LE, free.expert_load_LE.roll(1, dims=1))


def test_a_row_of_minus_one_lets_the_router_choose() -> None:
    model = random_model(CONFIG)
    ids, labels = made_batch()
    free = model.logprobs(ids, labels).logprobs_BT
    nothing_known = torch.full((3, 12, 2, 2), -1, dtype=torch.int16)
    assert torch.equal(model.logprobs(ids, labels, routes=nothing_known).logprobs_BT, free)
    partly = made_routes(3, 12)
    partly[:, :6] = -1
    partly[:, :6, :, 1] = 3  # half of a row is no row
    found = model.logprobs(ids, labels, routes=partly).logprobs_BT
    assert torch.allclose(found[:, :6], free[:, :6], atol=1e-5), "tokens before the first told one"
    assert (found[:2, 6:] - free[:2, 6:]).abs().max() > 1e-2


@pytest.mark.parametrize("changes", [{}, {"norm_topk_prob": False}, {"routed_scaling_factor": 2.5}])
def test_told_experts_are_weighted_by_the_routers_own_scores(changes: dict[str, object]) -> None:
    config = ModelConfig(vocab_size=97, n_routed_experts=6, **changes)  # type: ignore[arg-type]
    scores = torch.rand(7, 6, requires_grad=True)
    bias = torch.randn(6)
    told = made_routes(7, 1, 1)[:, 0, 0]
    ids, weights = route(scores, bias, config, told)
    assert torch.equal(ids, told)
    expected = torch.stack([scores[row, told[row]] for row in range(7)])
    if config.norm_topk_prob:
        expected = expected / expected.sum(-1, keepdim=True)
    expected = expected * config.routed_scaling_factor
    assert torch.allclose(weights, expected)
    factor = torch.randn(7, 2)
    ours, wanted = (torch.autograd.grad((each * factor).sum(), scores)[0] for each in (weights, expected))
    assert torch.allclose(ours, wanted, atol=1e-6)
    assert ours.norm() > 0


def test_the_routers_learn_from_told_experts() -> None:
    model = random_model(CONFIG)
    ids, labels = made_batch()
    model.logprobs(ids, labels, routes=made_routes(3, 12)).logprobs_BT.sum().backward()
    gradients = [router.weight.grad for router in model.routers()]
    assert all(gradient is not None and gradient.norm() > 0 for gradient in gradients[:2])
    assert gradients[2] is None, "the module for a further token takes no part"


def test_routes_of_another_shape_are_refused() -> None:
    model = random_model(CONFIG)
    ids, labels = made_batch()
    with pytest.raises(ModelError, match=r"\[3, 12, 3, 2\].*\[3, 12, 2, 2\]"):
        model.logprobs(ids, labels, routes=made_routes(3, 12, 3))


def test_a_dense_model_has_log_probs_too() -> None:
    model = random_model(ModelConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, first_k_dense_replace=2))
    ids, labels = made_batch()
    routes = torch.zeros((3, 12, 0, 2), dtype=torch.uint8)
    found = model.logprobs(ids, labels, routes=routes)
    assert found.expert_load_LE.shape == (0, 8)
    assert F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), reduction="sum").item() == pytest.approx(
        -found.logprobs_BT.sum().item(), rel=1e-5
    )


SAME_BY_TWO_RANKS = """
import torch
from crosschip.model import Transformer
from crosschip.recipe import ParallelSettings
from crosschip.train.group.full_model import gather_model
from crosschip.train.group.sharding import release_parameters, shard_model
from crosschip.train.group.world import join_world
from tests.model.configs import random_model, relative_error
from tests.model.test_logprobs import CONFIG, made_batch, made_routes

torch.set_num_threads(1)
torch.manual_seed(0)
ids, labels = made_batch()
routes = made_routes(3, 12)
alone = random_model(CONFIG)
expected = alone.logprobs(ids, labels, routes=routes)
(2 * (expected.logprobs_BT.exp()).sum()).backward()  # two ranks with the same tokens: the sum over both
wanted = {name: parameter.grad for name, parameter in alone.named_parameters()}
with join_world(torch.device("cpu"), 60.0) as world:
    for across in (1, 2):
        model = shard_model(random_model(CONFIG), world, ParallelSettings(expert_parallel=across))
        found = model.logprobs(ids, labels, routes=routes)
        assert torch.allclose(found.logprobs_BT, expected.logprobs_BT, atol=1e-5)
        found.logprobs_BT.exp().sum().backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is None) == (wanted[name] is None), name
            if parameter.grad is not None:
                assert relative_error(parameter.grad.full_tensor(), wanted[name]) < 1e-4, name
        with torch.no_grad():
            model.logprobs(ids, labels)
        release_parameters(model)
"""

ON_THE_SIMULATED_CHIP = """
import torch
from crosschip.chips import find_chip
from tests.model.configs import random_model, relative_error
from tests.model.test_logprobs import CONFIG, made_batch, made_routes

torch.manual_seed(0)
device = find_chip("sim").device
ids, labels = made_batch()
routes = made_routes(3, 12)
routes[:, -3:] = -1
found = []
for where in ("cpu", device):
    model = random_model(CONFIG).to(where)
    given = model.logprobs(ids.to(where), labels.to(where), routes=routes.to(where))
    given.logprobs_BT.sum().backward()
    found.append((given.logprobs_BT.detach().cpu(), given.entropy_BT.cpu(), model.lm_head.weight.grad.cpu()))
for ours, theirs in zip(*found, strict=True):
    assert relative_error(ours, theirs) < 1e-5
"""


def test_two_ranks_that_share_the_model_get_the_same() -> None:
    ended = run_together(2, ["-c", SAME_BY_TWO_RANKS], timeout_s=120)
    assert all(code == 0 for code, _ in ended), "\n".join(said for _, said in ended)


def test_the_simulated_chip_gives_the_same() -> None:
    environment = os.environ | {"CROSSCHIP_SIM": "sim", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ON_THE_SIMULATED_CHIP]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
