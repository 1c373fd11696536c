"""Llama and Qwen3 (dense) as llama.cpp's `llama` and `qwen3`.

llama.cpp rotates pairs of neighbours for `llama` and halves for `qwen3`; published weights of both are in halves, so
the rows of `llama`'s queries and keys are interleaved head by head.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from crosschip.errors import HandoffError
from crosschip.handoff.conversion.operators import Interleave, Operator, Rename, Tensors
from crosschip.handoff.gguf.metadata import Metadata, as_float32, fraction, unknown_fields, whole
from crosschip.handoff.gguf.rotary import Rope, rope_of

__all__ = ["FACTORS", "MODEL_TYPES", "fields_of", "left_out", "metadata_of", "operators_of", "reasons_against"]

MODEL_TYPES = ("llama", "qwen3")  # llama.cpp's names of the architectures are the same
FACTORS = "rope_freqs.weight"  # what the frequencies of Llama 3's scaling are divided by
_ROPE_SCALING = "general.crosschip_rope_scaling"  # a key of ours
# llama.cpp's converter computes the factors in fp32: a frequency is off by ln(theta) units in the last place, and a
# factor of the ramp by `factor` times that, which is below 1e-5. Another scaling is off by more than a thousandth.
_OF_FACTORS = 1e-4
_CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}

_ONE_TO_ONE = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "vocab_size": "vocab_size",
}
_KNOWN = {
    *_ONE_TO_ONE,
    *("rms_norm_eps", "head_dim", "rope_theta", "rope_scaling", "rope_parameters", "hidden_act", "attention_bias"),
    *("mlp_bias", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
}
_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    **{f"mlp.{part}_proj.weight": f"ffn_{part}.weight" for part in ("gate", "up", "down")},
}
_QK_NORMS = {"self_attn.q_norm.weight": "attn_q_norm.weight", "self_attn.k_norm.weight": "attn_k_norm.weight"}


@dataclass(frozen=True)
class RopeFactors:
    """`rope_freqs.weight`, which has no like among the published tensors: it is computed from config.json."""

    target: str
    rope: Rope
    width: int

    @property
    def inputs(self) -> tuple[str, ...]:
        """None."""
        return ()

    @property
    def outputs(self) -> tuple[str, ...]:
        """The factors' name."""
        return (self.target,)

    def forward(self, tensors: Tensors) -> Tensors:
        """The factors, [width / 2]."""
        return {self.target: self.rope.factors(self.width)}

    def backward(self, tensors: Tensors) -> Tensors:
        """Nothing.

        Raises:
            HandoffError: the file's factors are not those of the configuration.
        """
        found, expected = tensors[self.target], self.rope.factors(self.width)
        if found.is_meta:
            return {}
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=_OF_FACTORS, atol=0.0):
            raise HandoffError(f"{self.target} is not what rope_scaling means", "convert the model again")
        return {}


