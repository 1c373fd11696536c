"""What a `config.json` may hold: broken ones are refused by their field."""

from __future__ import annotations

from typing import Any

import pytest

from crosschip.errors import BrokenConfigError
from crosschip.model import ModelConfig

GOOD: dict[str, Any] = ModelConfig(vocab_size=64).to_hf()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kv_lora_rank", "32"),
        ("hidden_size", 12.5),
        ("num_hidden_layers", True),
        ("norm_topk_prob", "yes"),
        ("rms_norm_eps", "1e-6"),
        ("n_routed_experts", 0),
        ("qk_rope_head_dim", -8),
        ("eos_token_id", ["1"]),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_its_field(field: str, value: Any) -> None:
    with pytest.raises(BrokenConfigError, match=field):
        ModelConfig.from_hf({**GOOD, field: value})


@pytest.mark.parametrize("field", ["vocab_size", "num_attention_heads"])
def test_a_field_that_is_not_there_is_named(field: str) -> None:
    with pytest.raises(BrokenConfigError, match=field):
        ModelConfig.from_hf({name: value for name, value in GOOD.items() if name != field})


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": "many"},
        {"rope_parameters": [1]},
        {"rope_scaling": {"type": "yarn"}, "max_position_embeddings": None, "rope_parameters": None},
    ],
)
def test_rotary_fields_that_make_no_sense_are_refused(rope: dict[str, Any]) -> None:
    with pytest.raises(BrokenConfigError, match="rotary"):
        ModelConfig.from_hf({**GOOD, **rope})


def test_a_configuration_comes_back_as_it_was_written() -> None:
    config = ModelConfig(vocab_size=64, eos_token_id=(1, 2), q_lora_rank=16, num_nextn_predict_layers=1)
    assert ModelConfig.from_hf(config.to_hf()) == config
