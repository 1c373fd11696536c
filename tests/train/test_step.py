import pytest
import torch

from crosschip.data import NOT_TRAINED, Batch
from crosschip.errors import DataError
from crosschip.model import ModelConfig, Transformer, init_weights
from crosschip.recipe import StageSettings
from crosschip.train.metrics import step_record
from crosschip.train.optimizer import build_optimizer
from crosschip.train.step import NonFiniteError, StepHooks, StepResult, StepSums, train_step

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
    num_nextn_predict_layers=1, num_attention_heads=2, n_routed_experts=4, kv_lora_rank=16, qk_rope_head_dim=8,
    qk_nope_head_dim=8, v_head_dim=8,
)  # fmt: skip


def new_model(seed: int = 0) -> Transformer:
    model = Transformer(CONFIG)
    init_weights(model, seed)
    return model


def stage(**settings: object) -> StageSettings:
    return StageSettings.model_validate({"steps": 100, "batch_size": 8, "warmup_steps": 0, **settings})


def new_batch(seed: int = 0, masked: bool = True) -> Batch:
    tokens = torch.randint(0, 64, (8, 17), generator=torch.Generator().manual_seed(seed))
    labels = tokens[:, 1:].clone()
    if masked:  # very unequal numbers of trained tokens per sequence, one sequence with none
        for row in range(8):
            labels[row, 2 * row + 1 :] = NOT_TRAINED
        labels[2] = NOT_TRAINED
    return Batch(tokens[:, :-1].contiguous(), labels)


def gradients(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("masked", [True, False])
def test_accumulation_gives_the_update_of_the_whole_batch(masked: bool) -> None:
    found = []
    for parts in (1, 4):
        model = new_model()
        settings = stage(gradient_accumulation=parts, gradient_clip=1e9)
        optimizer = build_optimizer(model, settings)
        result = train_step(model, optimizer, new_batch(masked=masked), settings, torch.float32, 1, 1e-3)
        found.append((result, gradients(model)))
    (whole, gradients_whole), (parts_result, gradients_parts) = found
    assert parts_result.loss == pytest.approx(whole.loss, rel=1e-6)
    assert parts_result.mtp_loss == pytest.approx(whole.mtp_loss, rel=1e-6)
    assert parts_result.num_trained_tokens == whole.num_trained_tokens
    # Sums of up to 128 products in another order: a few dozen units in the last place of the largest gradient.
    largest = max(float(g.abs().max()) for g in gradients_whole.values())
    for name, gradient in gradients_whole.items():
        assert torch.allclose(gradient, gradients_parts[name], rtol=0, atol=64 * 2**-24 * largest), name


def test_a_mean_of_part_means_would_be_another_update() -> None:
    """The negative control of the test above: its batch tells the two weightings apart."""
    model, batch = new_model(), new_batch()
    means = [
        model.loss(ids, labels, torch.float32).loss_sum / max(1, int((labels != NOT_TRAINED).sum()))
        for ids, labels in zip(batch.input_ids_BT.chunk(4), batch.labels_BT.chunk(4), strict=True)
    ]
    settings = stage(mtp_loss_weight=0.0)
    result = train_step(model, build_optimizer(model, settings), batch, settings, torch.float32, 1, 1e-3)
    assert abs(float(torch.stack(means).mean().detach()) - result.loss) > 1e-3


def test_loss_falls_on_one_batch() -> None:
    model, settings = new_model(), stage(learning_rate=1e-2)
    optimizer, batch = build_optimizer(model, settings), new_batch(masked=False)
    losses = [train_step(model, optimizer, batch, settings, torch.float32, 1, 1e-2).loss for _ in range(30)]
    assert losses[0] == pytest.approx(4.16, abs=0.1)  # ln 64
    assert losses[-1] < 0.5 * losses[0]


def test_bf16_compute_keeps_fp32_weights_and_states() -> None:
    model, settings = new_model(), stage()
    optimizer, batch = build_optimizer(model, settings), new_batch(masked=False)
    coarse = train_step(model, optimizer, batch, settings, torch.bfloat16, 1, 1e-3)
    exact_model = new_model()
    exact = train_step(exact_model, build_optimizer(exact_model, settings), batch, settings, torch.float32, 1, 1e-3)
    assert coarse.loss == pytest.approx(exact.loss, rel=2e-2)
    assert coarse.loss != exact.loss
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert states
    assert all(value.dtype == torch.float32 for value in states)


def test_the_norm_is_that_before_clipping() -> None:
    norms = []
    for clip in (1e9, 1e-3):
        model, settings = new_model(), stage(gradient_clip=clip)
        result = train_step(model, build_optimizer(model, settings), new_batch(), settings, torch.float32, 1, 1e-3)
        norms.append(result.gradient_norm)
        clipped = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients(model).values()]))
        assert float(clipped) <= clip * 1.001
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert norms[0] > 1e-3


