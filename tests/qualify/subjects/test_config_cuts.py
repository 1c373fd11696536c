"""Cutting configurations: fields under the names of each architecture, and special tokens that stay where they can."""

from __future__ import annotations

from typing import Any

from crosschip.qualify.subjects.config_cuts import cut_document, cuts_to_fit, differences, small_cuts

GPT2_NAMES = {"hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}
GPT2 = {"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257}
T5_NAMES = {
    "hidden_size": "d_model",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "head_dim": "d_kv",
}
T5 = {"model_type": "t5", "num_layers": 6, "num_decoder_layers": 6, "d_model": 512, "d_kv": 64, "num_heads": 8}
LLAMA = {"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 64, "vocab_size": 512}


def cut_small(document: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    narrow, _ = small_cuts(document, names)
    return cut_document(document, narrow)


def test_fields_are_cut_under_the_names_of_the_architecture() -> None:
    expected = {"model_type": "gpt2", "n_layer": 2, "n_embd": 128, "n_head": 4, "vocab_size": 512}
    assert cut_small(GPT2, GPT2_NAMES) == expected
    t5 = cut_small(T5, T5_NAMES)
    assert (t5["num_layers"], t5["num_decoder_layers"], t5["d_model"], t5["d_kv"], t5["num_heads"]) == (
        2,
        2,
        128,
        32,
        4,
    )
    assert cut_small(LLAMA, {}) == {**LLAMA, "num_hidden_layers": 2}
    # A config.json may have the common name although the architecture has one of its own.
    assert cut_small({"num_hidden_layers": 12}, GPT2_NAMES) == {"num_hidden_layers": 2}


def test_a_cut_to_fit_is_told_in_the_names_of_the_architecture() -> None:
    _, layers, *_ = cuts_to_fit(GPT2, GPT2_NAMES)
    assert differences(GPT2, layers) == ["cut to fit: n_layer 12 -> 2"]


def test_special_tokens_are_forgotten_only_beyond_the_vocabulary() -> None:
    document = {"vocab_size": 50265, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": [2, 50000]}
    cut = cut_document(document | {"decoder_start_token_id": 50001}, {"vocab_size": 512})
    assert (cut["bos_token_id"], cut["pad_token_id"], cut["eos_token_id"]) == (0, 1, [2])
    assert cut["decoder_start_token_id"] is None
    assert cut_document({"vocab_size": 600, "eos_token_id": [599]}, {"vocab_size": 512})["eos_token_id"] is None
    assert "pad_token_id" not in cut_document({"vocab_size": 600}, {"vocab_size": 512})
