"""Which tensors a model of a published family holds, in which shapes, as its `config.json` means them.

Declared from the modeling files of transformers 5. Readers pass over a tensor that they do not know, and fill one that
is missing with random numbers, so a directory is held against this before anything is made of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from crosschip.errors import HandoffError

__all__ = ["check_tensors", "expected_tensors"]

Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]

_LATENT = ("deepseek_v2", "deepseek_v3")
_ATTENTION = {"llama", "mistral", "qwen2", "qwen3", "qwen3_moe"}
_ROUTER_BIAS = "mlp.gate.e_score_correction_bias"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_BIASES = {"qwen2": ("q", "k", "v")}  # always; others have them where attention_bias says so
_MAY_HAVE_BIASES = {"llama", "qwen3", "qwen3_moe"}
_HEAD_DIM = {"qwen3": 128}  # where config.json is silent; else the width over the heads


def expected_tensors(config: dict[str, Any]) -> dict[str, Shape] | None:
    """Name and shape of every tensor; None for a family that is not declared here.

    Raises:
        HandoffError: a field of `config.json` is missing or no number.
    """
    if config.get("model_type") not in (*_ATTENTION, *_LATENT):
        return None
    return dict(_whole(config))


def _number(config: dict[str, Any], field: str, least: int = 1, silent: int | None = None) -> int:
    """A field that counts something, from `least` on; `silent` is what it means where it is missing or null."""
    value = silent if config.get(field) is None else config[field]
    if value is None:
        raise HandoffError(f"config.json has no field {field!r}", "complete the file")
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise HandoffError(f"config.json has {field} = {value!r}, which is no number from {least} on", "mend the file")
    return value


def check_tensors(config: dict[str, Any], found: dict[str, Shape], where: str) -> None:
    """Refuse a directory that lacks a tensor, holds one more, or one of another shape; families not declared here pass.

    Raises:
        HandoffError: which tensors.
    """
    expected = expected_tensors(config)
    if expected is None:
        return
    if missing := [name for name in expected if name not in found and not _may_be_missing(config, name)]:
        raise HandoffError(
            f"{where} lacks {len(missing)} tensors, the first: {', '.join(missing[:4])}",
            "the download or conversion is incomplete, or config.json is another model's",
        )
    if surplus := [name for name in found if name not in expected and not _may_be_surplus(config, name)]:
        raise HandoffError(
            f"{where} holds {len(surplus)} tensors that a {config['model_type']} of this config.json does not have, "
            f"the first: {', '.join(surplus[:4])}",
            "readers would pass over them without a word: remove them, or mend config.json if it is another model's",
        )
    for name, shape in expected.items():
        if found.get(name, shape) != shape:
            raise HandoffError(
                f"{where}: {name} has shape {list(found[name])}, config.json means {list(shape)}",
                "config.json and weights are not of one model",
            )


def _may_be_missing(config: dict[str, Any], name: str) -> bool:
    """A tied output, and the router's bias of a DeepSeek-V3 that chooses its experts without."""
    if name.endswith(_ROUTER_BIAS):
        return config.get("topk_method") not in ("noaux_tc", None)
    return name == "lm_head.weight" and bool(config.get("tie_word_embeddings"))


def _may_be_surplus(config: dict[str, Any], name: str) -> bool:
    """Rotary tables, which are computed anew, and the modules of multi-token prediction behind the last layer."""
    layer = _LAYER.match(name)
    is_behind = layer is not None and int(layer.group(1)) >= _number(config, "num_hidden_layers")
    return name.endswith("rotary_emb.inv_freq") or (config["model_type"] == "deepseek_v3" and is_behind)


def _whole(config: dict[str, Any]) -> Named:
    width, vocabulary = _number(config, "hidden_size"), _number(config, "vocab_size")
    attention = _latent_attention if config["model_type"] in _LATENT else _attention
    yield "model.embed_tokens.weight", (vocabulary, width)
    for layer in range(_number(config, "num_hidden_layers")):
        for part in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{part}.weight", (width,)
        for name, shape in (*attention(config), *_mlp_or_experts(config, layer)):
            yield f"model.layers.{layer}.{name}", shape
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (vocabulary, width)


