"""DeepSeek-V3 as llama.cpp's `deepseek2`: tensors and fields, declared once and read in both directions.

llama.cpp computes latent attention with the up-projections of keys and values absorbed, so `kv_b_proj` lies in two:
`attn_k_b` [heads, kv_lora_rank, qk_nope_head_dim] (transposed) and `attn_v_b` [heads, v_head_dim, kv_lora_rank].
What a field means there stands in llama.cpp's src/models/deepseek2.cpp.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from crosschip.handoff.conversion.operators import (
    Chain,
    Operator,
    Rename,
    Reshape,
    Split,
    Stack,
    Transpose,
)
from crosschip.handoff.conversion.rotary_pairs import latent_in_pairs, query_in_pairs
from crosschip.handoff.gguf.metadata import Metadata, as_float32, fraction, unknown_fields, whole
from crosschip.handoff.gguf.rotary import rope_of

__all__ = ["MODEL_TYPES", "NAME", "fields_of", "left_out", "metadata_of", "operators_of", "reasons_against"]

NAME = "deepseek2"
MODEL_TYPES = ("deepseek_v3",)

# By these numbers llama.cpp tells models whose queries have no low rank, whatever their fields say.
_LITE_LAYERS = (26, 27)
_SIGMOID = 2  # of gguf's ExpertGatingFuncType
_ONE_TO_ONE = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "kv_lora_rank": "attention.kv_lora_rank",
    "v_head_dim": "attention.value_length_mla",
    "qk_rope_head_dim": "rope.dimension_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "n_routed_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "n_shared_experts": "expert_shared_count",
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
    "vocab_size": "vocab_size",
}
_KNOWN = {
    *_ONE_TO_ONE,
    *("rms_norm_eps", "q_lora_rank", "qk_nope_head_dim", "routed_scaling_factor", "norm_topk_prob", "rope_theta"),
    *("rope_scaling", "rope_parameters", "rope_interleave", "scoring_func", "topk_method", "moe_layer_freq"),
    *("hidden_act", "attention_bias", "num_key_value_heads", "qk_head_dim", "head_dim"),
}
_ONLY = {"hidden_act": "silu", "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
}
_LOW_RANK_QUERY = {
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
}
_ROUTER = {"mlp.gate.weight": "ffn_gate_inp.weight", "mlp.gate.e_score_correction_bias": "exp_probs_b.bias"}
_PARTS = ("gate", "up", "down")


def reasons_against(config: dict[str, Any]) -> list[str]:
    """Every field whose value llama.cpp would compute otherwise or not load, in words."""
    found = [
        f"{field} = {config[field]!r}; only {only!r} is computed"
        for field, only in _ONLY.items()
        if config.get(field, only) != only
    ]
    layers, query_rank = config["num_hidden_layers"], config.get("q_lora_rank")
    if query_rank is None and layers not in _LITE_LAYERS:
        found.append(f"q_lora_rank = None; with {layers} layers the loader asks for a low rank of the queries")
    if query_rank is not None and layers in _LITE_LAYERS:
        found.append(f"q_lora_rank = {query_rank}; with {layers} layers the loader takes queries of full rank only")
    if config.get("attention_bias"):
        found.append("attention_bias = True; there is no place for it")
    if not config.get("n_shared_experts"):
        found.append("n_shared_experts = 0; a shared expert is always loaded")
    if not config.get("n_routed_experts"):
        found.append("n_routed_experts = 0; there are always experts")
    rope = rope_of(config)
    if rope.kind == "llama3":
        found.append("rope_scaling.type = 'llama3'; latent attention does not read its factors")
    if rope.kind == "yarn":
        scaling = rope.scaling
        if not scaling.get("mscale") or scaling.get("mscale") != scaling.get("mscale_all_dim"):
            words = f"mscale = {scaling.get('mscale')!r}, mscale_all_dim = {scaling.get('mscale_all_dim')!r}"
            found.append(f"{words}; they must be the same and not 0")
    return [*found, *rope.reasons_against(), *unknown_fields(config, _KNOWN)]


def metadata_of(config: dict[str, Any]) -> Metadata:
    """The architecture's keys; what has none was refused before."""
    rope = rope_of(config)
    found: Metadata = {key: int(_given(config, field)) for field, key in _ONE_TO_ONE.items()}
    latent, rotated = int(config["kv_lora_rank"]), int(config["qk_rope_head_dim"])
    if config.get("q_lora_rank") is not None:
        found["attention.q_lora_rank"] = int(config["q_lora_rank"])
    found |= {
        "attention.head_count_kv": 1,  # the latent, shared by all heads
        "attention.key_length": latent + rotated,
        "attention.value_length": latent,
        "attention.key_length_mla": int(config["qk_nope_head_dim"]) + rotated,
        "attention.layer_norm_rms_epsilon": as_float32(_given(config, "rms_norm_eps")),
        "expert_gating_func": _SIGMOID,
        "expert_weights_scale": as_float32(_given(config, "routed_scaling_factor")),
        "expert_weights_norm": bool(_given(config, "norm_topk_prob")),
        **rope.metadata(),
    }
    if rope.kind == "yarn":  # stored as a tenth of it, and divided by a tenth when it is read
        found["rope.scaling.yarn_log_multiplier"] = as_float32(0.1 * rope.scaling["mscale_all_dim"])
    return {f"{NAME}.{key}": value for key, value in found.items()}


