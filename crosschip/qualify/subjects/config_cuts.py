"""Cutting a `config.json` of transformers: fewer layers and experts, a smaller vocabulary, narrower parts.

Works on the field names that most architectures share; a field that a configuration does not have is left alone.
`names` tells what an architecture calls such a field, as `n_layer` for `num_hidden_layers` (transformers'
`attribute_map`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["SPECIAL_TOKENS", "cut_document", "cuts_to_fit", "differences", "small_cuts"]

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_LAYER_FIELDS = ("encoder_layers", "decoder_layers", "num_decoder_layers")  # beside num_hidden_layers
_EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts")
_SMALL_WIDTHS = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "moe_intermediate_size": 96,
    "shared_expert_intermediate_size": 96,
    "vocab_size": 512,
}


def cuts_to_fit(document: dict[str, Any], names: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """What may be cut so that a model fits into memory, each on top of those before, the most harmless first.

    Hidden and head sizes stay, as what an inner product runs over decides how large its error may get.
    """
    for cut in _cuts_to_fit(_in_common_names(document, names)):
        yield _in_own_names(cut, names)


def _cuts_to_fit(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield {}
    yield _layers(document, 2)
    yield _experts(document, 8)
    yield {"vocab_size": min(4096, document.get("vocab_size", 0))}
    inner, hidden = document.get("intermediate_size"), document.get("hidden_size")
    while isinstance(inner, int) and isinstance(hidden, int) and inner > hidden:
        inner //= 2
        yield {"intermediate_size": inner}
    yield _layers(document, 1)


def small_cuts(document: dict[str, Any], names: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """What makes a model small enough for a rehearsal: narrow, else (where the parts then do not match) only short."""
    document = _in_common_names(document, names)
    fewer = {**_layers(document, 2), **_experts(document, 4)}
    narrow = {name: min(most, document[name]) for name, most in _SMALL_WIDTHS.items() if name in document}
    yield _in_own_names({**fewer, **narrow, **_heads(document)}, names)
    yield _in_own_names(fewer, names)


def _in_common_names(document: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return document | {common: document[own] for common, own in names.items() if own in document}


def _in_own_names(cut: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The cut under both names; those that the document does not have are passed over later."""
    return cut | {names[common]: value for common, value in cut.items() if common in names}


def cut_document(document: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    """The document with these fields changed; special tokens are forgotten where they lie beyond the vocabulary."""
    known = {name: value for name, value in changed.items() if name in document}
    if "vocab_size" in known:
        known |= {name: _within(document[name], known["vocab_size"]) for name in SPECIAL_TOKENS if name in document}
    return {**document, **known}


def _within(token: Any, vocab_size: int) -> Any:
    """A special token, or a list of them, as far as the vocabulary has it."""
    if isinstance(token, list):
        return [each for each in token if each < vocab_size] or None
    return token if isinstance(token, int) and token < vocab_size else None


def differences(document: dict[str, Any], changed: dict[str, Any]) -> list[str]:
    """What was cut, in words."""
    told = [
        f"{name} {document[name]} -> {value}"
        for name, value in changed.items()
        if name in document and document[name] != value and not isinstance(value, list)
    ]
    return [f"cut to fit: {', '.join(told)}"] if told else []


def _layers(document: dict[str, Any], most: int) -> dict[str, Any]:
    """Fewer layers, and lists that have one entry a layer cut alike."""
    num = document.get("num_hidden_layers")
    if not isinstance(num, int) or num <= most:
        return {}
    cut: dict[str, Any] = {
        name: value[:most] for name, value in document.items() if isinstance(value, list) and len(value) == num
    }
    cut |= {name: most for name in _LAYER_FIELDS if isinstance(document.get(name), int) and document[name] > most}
    first_dense = document.get("first_k_dense_replace")
    if isinstance(first_dense, int) and 0 < first_dense < num:
        cut["first_k_dense_replace"] = 1
    return {**cut, "num_hidden_layers": most}


def _experts(document: dict[str, Any], most: int) -> dict[str, Any]:
    cut: dict[str, Any] = {
        name: most for name in _EXPERT_FIELDS if isinstance(document.get(name), int) and document[name] > most
    }
    if cut and isinstance(document.get("num_experts_per_tok"), int):
        cut["num_experts_per_tok"] = min(document["num_experts_per_tok"], most // 2)
    if cut and "n_group" in document:
        cut |= {"n_group": 1, "topk_group": 1}
    return cut


def _heads(document: dict[str, Any]) -> dict[str, Any]:
    """Four query heads, with as many key heads as the original's ratio gives, of 32 where their size is given."""
    heads = document.get("num_attention_heads")
    if not isinstance(heads, int) or document.get("hidden_size", 0) <= _SMALL_WIDTHS["hidden_size"]:
        return {}
    cut: dict[str, Any] = {"num_attention_heads": 4}
    if isinstance(document.get("num_key_value_heads"), int):
        cut["num_key_value_heads"] = max(1, min(4, 4 * document["num_key_value_heads"] // heads))
    if document.get("head_dim") is not None:
        cut["head_dim"] = 32
    return cut