def _attention(config: dict[str, Any]) -> Named:
    kind, width, heads = config["model_type"], _number(config, "hidden_size"), _number(config, "num_attention_heads")
    head = _number(config, "head_dim", silent=_HEAD_DIM.get(kind, max(width // heads, 1)))
    key_rows = _number(config, "num_key_value_heads", silent=heads) * head
    biases = _BIASES.get(
        kind, ("q", "k", "v", "o") if kind in _MAY_HAVE_BIASES and config.get("attention_bias") else ()
    )
    for part, rows in (("q", heads * head), ("k", key_rows), ("v", key_rows), ("o", width)):
        yield f"self_attn.{part}_proj.weight", (rows, heads * head if part == "o" else width)
        if part in biases:
            yield f"self_attn.{part}_proj.bias", (rows,)
    if kind.startswith("qwen3"):
        yield from ((f"self_attn.{part}_norm.weight", (head,)) for part in ("q", "k"))


def _latent_attention(config: dict[str, Any]) -> Named:
    width, heads = _number(config, "hidden_size"), _number(config, "num_attention_heads")
    latent, rotated, plain = (_number(config, n) for n in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim"))
    value = _number(config, "v_head_dim")
    query = None if config.get("q_lora_rank") is None else _number(config, "q_lora_rank")
    shapes: dict[str, Shape] = {"kv_a_proj_with_mqa": (latent + rotated, width), "o_proj": (width, heads * value)}
    if query is not None:
        shapes["q_a_proj"] = (query, width)
    for name, shape in shapes.items():
        yield f"self_attn.{name}.weight", shape
        if config.get("attention_bias"):
            yield f"self_attn.{name}.bias", shape[:1]
    yield "self_attn.kv_a_layernorm.weight", (latent,)
    yield "self_attn.kv_b_proj.weight", (heads * (plain + value), latent)
    if query is not None:
        yield "self_attn.q_a_layernorm.weight", (query,)
    name, columns = ("q_proj", width) if query is None else ("q_b_proj", query)
    yield f"self_attn.{name}.weight", (heads * (plain + rotated), columns)


def _mlp_or_experts(config: dict[str, Any], layer: int) -> Named:
    width, number = _number(config, "hidden_size"), _num_experts(config, layer)
    has_bias = bool(config["model_type"] in ("llama", "deepseek_v2") and config.get("mlp_bias"))
    if not number:
        yield from _mlp("mlp", width, _number(config, "intermediate_size"), has_bias)
        return
    inner = _number(config, "moe_intermediate_size")
    yield "mlp.gate.weight", (number, width)
    if config["model_type"] == "deepseek_v3":
        yield _ROUTER_BIAS, (number,)
    for expert in range(number):
        yield from _mlp(f"mlp.experts.{expert}", width, inner)
    if config["model_type"] in _LATENT and (shared := _number(config, "n_shared_experts", least=0, silent=0)):
        yield from _mlp("mlp.shared_experts", width, inner * shared, has_bias)


def _num_experts(config: dict[str, Any], layer: int) -> int:
    """Of one layer; 0 where it is dense."""
    if config["model_type"] in _LATENT:
        first, every = _number(config, "first_k_dense_replace", 0, 0), _number(config, "moe_layer_freq", silent=1)
        is_dense = layer < first or layer % every
        return 0 if is_dense else _number(config, "n_routed_experts", least=0, silent=0)
    if config["model_type"] != "qwen3_moe":
        return 0
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise HandoffError(f"config.json has mlp_only_layers = {dense!r}, which is no list of layers", "mend the file")
    if layer in dense or (layer + 1) % _number(config, "decoder_sparse_step", silent=1):
        return 0
    # The second is as transformers 5 calls it.
    return _number(config, "num_experts" if "num_experts" in config else "num_local_experts", least=0)


def _mlp(place: str, width: int, inner: int, has_bias: bool = False) -> Named:
    for part in ("gate", "up", "down"):
        shape = (width, inner) if part == "down" else (inner, width)
        yield f"{place}.{part}_proj.weight", shape
        if has_bias:
            yield f"{place}.{part}_proj.bias", shape[:1]