# What config.json means where it is silent, as transformers reads it.
_DEFAULTS: dict[str, Any] = {
    "n_group": 1,
    "topk_group": 1,
    "rms_norm_eps": 1e-6,
    "first_k_dense_replace": 0,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
}


def _given(config: dict[str, Any], field: str) -> Any:
    value = config.get(field)
    return _DEFAULTS[field] if value is None and field in _DEFAULTS else config[field]


def fields_of(metadata: Metadata) -> dict[str, Any]:
    """The fields of config.json that a file's keys mean: `metadata_of` read backwards."""
    own = {key.removeprefix(f"{NAME}."): value for key, value in metadata.items()}
    found: dict[str, Any] = {field: whole(own, key) for field, key in _ONE_TO_ONE.items() if key in own}
    rotated = whole(own, "rope.dimension_count")
    return {
        "model_type": MODEL_TYPES[0],
        "architectures": ["DeepseekV3ForCausalLM"],
        **found,
        "q_lora_rank": own.get("attention.q_lora_rank"),
        "qk_nope_head_dim": whole(own, "attention.key_length_mla") - rotated,
        "num_key_value_heads": whole(own, "attention.head_count"),
        "rms_norm_eps": fraction(own, "attention.layer_norm_rms_epsilon"),
        "routed_scaling_factor": fraction(own, "expert_weights_scale"),
        "norm_topk_prob": own["expert_weights_norm"],
        "rope_interleave": True,
        "attention_bias": False,
        "num_nextn_predict_layers": 0,
        **_ONLY,
    }


def left_out(config: dict[str, Any], names: Collection[str]) -> tuple[list[str], list[str]]:
    """Tensors of the source that the file does not take, and that in words."""
    past = int(config["num_hidden_layers"])
    extra = [name for name in names if name.startswith("model.layers.") and int(name.split(".")[2]) >= past]
    derived = [name for name in names if name.endswith("rotary_emb.inv_freq")]
    words = f"multi-token prediction: {len(extra)} tensors from layer {past} on, which llama.cpp does not run"
    return [*extra, *derived], [words] if extra else []


def operators_of(config: dict[str, Any], names: Collection[str]) -> tuple[Operator, ...]:
    """All operators from the published layout to llama.cpp's. `names` tells whether an output matrix is there."""
    found: list[Operator] = [Rename("model.embed_tokens.weight", "token_embd.weight")]
    for layer in range(int(config["num_hidden_layers"])):
        found += _attention(config, f"model.layers.{layer}.", f"blk.{layer}.")
        found += _feed_forward(config, layer, f"model.layers.{layer}.", f"blk.{layer}.")
    found.append(Rename("model.norm.weight", "output_norm.weight"))
    if "lm_head.weight" in names:
        found.append(Rename("lm_head.weight", "output.weight"))
    return tuple(found)


def _attention(config: dict[str, Any], theirs: str, ours: str) -> list[Operator]:
    renamed = dict(_LAYER)
    query = ("self_attn.q_proj.weight", "attn_q.weight")
    if config.get("q_lora_rank") is not None:
        renamed |= _LOW_RANK_QUERY
        query = ("self_attn.q_b_proj.weight", "attn_q_b.weight")
    found: list[Operator] = [Rename(theirs + source, ours + target) for source, target in renamed.items()]
    latent = (f"{theirs}self_attn.kv_a_proj_with_mqa.weight", f"{ours}attn_kv_a_mqa.weight")
    if config.get("rope_interleave", True):  # llama.cpp rotates pairs, and published weights lie so already
        found += [Rename(theirs + query[0], ours + query[1]), Rename(*latent)]
    else:
        found += [query_in_pairs(config, theirs + query[0], ours + query[1]), latent_in_pairs(config, *latent)]
    found.append(_absorbed(config, f"{theirs}self_attn.kv_b_proj.weight", ours))
    return found


def _absorbed(config: dict[str, Any], source: str, ours: str) -> Operator:
    names = ("num_attention_heads", "qk_nope_head_dim", "v_head_dim", "kv_lora_rank")
    heads, plain, value, latent = (int(config[name]) for name in names)
    flat, cut = (heads * (plain + value), latent), (heads, plain + value, latent)
    parts = Split("heads", ("keys", f"{ours}attn_v_b.weight"), (plain, value), dim=1)
    turned = Transpose("keys", f"{ours}attn_k_b.weight", (0, 2, 1))
    return Chain((Reshape(source, "heads", flat, cut), parts, turned))


def _feed_forward(config: dict[str, Any], layer: int, theirs: str, ours: str) -> list[Operator]:
    if layer < int(config.get("first_k_dense_replace") or 0):
        return [Rename(f"{theirs}mlp.{part}_proj.weight", f"{ours}ffn_{part}.weight") for part in _PARTS]
    found: list[Operator] = [Rename(theirs + source, ours + target) for source, target in _ROUTER.items()]
    for part in _PARTS:
        shared = f"{theirs}mlp.shared_experts.{part}_proj.weight"
        found.append(Rename(shared, f"{ours}ffn_{part}_shexp.weight"))
        experts = range(int(config["n_routed_experts"]))
        sources = tuple(f"{theirs}mlp.experts.{expert}.{part}_proj.weight" for expert in experts)
        found.append(Stack(sources, f"{ours}ffn_{part}_exps.weight"))
    return found