def reasons_against(config: dict[str, Any]) -> list[str]:
    """Every field whose value would be computed otherwise, in words."""
    found = []
    if config.get("hidden_act", "silu") != "silu":
        found.append(f"hidden_act = {config['hidden_act']!r}; only 'silu' is computed")
    found += [
        f"{field} = True; biases are not written here" for field in ("attention_bias", "mlp_bias") if config.get(field)
    ]
    if config.get("use_sliding_window"):
        found.append("use_sliding_window = True; all layers attend to all positions")
    kinds = set(config.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        found.append(f"layer_types holds {sorted(kinds)}; all layers attend to all positions")
    if config["hidden_size"] % config["num_attention_heads"] and not config.get("head_dim"):
        found.append(f"head_dim is missing and hidden_size = {config['hidden_size']} is no multiple of the heads")
    rope = rope_of(config)
    if rope.kind == "yarn":
        found.append("rope_scaling.type = 'yarn'; it was not tried with this architecture")
    return [*found, *rope.reasons_against(), *unknown_fields(config, _KNOWN)]


def metadata_of(config: dict[str, Any]) -> Metadata:
    """The architecture's keys; what has none was refused before."""
    kv_heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    given = {**config, "num_key_value_heads": kv_heads}
    found: Metadata = {key: int(given[field]) for field, key in _ONE_TO_ONE.items()}
    width = _head_dim(config)
    found |= {
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": as_float32(config.get("rms_norm_eps", 1e-6)),
        "rope.dimension_count": width,
        **rope_of(config).metadata(),
    }
    own: Metadata = {f"{config['model_type']}.{key}": value for key, value in found.items()}
    rope = rope_of(config)
    if rope.kind == "llama3":  # the factors alone do not tell it; llama.cpp passes over a key that it does not know
        own[_ROPE_SCALING] = json.dumps({"rope_type": rope.kind, **rope.scaling}, sort_keys=True)
    return own


def _head_dim(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def fields_of(metadata: Metadata) -> dict[str, Any]:
    """The fields of config.json that a file's keys mean: `metadata_of` read backwards."""
    kind = str(metadata["general.architecture"])
    own = {key.removeprefix(f"{kind}."): value for key, value in metadata.items()}
    given = {"rope_scaling": _scaling_of(str(own[_ROPE_SCALING]))} if _ROPE_SCALING in own else {}
    found = {field: whole(own, key) for field, key in _ONE_TO_ONE.items()}
    width = "attention.key_length"  # which llama.cpp's own converter leaves out where the heads divide the model
    return {
        **given,
        "model_type": kind,
        "architectures": [_CLASSES[kind]],
        **found,
        "head_dim": whole(own, width) if width in own else found["hidden_size"] // found["num_attention_heads"],
        "rms_norm_eps": fraction(own, "attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "attention_bias": False,
    }


def _scaling_of(text: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(text)
        rope_of({"rope_scaling": found}).factors(2)
    except (KeyError, TypeError, ValueError, RecursionError):
        problem = f"the file's key {_ROPE_SCALING} is {text[:200]!r}, which is no scaling of Llama 3"
        raise HandoffError(problem, "convert the model again") from None
    return found


def left_out(config: dict[str, Any], names: Collection[str]) -> tuple[list[str], list[str]]:
    """Tensors of the source that the file does not take, and that in words."""
    tied = ["lm_head.weight"] if config.get("tie_word_embeddings") and "lm_head.weight" in names else []
    return [*tied, *(name for name in names if name.endswith("rotary_emb.inv_freq"))], []


def operators_of(config: dict[str, Any], names: Collection[str]) -> tuple[Operator, ...]:
    """All operators from the published layout to llama.cpp's. `names` tells whether an output matrix is there."""
    found: list[Operator] = [Rename("model.embed_tokens.weight", "token_embd.weight")]
    is_llama = config["model_type"] == "llama"
    heads = {"q": int(config["num_attention_heads"])}
    heads["k"] = int(config.get("num_key_value_heads") or heads["q"])
    renamed = _LAYER if is_llama else {**_LAYER, **_QK_NORMS}
    for layer in range(int(config["num_hidden_layers"])):
        theirs, ours = f"model.layers.{layer}.", f"blk.{layer}."
        found += [Rename(theirs + source, ours + target) for source, target in renamed.items()]
        for part, blocks in heads.items():
            source, target = f"{theirs}self_attn.{part}_proj.weight", f"{ours}attn_{part}.weight"
            found.append(Interleave(source, target, blocks=blocks) if is_llama else Rename(source, target))
    rope = rope_of(config)
    if rope.kind == "llama3":
        found.append(RopeFactors(FACTORS, rope, _head_dim(config)))
    found.append(Rename("model.norm.weight", "output_norm.weight"))
    if "lm_head.weight" in names and not config.get("tie_word_embeddings"):
        found.append(Rename("lm_head.weight", "output.weight"))
    return tuple(found)
