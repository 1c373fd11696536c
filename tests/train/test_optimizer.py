import pytest
import torch

from crosschip.errors import CheckpointError
from crosschip.model import ModelConfig, Transformer, init_weights
from crosschip.recipe import StageSettings
from crosschip.train.optimizer import build_optimizer, load_optimizer_tensors, optimizer_tensors, parameter_groups

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "n_routed_experts": 4, "kv_lora_rank": 16}
STAGE = StageSettings(steps=100, warmup_steps=0)


def new_model(**settings: object) -> Transformer:
    model = Transformer(ModelConfig(vocab_size=64, **SMALL, **settings))  # type: ignore[arg-type]
    init_weights(model, 0)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_only_matrices_decay_and_every_parameter_is_trained_once(tied: bool) -> None:
    model = new_model(tie_word_embeddings=tied)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, spared = ([name_of[id(p)] for p in group["params"]] for group in parameter_groups(model, 0.1))
    assert sorted(decayed + spared) == sorted(name_of.values())
    assert "embed_tokens.weight" in spared
    assert ("lm_head.weight" in decayed) == (not tied)
    assert "layers.1.mlp.experts.gate_up_proj" in decayed
    assert all("norm" in name or "embed" in name for name in spared)


def test_the_cpu_has_the_fused_kernel() -> None:
    assert build_optimizer(new_model(), STAGE).defaults["fused"] is True


def test_a_device_without_the_fused_kernel_gets_the_plain_one(monkeypatch) -> None:
    def missing(*arguments: object, **keywords: object) -> None:
        raise NotImplementedError("Could not run 'aten::_fused_adamw_' with arguments from the 'PrivateUse1' backend.")

    monkeypatch.setattr(torch, "_fused_adamw_", missing)
    model = new_model()
    optimizer = build_optimizer(model, STAGE)
    assert optimizer.defaults["fused"] is False
    step(model, optimizer, 1)


def test_complex_parameters_get_the_plain_one_and_are_trained() -> None:
    model = torch.nn.Linear(4, 2, dtype=torch.complex64)
    optimizer = build_optimizer(model, STAGE)
    assert optimizer.defaults["fused"] is False
    before = model.weight.detach().clone()
    model(torch.ones(3, 4, dtype=torch.complex64)).abs().sum().backward()
    optimizer.step()
    moved = model.weight.detach() - before
    assert bool(moved.real.all())
    assert bool(moved.imag.all())


def step(model: Transformer, optimizer: torch.optim.Optimizer, seed: int) -> None:
    tokens = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model.loss(tokens, tokens, torch.float32).loss_sum.backward()
    optimizer.step()


def test_the_state_comes_back_bit_for_bit() -> None:
    model = new_model()
    optimizer = build_optimizer(model, STAGE)
    step(model, optimizer, 1)
    tensors = optimizer_tensors(model, optimizer)
    assert "layers.0.input_layernorm.weight/exp_avg_sq" in tensors
    twin = new_model()
    twin.load_state_dict(model.state_dict())
    twin_optimizer = build_optimizer(twin, STAGE)
    load_optimizer_tensors(twin, twin_optimizer, tensors, "here")
    for one, its_optimizer in ((model, optimizer), (twin, twin_optimizer)):
        step(one, its_optimizer, 2)
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_state_of_an_unknown_parameter_is_refused_by_name() -> None:
    model = new_model()
    optimizer = build_optimizer(model, STAGE)
    tensors = {"layers.9.weight/exp_avg": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"somewhere has optimizer state for layers.9.weight"):
        load_optimizer_tensors(model, optimizer, tensors, "somewhere")
