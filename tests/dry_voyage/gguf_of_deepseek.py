"""A Hugging Face directory of the DeepSeek-V3 architecture as GGUF: `python gguf_of_deepseek.py MODEL --outfile FILE`.

For the test with a real llama.cpp, in whose place `convert_hf_to_gguf.py` stands for users: that one is in llama.cpp's
repository and in no package. It runs in an environment with gguf and numpy, without torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    **{f"mlp.{part}_proj.weight": f"ffn_{part}.weight" for part in ("gate", "up", "down")},
    **{f"mlp.shared_experts.{part}_proj.weight": f"ffn_{part}_shexp.weight" for part in ("gate", "up", "down")},
}
TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def tensors_of(directory: Path) -> dict[str, np.ndarray[Any, Any]]:
    """All tensors as fp32."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        data = file.read_bytes()
        size = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + size]).items():
            if name == "__metadata__":
                continue
            start, end = (8 + size + place for place in entry["data_offsets"])
            if entry["dtype"] == "BF16":
                values = (np.frombuffer(data[start:end], np.uint16).astype(np.uint32) << 16).view(np.float32)
            else:
                values = np.frombuffer(data[start:end], np.float32)
            found[name] = values.reshape(entry["shape"])
    return found


def write_numbers(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(float(config.get("rope_theta") or config["rope_parameters"]["rope_theta"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_vocab_size(config["vocab_size"])
    if config.get("q_lora_rank"):
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(config["kv_lora_rank"])
    writer.add_key_length(config["kv_lora_rank"] + config["qk_rope_head_dim"])
    writer.add_value_length(config["kv_lora_rank"])
    writer.add_key_length_mla(config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_rope_dimension_count(config["qk_rope_head_dim"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(float(config["routed_scaling_factor"]))
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_group_count(config["n_group"])
    writer.add_expert_group_used_count(config["topk_group"])


def write_tokenizer(writer: gguf.GGUFWriter, directory: Path, config: dict[str, Any]) -> None:
    document = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    special = {entry["id"]: entry["content"] for entry in document["added_tokens"]}
    by_id = {number: token for token, number in document["model"]["vocab"].items()} | special
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(config["vocab_size"])]
    kinds = [
        gguf.TokenType.CONTROL
        if number in special
        else gguf.TokenType.NORMAL
        if number in by_id
        else gguf.TokenType.UNUSED
        for number in range(config["vocab_size"])
    ]
    merges = [each if isinstance(each, str) else " ".join(each) for each in document["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    ends = config["eos_token_id"]
    writer.add_eos_token_id(ends[0] if isinstance(ends, list) else ends)
    if config.get("bos_token_id") is not None:
        writer.add_bos_token_id(config["bos_token_id"])
    writer.add_add_bos_token(False)


def write_tensors(writer: gguf.GGUFWriter, tensors: dict[str, np.ndarray[Any, Any]], config: dict[str, Any]) -> None:
    for name, renamed in TOP.items():
        writer.add_tensor(renamed, tensors[name])
    writer.add_tensor("output.weight", tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"]))
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, renamed in NAMES.items():
            if prefix + name in tensors:
                writer.add_tensor(f"blk.{layer}.{renamed}", tensors[prefix + name])
        heads = config["num_attention_heads"]
        kv_b = tensors[f"{prefix}self_attn.kv_b_proj.weight"].reshape(heads, -1, config["kv_lora_rank"])
        k_b, v_b = np.split(kv_b, [config["qk_nope_head_dim"]], axis=1)
        writer.add_tensor(f"blk.{layer}.attn_k_b.weight", np.ascontiguousarray(k_b.transpose(0, 2, 1)))
        writer.add_tensor(f"blk.{layer}.attn_v_b.weight", np.ascontiguousarray(v_b))
        if layer >= config["first_k_dense_replace"]:
            for part in ("gate", "up", "down"):
                experts = [
                    tensors[f"{prefix}mlp.experts.{expert}.{part}_proj.weight"]
                    for expert in range(config["n_routed_experts"])
                ]
                writer.add_tensor(f"blk.{layer}.ffn_{part}_exps.weight", np.stack(experts))


def main(directory: Path, out: Path) -> None:
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(str(out), "deepseek2")
    writer.add_name(directory.name)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    write_numbers(writer, config)
    write_tokenizer(writer, directory, config)
    write_tensors(writer, tensors_of(directory), config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[sys.argv.index("--outfile") + 1]))
