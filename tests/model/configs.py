"""Random small configurations of the architecture, and transformers as the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from crosschip.model import ModelConfig, Transformer, init_weights

YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.707,
}


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """A configuration small enough to compare in milliseconds, with every switch of the architecture."""
    n_group = draw(st.sampled_from([1, 2, 4]))
    experts = n_group * draw(st.sampled_from([2, 3]))
    topk_group = draw(st.integers(1, n_group))
    chosen = draw(st.integers(1, experts // n_group * topk_group))
    return ModelConfig(
        vocab_size=97,
        hidden_size=draw(st.sampled_from([24, 32])),
        intermediate_size=draw(st.sampled_from([20, 48])),
        moe_intermediate_size=draw(st.sampled_from([8, 20])),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_nextn_predict_layers=draw(st.integers(0, 2)),
        num_attention_heads=draw(st.sampled_from([1, 3, 4])),
        n_shared_experts=draw(st.integers(1, 2)),
        n_routed_experts=experts,
        num_experts_per_tok=chosen,
        n_group=n_group,
        topk_group=topk_group,
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        norm_topk_prob=draw(st.booleans()),
        first_k_dense_replace=draw(st.integers(0, 3)),
        kv_lora_rank=draw(st.sampled_from([8, 20])),
        q_lora_rank=draw(st.sampled_from([None, 12])),
        qk_rope_head_dim=draw(st.sampled_from([4, 8])),
        qk_nope_head_dim=draw(st.sampled_from([6, 16])),
        v_head_dim=draw(st.sampled_from([5, 16, 28])),
        max_position_embeddings=64,
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        rope_theta=draw(st.sampled_from([10000.0, 50000.0])),
        rope_scaling=draw(st.sampled_from([None, YARN, {**YARN, "mscale_all_dim": 0.0, "mscale": 0.0}])),
        rope_interleave=draw(st.booleans()),
    )


def random_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """A model whose every parameter matters: large weights, norms off 1, biases and router biases off 0."""
    model = Transformer(config)
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.1 if parameter.ndim == 1 else 0.15))
        for router in model.routers():
            router.e_score_correction_bias.copy_(torch.randn(config.n_routed_experts, generator=generator) * 0.2)
    return model


def transformers_model(directory: Path) -> Any:
    """The same directory in transformers, eager attention, fp32."""
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Norm of the difference over norm of the reference."""
    return ((ours.double() - theirs.double()).norm() / (theirs.double().norm() + 1e-30)).item()
