"""What engines say when they refuse a model, and the field that is named.

None of these engines was run here: RECORDED are messages as users reported them in public threads, the others are
composed in the same form.
"""

from __future__ import annotations

from typing import Any

import pytest

from crosschip.dry_voyage.refusals import explain_refusal

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "topk_method": None,
    "max_position_embeddings": 8192,
    "vocab_size": 500,
    "num_attention_heads": 6,
    "n_routed_experts": 10,
    "n_group": 4,
    "rope_scaling": {"type": "yarn"},
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": True,
    "num_nextn_predict_layers": 1,
}

RECORDED = [
    (
        "vllm#22193",
        "ValueError: Head size 40 is not supported by MLACommon. Supported head sizes are: [576]. Set "
        "VLLM_ATTENTION_BACKEND=FLEX_ATTENTION to use FlexAttention backend which supports all head sizes.",
        "kv_lora_rank",
    ),
    (
        "vllm PR#13167",
        "[rank0]: ValueError: Head size 192 is not supported by PagedAttention. Supported head sizes are: [32, 64].",
        "kv_lora_rank",
    ),
    (
        "vllm#31480",
        "(Worker_TP4_EP4 pid=2532) ERROR 12-29 15:21:11 [multiproc_executor.py:751] ValueError: No valid attention "
        "backend found for cuda with AttentionSelectorConfig(head_size=576, dtype=torch.bfloat16, use_mla=True). "
        "Reasons: {TRITON_MLA: [sparse not supported]}.",
        "kv_lora_rank",
    ),
    ("vllm PR#11578", "[rank0]: KeyError: 'model.layers.29.mlp.gate.e_score_correction_bias'", "topk_method"),
    (
        "vllm#3676",
        "ValueError: User-specified max_model_len (131072) is greater than the derived max_model_len (None=8192 in "
        "model's config.json). This may lead to incorrect model outputs or CUDA errors.",
        "max_position_embeddings",
    ),
]
COMPOSED = [
    (
        "ValueError: Total number of attention heads (6) must be divisible by tensor parallel size (4).",
        "num_attention_heads",
    ),
    ("ValueError: vocab_size 500 must be divisible by 64", "vocab_size"),
    ("AssertionError: n_routed_experts must be a multiple of num_expert_group", "n_routed_experts"),
    (
        "KeyError: 'layers.4.enorm.weight' is no parameter of this model: layers.4.enorm.weight",
        "num_nextn_predict_layers",
    ),
    ("ValueError: Unknown RoPE scaling type: yarn2", "rope_scaling"),
    ("ValueError: Model architectures ['DeepseekV3ForCausalLM'] are not supported for now.", "architectures"),
    ("error: bfloat16 is not supported on this device", "torch_dtype"),
    ("ValueError: lm_head.weight missing from the checkpoint", "tie_word_embeddings"),
]


@pytest.mark.parametrize(("message", "field"), [*((text, field) for _, text, field in RECORDED), *COMPOSED])
def test_the_field_is_named_with_its_value(message: str, field: str) -> None:
    log = f"INFO 12-29 15:21:10 [utils.py:1] max_model_len=8192 rope_scaling vocab_size\n{message}\nINFO shutting down"
    refusal = explain_refusal(log, CONFIG)
    assert field in refusal.fields
    assert refusal.fields[field] == CONFIG[field]
    assert f"{field} = {CONFIG[field]!r}" in refusal.sentence
    assert refusal.advice
    assert any(message[-40:] in line for line in refusal.lines)


@pytest.mark.parametrize(
    ("message", "advice"),
    [
        ("ModuleNotFoundError: No module named 'vllm'", "environment is broken"),
        ("RuntimeError: [enforce fail at alloc_cpu.cpp:121] Cannot allocate memory", "more memory"),
        ("RuntimeError: size mismatch for layers.0.weight", "another shape"),
    ],
)
def test_what_no_field_can_mend_names_none(message: str, advice: str) -> None:
    refusal = explain_refusal(message, CONFIG)
    assert refusal.fields == {}
    assert advice in refusal.advice


def test_an_unknown_reason_shows_the_last_lines_and_blames_nothing() -> None:
    refusal = explain_refusal("starting\nFooError: the moon is in the wrong quarter\n", CONFIG)
    assert refusal.fields == {}
    assert refusal.message == "FooError: the moon is in the wrong quarter"
    assert "none of the known reasons" in refusal.advice


def test_a_log_that_speaks_of_fields_without_an_error_names_none() -> None:
    log = "INFO rope_scaling = None\nINFO e_score_correction_bias loaded\nWARNING vocab_size is padded\nbye"
    assert explain_refusal(log, CONFIG).fields == {}
    assert explain_refusal("", CONFIG).message == "it ended without a word"