def test_router_bias_moves_against_the_load_and_only_when_asked() -> None:
    for rate in (0.0, 0.01):
        model, settings = new_model(), stage(router_bias_update_rate=rate)
        result = train_step(model, build_optimizer(model, settings), new_batch(), settings, torch.float32, 1, 1e-3)
        moved = torch.stack([router.e_score_correction_bias for router in model.routers()]).abs().max()
        assert float(moved) == pytest.approx(rate)
        assert result.router_imbalance is not None
        assert 1.0 <= result.router_imbalance <= CONFIG.n_routed_experts / CONFIG.num_experts_per_tok


def test_non_finite_loss_stops_before_any_weight_is_touched() -> None:
    model, settings = new_model(), stage()
    optimizer = build_optimizer(model, settings)
    train_step(model, optimizer, new_batch(), settings, torch.float32, 1, 1e-3)
    with torch.no_grad():
        model.lm_head.weight[3, 5] = float("nan")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(NonFiniteError, match=r"step 2: loss nan"):
        train_step(model, optimizer, new_batch(1), settings, torch.float32, 2, 1e-3)
    for name, tensor in model.state_dict().items():
        assert torch.equal(before[name].nan_to_num(7.0), tensor.nan_to_num(7.0)), name
    assert all(float(state["step"]) == 1 for state in optimizer.state.values())


def test_a_batch_without_trained_tokens_is_refused() -> None:
    model, settings, batch = new_model(), stage(), new_batch()
    nothing = Batch(batch.input_ids_BT, torch.full_like(batch.labels_BT, NOT_TRAINED))
    with pytest.raises(DataError, match="none of the 128 tokens"):
        train_step(model, build_optimizer(model, settings), nothing, settings, torch.float32, 1, 1e-3)


def test_a_step_that_is_judged_to_be_skipped_changes_nothing() -> None:
    model, settings = new_model(), stage(router_bias_update_rate=0.01)
    optimizer = build_optimizer(model, settings)
    train_step(model, optimizer, new_batch(), settings, torch.float32, 1, 1e-3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    judged: list[tuple[int, StepResult]] = []

    def skip(step: int, result: StepResult) -> str:
        judged.append((step, result))
        return "skip"

    hooks = StepHooks(judge=skip)  # type: ignore[arg-type]
    result = train_step(model, optimizer, new_batch(1), settings, torch.float32, 2, 1e-3, hooks=hooks)
    assert [step for step, _ in judged] == [2]
    assert judged[0][1].updated
    assert not result.updated
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(float(state["step"]) == 1 for state in optimizer.state.values())
    assert step_record(2, result, 0.5, 1e-3)["skipped"] is True


def test_what_a_hook_makes_of_the_gradients_is_measured_and_applied() -> None:
    def halve(model: Transformer, sums: StepSums) -> StepSums:
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad *= 0.5
        return sums

    results = []
    for hooks in (StepHooks(), StepHooks(after_backward=halve)):
        model, settings = new_model(), stage(gradient_clip=1e9)
        optimizer = build_optimizer(model, settings)
        results.append(train_step(model, optimizer, new_batch(), settings, torch.float32, 1, 1e-3, hooks=hooks))
    assert results[1].gradient_norm == results[0].gradient_norm / 2
    assert results[1].loss == results[0].loss
