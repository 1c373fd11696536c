import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from crosschip.model import ModelConfig, Transformer, init_weights
from crosschip.train.flops import train_flops_per_token


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_nextn_predict_layers": 2},
        {"first_k_dense_replace": 3},
        {"q_lora_rank": 24},
        {"n_shared_experts": 0, "num_experts_per_tok": 3},
    ],
)
def test_the_count_is_what_torch_counts(monkeypatch: pytest.MonkeyPatch, settings: dict[str, int]) -> None:
    """Short sequences, because torch counts the masked half of attention too; here that is under 2 % of everything."""
    monkeypatch.setattr("crosschip.model.experts._ROW_MULTIPLE", 1)  # the rows that fill up a tile are not the model's
    config = ModelConfig(vocab_size=256, hidden_size=64, num_hidden_layers=3, **settings)
    model = Transformer(config)
    init_weights(model, 0)
    tokens = torch.randint(0, 256, (64, 8), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        found = model.loss(tokens, tokens, torch.float32)
        (found.loss_sum + found.mtp_loss_sum).backward()
    # Each prediction module sees one token less than the one before: up to 2 of 8 in one of the four modules.
    allowed = 0.02 + 0.12 * config.num_nextn_predict_layers
    counted = counter.get_total_flops() / tokens.numel()
    assert counted == pytest.approx(train_flops_per_token(config, 8), rel=allowed)


def test_attention_grows_with_the_sequence_and_experts_with_their_number() -> None:
    config = ModelConfig(vocab_size=256)
    more = ModelConfig(vocab_size=256, num_experts_per_tok=4)
    assert train_flops_per_token(config, 2048) > train_flops_per_token(config, 256)
    extra = 6 * 2 * 3 * 256 * 256 * 3  # two more experts of three matrices in three layers
    assert train_flops_per_token(more, 256) - train_flops_per_token(config, 256) == pytest.approx(extra)
