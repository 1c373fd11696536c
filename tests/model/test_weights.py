"""Directories in the published layout: FP8 scales, shards, what is refused and how it is said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from crosschip.errors import ModelError, RunDirectoryError
from crosschip.model import ModelConfig, Transformer, load_model, save_model, saving
from crosschip.model import weights as weights_module
from tests.model.configs import random_model

CONFIG = ModelConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_nextn_predict_layers=1, n_routed_experts=4)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    save_model(random_model(CONFIG), tmp_path)
    return tmp_path


def rewrite(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def edit_config(directory: Path, **fields) -> None:
    document = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**document, **fields}))


def test_config_holds_what_other_engines_ask_for(published: Path) -> None:
    document = json.loads((published / "config.json").read_text())
    assert document["topk_method"] == "noaux_tc"
    assert document["scoring_func"] == "sigmoid"
    assert document["tie_word_embeddings"] is False
    assert document["architectures"] == ["DeepseekV3ForCausalLM"]


def test_weights_can_be_read_by_whoever_can_read_the_config(published: Path) -> None:
    modes = {path.stat().st_mode & 0o777 for path in published.iterdir()}
    assert len(modes) == 1


def test_a_shard_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(RunDirectoryError, match=r"/model\.safetensors could not be written: .*\n.*free some space"):
        save_model(random_model(CONFIG), tmp_path)


def test_a_tied_model_writes_its_output_matrix_and_loads_it_untied(tmp_path: Path) -> None:
    tied = random_model(ModelConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, tie_word_embeddings=True))
    save_model(tied, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("lm_head.weight"), file.get_tensor("model.embed_tokens.weight"))
    ids = torch.randint(0, 97, (1, 9))
    assert torch.equal(load_model(tmp_path)(ids), tied(ids))


def test_shards_with_an_index_load_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "_SHARD_BYTES", 20_000)
    model = random_model(CONFIG)
    save_model(model, tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(index) == sum(1 for _ in weights_module.published_views(CONFIG))
    loaded = load_model(tmp_path).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


def test_fp8_blocks_are_multiplied_out(published: Path) -> None:
    block = (16, 8)
    name = "model.layers.1.mlp.experts.2.gate_proj.weight"
    exact = load_file(published / "model.safetensors")[name]
    rows, columns = exact.shape

    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        scale = torch.rand(-(-rows // block[0]), -(-columns // block[1])) + 0.5
        wide = scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
        tensors[name] = (exact / wide).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale

    rewrite(published, quantise)
    edit_config(published, quantization_config={"quant_method": "fp8", "weight_block_size": list(block)})
    model = load_model(published)
    found = model.layers[1].mlp.experts.gate_up_proj[2, : CONFIG.moe_intermediate_size].detach().float()
    # e4m3 keeps 4 significant bits: at most 2^-4 of a value is lost; a dropped scale would cost 25 % or more.
    assert torch.all((found - exact).abs() <= 2**-4 * exact.abs() + 0.02)
    assert (found - exact).norm() / exact.norm() < 2**-4


def test_fp8_without_its_scales_is_refused(published: Path) -> None:
    name = "model.layers.1.mlp.experts.2.gate_proj.weight"
    rewrite(published, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    with pytest.raises(ModelError, match="scale_inv is missing"):
        load_model(published)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.self_attn.o_proj.weight"), "lacks 1 tensors.*o_proj"),
        (lambda t: t.update({"model.layers.1.extra": torch.zeros(2)}), "holds model.layers.1.extra"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(5)}), r"model.norm.weight has shape \(5,\)"),
        (lambda t: t["model.layers.2.embed_tokens.weight"].add_(1), "differs from the tensor it should be a copy of"),
    ],
)
def test_wrong_tensors_are_named(published: Path, change, message: str) -> None:
    rewrite(published, change)
    with pytest.raises(ModelError, match=message):
        load_model(published)


@pytest.mark.parametrize(
    ("field", "value"),
    [("scoring_func", "softmax"), ("topk_method", "greedy"), ("model_type", "llama"), ("hidden_act", "gelu"),
     ("num_key_value_heads", 1), ("rope_scaling", {"type": "linear", "factor": 2.0})],
)  # fmt: skip
def test_a_config_that_means_other_numbers_is_refused(published: Path, field: str, value: object) -> None:
    edit_config(published, **{field: value})
    with pytest.raises(ModelError, match=str(value if not isinstance(value, dict) else "linear")):
        load_model(published)


def test_a_cut_file_and_an_empty_directory_are_named(published: Path, tmp_path: Path) -> None:
    file = published / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        load_model(published)
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(tmp_path / "nothing")


def test_the_dtype_is_the_checkpoints_unless_told(tmp_path: Path) -> None:
    save_model(random_model(CONFIG), tmp_path, torch.bfloat16)
    model = load_model(tmp_path)
    assert model.embed_tokens.weight.dtype == torch.bfloat16
    assert model.routers()[0].e_score_correction_bias.dtype == torch.float32
    assert load_model(tmp_path, torch.float32).embed_tokens.weight.dtype == torch.float32


PUBLISHED = {
    # config.json of the published models, the fields that size them
    "DeepSeek-V3": (
        {"vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
         "num_hidden_layers": 61, "num_nextn_predict_layers": 1, "num_attention_heads": 128,
         "num_key_value_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256, "num_experts_per_tok": 8,
         "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "first_k_dense_replace": 3,
         "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128,
         "v_head_dim": 128, "max_position_embeddings": 163840, "rms_norm_eps": 1e-06, "rope_theta": 10000,
         "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                          "original_max_position_embeddings": 4096, "type": "yarn"},
         "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "hidden_act": "silu",
         "model_type": "deepseek_v3", "moe_layer_freq": 1, "ep_size": 1, "attention_bias": False,
         "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}},
        671.0e9,
    ),
    "Moonlight-16B-A3B": (
        {"vocab_size": 163840, "hidden_size": 2048, "intermediate_size": 11264, "moe_intermediate_size": 1408,
         "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "n_shared_experts": 2,
         "n_routed_experts": 64, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1,
         "routed_scaling_factor": 2.446, "first_k_dense_replace": 1, "kv_lora_rank": 512, "q_lora_rank": None,
         "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "max_position_embeddings": 8192,
         "rms_norm_eps": 1e-05, "rope_theta": 50000.0, "rope_scaling": None, "topk_method": "noaux_tc",
         "scoring_func": "sigmoid", "norm_topk_prob": True, "model_type": "deepseek_v3", "num_nextn_predict_layers": 0},
        15.96e9,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_have_the_published_number_of_parameters(name: str) -> None:
    document, published = PUBLISHED[name]
    config = ModelConfig.from_hf(document)
    with torch.device("meta"):
        model = Transformer(config)
    main = sum(p.numel() for part, p in model.named_parameters() if not part.startswith("mtp."))
    assert main == pytest.approx(published, rel=1e-3)
    state = model.state_dict()
    covered: dict[str, int] = {}
    for view in weights_module.published_views(config):
        if not view.shared:
            covered[view.ours] = covered.get(view.ours, 0) + state[view.ours][view.index].numel()
    assert covered == {key: tensor.numel() for key, tensor in state.items()}


def test_loading_keeps_one_copy_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "_SHARD_BYTES", 16 << 20)
    config = ModelConfig(
        vocab_size=8192, hidden_size=512, num_hidden_layers=6, moe_intermediate_size=512, n_routed_experts=16
    )
    model = Transformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    save_model(model, tmp_path)
    num_bytes = sum(p.numel() * 4 for p in model.parameters())
    script = (
        "import sys, pathlib\n"
        "from crosschip.model import load_model\n"
        "status = pathlib.Path('/proc/self/status')\n"  # ru_maxrss of a child begins at its parent's peak
        "peak = lambda: 1024 * int(status.read_text().partition('VmHWM:')[2].split()[0])\n"
        "load_model(pathlib.Path(sys.argv[2]))\n"  # imports what loading needs, which is tens of megabytes
        "before = peak(); model = load_model(pathlib.Path(sys.argv[1])); print(peak() - before)\n"
    )
    small = ModelConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    save_model(Transformer(small), tmp_path / "small")
    command = [sys.executable, "-c", script, str(tmp_path), str(tmp_path / "small")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert num_bytes > 300e6
    assert 0.9 * num_bytes < int(done.stdout) < 1.3 * num_bytes  # the model, and the shard in hand
