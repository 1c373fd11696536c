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
        ("num_nextn_predict_layers", -1),
        ("n_shared_experts", -1),
        ("first_k_dense_replace", -1),
        ("qk_rope_head_dim", 7),
        ("topk_group", 2),
        ("num_experts_per_tok", 9),
        ("n_group", 3),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_its_field(field: str, value: Any) -> None:
    with pytest.raises(BrokenConfigError, match=field):
        ModelConfig.from_hf({**GOOD, field: value})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_routed_experts": 4, "n_group": 4, "num_experts_per_tok": 1}, "n_group = 4 leaves one expert a group"),
        ({"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 5}, "more than the 4 experts"),
    ],
)
def test_groups_of_experts_that_no_choice_can_be_made_from_are_refused(changes: dict[str, int], words: str) -> None:
    with pytest.raises(BrokenConfigError, match=words):
        ModelConfig.from_hf({**GOOD, **changes})


@pytest.mark.parametrize(
    "field", ["vocab_size", "num_attention_heads", "hidden_size", "v_head_dim", "n_routed_experts"]
)
def test_a_field_that_is_not_there_or_null_is_named(field: str) -> None:
    for document in ({name: value for name, value in GOOD.items() if name != field}, {**GOOD, field: None}):
        with pytest.raises(BrokenConfigError, match=f"no field '{field}'"):
            ModelConfig.from_hf(document)


def test_numbers_of_experts_count_only_where_a_layer_has_some() -> None:
    document = {**GOOD, "first_k_dense_replace": GOOD["num_hidden_layers"], "num_experts_per_tok": 9, "topk_group": 2}
    assert ModelConfig.from_hf(document).num_moe_layers == 0
    del document["moe_intermediate_size"]
    assert ModelConfig.from_hf(document).num_moe_layers == 0
    document["moe_intermediate_size"] = 8
    with pytest.raises(BrokenConfigError, match="topk_group = 2"):
        ModelConfig.from_hf({**document, "num_nextn_predict_layers": 1})


_ROPE_OF_V3 = {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {**_ROPE_OF_V3, "original_max_position_embeddings": 4096},
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
KIMI_K2 = {
    **V3,
    "aux_loss_alpha": 0.001,
    "eos_token_id": [163585],
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "rope_scaling": {**_ROPE_OF_V3, "factor": 32.0, "beta_fast": 1.0, "original_max_position_embeddings": 4096},
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
    "vocab_size": 163840,
}
MOONLIGHT = {
    **KIMI_K2,
    "hidden_size": 2048,
    "max_position_embeddings": 8192,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "q_lora_rank": None,
    "rope_scaling": None,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"routed_scaling_factor": 1},
        {"n_group": None, "topk_group": None},
        {"n_shared_experts": None, "first_k_dense_replace": None},
        {"rope_theta": 1e6, "max_position_embeddings": 262144},
    ],
)
@pytest.mark.parametrize("published", [V3, KIMI_K2, MOONLIGHT], ids=["DeepSeek-V3", "Kimi-K2", "Moonlight"])
def test_what_is_published_is_read(published: dict[str, Any], changes: dict[str, Any]) -> None:
    config = ModelConfig.from_hf({**published, **changes})
    assert config.hidden_size == published["hidden_size"]
    yarn = published["rope_scaling"]
    assert (config.rope_scaling or {}).get("factor") == (yarn or {}).get("factor")
    assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": "many"},
        {"rope_parameters": [1]},
        {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 0}, "rope_parameters": None},
    ],
)
def test_rotary_fields_that_make_no_sense_are_refused(rope: dict[str, Any]) -> None:
    with pytest.raises(BrokenConfigError, match="rotary"):
        ModelConfig.from_hf({**GOOD, **rope})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("factor", "40"),
        ("factor", 0),
        ("factor", None),
        ("factor", float("nan")),
        ("original_max_position_embeddings", "4096"),
        ("original_max_position_embeddings", True),
        ("beta_fast", "32"),
        ("mscale_all_dim", -1.0),
        ("rope_theta", 0),
    ],
)
def test_a_number_of_the_rotary_embeddings_is_refused_by_its_field(field: str, value: Any) -> None:
    yarn = {**V3["rope_scaling"], field: value}
    with pytest.raises(BrokenConfigError, match=rf"field rope_scaling\.{field} = "):
        ModelConfig.from_hf({**V3, "rope_scaling": yarn})
    with pytest.raises(BrokenConfigError, match=rf"field rope_parameters\.{field} = "):
        ModelConfig.from_hf({**V3, "rope_scaling": None, "rope_parameters": yarn})


@pytest.mark.parametrize("value", [0, -1.0, "10000", None])
def test_a_base_of_the_rotations_that_is_none_is_refused_by_its_field(value: Any) -> None:
    with pytest.raises(BrokenConfigError, match="field rope_theta = "):
        ModelConfig.from_hf({**V3, "rope_theta": value})


def test_a_configuration_comes_back_as_it_was_written() -> None:
    config = ModelConfig(vocab_size=64, eos_token_id=(1, 2), q_lora_rank=16, num_nextn_predict_layers=1)
    assert ModelConfig.from_hf(config.to_hf()) == config
