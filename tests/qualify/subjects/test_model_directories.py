"""Model directories of other architectures as subjects: a configuration alone, weights random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from crosschip.errors import QualifyError
from crosschip.qualify.subjects import transformers_subject
from crosschip.qualify.subjects.causal_lm import CausalLMWorkload
from crosschip.qualify.subjects.made_tokens import random_tokens
from crosschip.qualify.subjects.subject import load_subject
from crosschip.qualify.subjects.transformers_subject import TransformersSubject
from crosschip.qualify.tracing.record import record_trace

CPU = torch.device("cpu")


def write_config(directory: Path, **fields: Any) -> str:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(fields))
    return str(directory)


LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "attention_dropout": 0.1,
    "torch_dtype": "bfloat16",
}
QWEN2_MOE = {
    **LLAMA,
    "model_type": "qwen2_moe",
    "architectures": ["Qwen2MoeForCausalLM"],
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 96,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 512,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 256,
    "dtype": "bfloat16",
}
MAMBA = {
    "model_type": "mamba",
    "architectures": ["MambaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 32,
    "state_size": 8,
    "num_hidden_layers": 2,
}
OPENAI_GPT = {
    "model_type": "openai-gpt",
    "architectures": ["OpenAIGPTLMHeadModel"],
    "vocab_size": 512,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
}
ROBERTA = {
    "model_type": "roberta",
    "architectures": ["RobertaForMaskedLM"],
    "vocab_size": 600,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
    "type_vocab_size": 1,
}
VIT = {
    "model_type": "vit",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "hidden_dropout_prob": 0.1,
}


@pytest.mark.parametrize("document", [LLAMA, QWEN2_MOE, GPT2], ids=["llama", "qwen2-moe", "gpt2"])
@pytest.mark.parametrize("role", ["train", "serve"])
def test_causal_language_models_of_transformers_are_traced(tmp_path: Path, document: dict[str, Any], role: Any) -> None:
    subject = load_subject(write_config(tmp_path / "model", **document))
    assert (subject.dtype_setting("train"), subject.dtype_setting("serve")) == ("auto", "bfloat16")
    trace = record_trace(subject, role, torch.float32)
    operators = {call.operator for call in trace.calls}
    assert {"aten.addmm.default", "aten.mm.default"} & operators
    assert "aten.scaled_dot_product_attention.default" in operators
    assert not [name for name in operators if "cpu" in name or "dropout" in name]
    assert {phase for call in trace.calls for phase in call.phases} == (
        {"forward", "backward", "optimizer"} if role == "train" else {"prefill", "decode", "sampling"}
    )


def test_a_small_llama_learns_and_serves_rows(tmp_path: Path) -> None:
    subject = load_subject(write_config(tmp_path / "model", **LLAMA))
    workload = subject.workload(CPU, torch.float32, small=True)
    assert len(workload.module.model.layers) == 2
    losses = [workload.train_step(index).loss for index in range(60)]
    assert losses[-1] < losses[0] - 1.0
    assert workload.serve_rows([0, 1, 2]).shape == (3, 512)
    assert workload.serve_step().shape == (8 * 5, 512)


def test_a_small_gpt2_learns_next_tokens(tmp_path: Path) -> None:
    workload = load_subject(write_config(tmp_path / "model", **GPT2)).workload(CPU, torch.float32, small=True)
    losses = [workload.train_step(index).loss for index in range(60)]
    assert losses[-1] < losses[0] - 1.0
    assert workload.serve_rows([0, 1, 2]).shape == (3, 512)


def test_a_wide_llama_is_made_narrow_for_the_rehearsal(tmp_path: Path) -> None:
    wide = {**LLAMA, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8, "pad_token_id": 511}
    workload = load_subject(write_config(tmp_path / "model", **wide)).workload(CPU, torch.float32, small=True)
    config = workload.module.config
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (128, 4, 1)
    assert "hidden_size 2048 -> 128" in workload.notes[0]


def test_weights_that_are_not_read_are_told(tmp_path: Path) -> None:
    directory = write_config(tmp_path / "model", **LLAMA)
    assert "random" not in " ".join(load_subject(directory).workload(CPU, torch.float32, small=True).notes)
    (Path(directory) / "model.safetensors").write_bytes(b"never opened")
    assert "weights are random" in " ".join(load_subject(directory).workload(CPU, torch.float32, small=True).notes)


def test_a_model_of_pictures_is_run_on_made_ones(tmp_path: Path) -> None:
    subject = load_subject(write_config(tmp_path / "model", **VIT))
    workload = subject.workload(CPU, torch.float32)
    assert workload.train_step(0) == subject.workload(CPU, torch.float32).train_step(0)  # without dropout
    assert workload.serve_rows([0, 1]).shape[0] == 2
    assert "aten.convolution.default" in {call.operator for call in record_trace(subject, "serve", torch.float32).calls}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "of_my_own", "auto_map": {"AutoModel": "mine.Model"}}, "is never run"),
        ({"model_type": "llama", "hidden_size": "wide"}, "hidden_size"),
        ({"model_type": "whisper"}, "make inputs|build"),
    ],
)
def test_models_that_cannot_be_examined_are_refused_with_a_remedy(
    tmp_path: Path, fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(QualifyError, match=said):
        load_subject(write_config(tmp_path / "model", **fields)).workload(CPU, torch.float32, small=True)


@pytest.mark.parametrize("document", [LLAMA, GPT2, MAMBA, OPENAI_GPT], ids=lambda document: document["model_type"])
def test_decoding_goes_on_from_what_was_computed_before(tmp_path: Path, document: dict[str, Any]) -> None:
    """Under whatever name the architecture keeps it; one that keeps nothing computes all tokens again."""
    workload = load_subject(write_config(tmp_path / "model", **document)).workload(CPU, torch.float32, small=True)
    assert isinstance(workload, CausalLMWorkload)
    lengths: list[int] = []
    handle = workload.module.register_forward_pre_hook(
        lambda _module, _args, given: lengths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    found = workload.serve_step()
    handle.remove()
    tokens = random_tokens(512, 8, 24 + 4, 0)
    with torch.inference_mode():
        whole = workload.module(input_ids=tokens, use_cache=False).logits
    expected = torch.cat([whole[:, place] for place in range(23, 28)])
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    keeps_nothing = document is OPENAI_GPT
    assert lengths == ([24, 25, 26, 27, 28] if keeps_nothing else [24, 1, 1, 1, 1])
    assert any("gives no cache" in note for note in workload.notes) == keeps_nothing


def test_special_tokens_within_the_cut_vocabulary_are_kept(tmp_path: Path) -> None:
    workload = load_subject(write_config(tmp_path / "model", **ROBERTA)).workload(CPU, torch.float32, small=True)
    config = workload.module.config
    assert (config.vocab_size, config.num_hidden_layers, config.pad_token_id) == (512, 2, 1)
    assert workload.train_step(0).loss > 0.0


def test_a_cut_with_which_the_model_does_not_run_is_passed_over(tmp_path: Path) -> None:
    """Without the padding token, which a smaller vocabulary does not have, this architecture knows no positions."""
    document = {**ROBERTA, "pad_token_id": 555, "max_position_embeddings": 700}
    workload = load_subject(write_config(tmp_path / "model", **document)).workload(CPU, torch.float32, small=True)
    config = workload.module.config
    assert (config.vocab_size, config.num_hidden_layers, config.pad_token_id) == (600, 2, 555)
    assert workload.train_step(0).loss > 0.0


def test_a_small_model_is_no_longer_than_its_positions(tmp_path: Path) -> None:
    document = {**GPT2, "n_positions": 16}
    workload = load_subject(write_config(tmp_path / "model", **document)).workload(CPU, torch.float32, small=True)
    assert workload.train_step(0).loss > 0.0
    assert workload.serve_step().shape == (8 * 5, 512)


def test_fields_of_other_names_are_cut_for_the_rehearsal_and_to_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = {**GPT2, "n_layer": 12, "n_embd": 192, "n_head": 12, "vocab_size": 600}
    subject = load_subject(write_config(tmp_path / "model", **document))
    assert isinstance(subject, TransformersSubject)
    workload = subject.workload(CPU, torch.float32, small=True)
    config = workload.module.config
    assert (config.n_layer, config.n_embd, config.n_head, config.vocab_size) == (2, 128, 4, 512)
    assert "n_layer 12 -> 2" in workload.notes[0]
    monkeypatch.setattr(transformers_subject, "most_bytes_to_train", lambda: 32 << 20)
    fitted, notes = subject._fitted_config()
    assert (fitted.n_layer, fitted.n_embd) == (2, 192)
    assert notes == ["cut to fit: n_layer 12 -> 2"]
