"""The key-value part of a GGUF file as a plain dictionary, and the refusal of what it has no key for.

Keys are those of the gguf package's `Keys`, with the architecture's name filled in. Integers are uint32, fractions
float32, as llama.cpp reads them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from typing import Any

from crosschip.errors import HandoffError

__all__ = ["Metadata", "Value", "as_float32", "fraction", "refuse", "shortest", "unknown_fields", "whole"]

Value = bool | int | float | str | list[str] | list[int]
Metadata = dict[str, Value]

# Fields of a config.json that say nothing about the numbers of a forward pass, or are written from elsewhere.
_WITHOUT_EFFECT = frozenset(
    {
        *("architectures", "auto_map", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "vocab_size", "max_position_embeddings"),
        *("initializer_range", "use_cache", "attention_dropout", "pretraining_tp", "tie_word_embeddings"),
        *("_attn_implementation", "is_llama_config", "output_attentions", "output_hidden_states", "return_dict"),
        *("ep_size", "aux_loss_alpha", "seq_aux", "quantization_config", "num_nextn_predict_layers"),
        *("router_aux_loss_coef", "output_router_logits", "keys_to_ignore_at_inference", "id2label", "label2id"),
        *("chunk_size_feed_forward", "is_encoder_decoder", "problem_type"),
    }
)


def as_float32(value: float) -> float:
    """The number as it comes back from a file that keeps it in 32 bits."""
    return float(struct.unpack("<f", struct.pack("<f", float(value)))[0])


def shortest(value: Value) -> float:
    """A fraction that a file keeps in 32 bits as the shortest decimal number that means the same there: 1e-06."""
    assert isinstance(value, float | int)
    digits = range(1, 10)
    return next(near for each in digits if as_float32(near := float(f"{value:.{each}g}")) == as_float32(value))


def fraction(own: Metadata, key: str) -> float:
    """The value of a file's key as `shortest` gives it.

    Raises:
        HandoffError: it is no finite number.
        KeyError: there is no such key.
    """
    value = own[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise HandoffError(f"the file's key {key} is {value!r}, which is no number", "convert the model again")
    return shortest(value)


def whole(own: Metadata, key: str) -> int:
    """The value of a file's key that is a whole number.

    Raises:
        HandoffError: it is none.
        KeyError: there is no such key.
    """
    value = own[key]
    if isinstance(value, bool) or not isinstance(value, int):
        raise HandoffError(f"the file's key {key} is {value!r}, which is no whole number", "convert the model again")
    return value


def unknown_fields(config: Mapping[str, Any], known: Iterable[str]) -> list[str]:
    """Fields that are set and that neither the architecture's declaration nor the harmless ones know, in words."""
    names = sorted(set(config) - set(known) - _WITHOUT_EFFECT)
    return [f"{name} = {config[name]!r} is not known here" for name in names if config[name] not in (None, False, {})]


def refuse(architecture: str, reasons: list[str]) -> None:
    """Raise when there is a reason.

    Raises:
        HandoffError: all fields that the file could not express, by name.
    """
    if reasons:
        raise HandoffError(
            f"llama.cpp's {architecture} architecture does not express this config.json: {'; '.join(reasons)}",
            "hand it off to another target (hf), or train with other values of these fields",
        )
