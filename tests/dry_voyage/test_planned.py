"""The architecture made small, and weights in which every part of it speaks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from crosschip.dry_voyage.planned import cut_to_fit, export_planned, load_planned, random_model
from crosschip.dry_voyage.sensitivity import sensitivities
from crosschip.errors import QualifyError
from crosschip.model import ModelConfig, Transformer, init_weights, load_model, save_model
from crosschip.rundir import read_json, write_json

DEEPSEEK_V3 = ModelConfig(
    vocab_size=129280,
    hidden_size=7168,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    num_hidden_layers=8,  # of 61: modules of all of them take a while to make, even without weights
    num_nextn_predict_layers=1,
    num_attention_heads=128,
    n_routed_experts=256,
    num_experts_per_tok=8,
    n_group=8,
    topk_group=4,
    routed_scaling_factor=2.5,
    first_k_dense_replace=3,
    kv_lora_rank=512,
    q_lora_rank=1536,
    qk_rope_head_dim=64,
    qk_nope_head_dim=128,
    v_head_dim=128,
    max_position_embeddings=163840,
)
SMALL = ModelConfig(
    vocab_size=512, n_routed_experts=8, n_group=2, topk_group=1, routed_scaling_factor=2.5, max_position_embeddings=256
)


def test_the_cut_keeps_what_engines_refuse_by() -> None:
    small, told = cut_to_fit(DEEPSEEK_V3, 60_000_000)
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in Transformer(small).parameters()) <= 60_000_000
    kept = (
        "kv_lora_rank",
        "q_lora_rank",
        "qk_rope_head_dim",
        "qk_nope_head_dim",
        "v_head_dim",
        "n_group",
        "topk_group",
    )
    kept += ("num_experts_per_tok", "num_nextn_predict_layers", "routed_scaling_factor", "max_position_embeddings")
    assert all(getattr(small, name) == getattr(DEEPSEEK_V3, name) for name in kept)
    assert small.is_moe_layer(small.num_hidden_layers - 1)
    assert "num_hidden_layers 8 -> 2" in told


def test_what_fits_is_not_cut() -> None:
    assert cut_to_fit(SMALL, 60_000_000) == (SMALL, [])


def test_every_part_of_the_random_model_speaks_and_fresh_weights_do_not(tmp_path: Path) -> None:
    ids = torch.randint(4, 256, (64,), generator=torch.Generator().manual_seed(1)).tolist()
    save_model(random_model(SMALL, 0), tmp_path / "random", torch.float32)
    seen = sensitivities(tmp_path / "random", ids)
    assert {"rope_theta", "n_group", "e_score_correction_bias (topk_method)", "routed_scaling_factor"} <= set(seen)
    silent = {part: mean for part, mean in seen.items() if mean <= 1e-3}
    assert set(silent) <= {"rms_norm_eps"}, silent

    fresh = Transformer(SMALL)
    init_weights(fresh, 0)
    save_model(fresh, tmp_path / "fresh", torch.float32)
    quiet = sensitivities(tmp_path / "fresh", ids)
    assert quiet["e_score_correction_bias (topk_method)"] == 0.0  # it is zero to begin with
    assert quiet["rope_theta"] < seen["rope_theta"]


def test_a_recipe_is_exported_as_a_trained_run_is(tmp_path: Path) -> None:
    planned = load_planned("recipes/first.toml")
    assert planned.cuts == []
    directory = export_planned(planned, tmp_path / "run", seed=3)
    model = load_model(directory)
    assert model.config.kv_lora_rank == planned.config.kv_lora_rank
    assert read_json(directory / "config.json")["topk_method"] == "noaux_tc"
    assert (directory / "tokenizer.json").is_file()
    assert read_json(directory / "handoff.json")["dtype"] == planned.recipe.handoff.dtype


def test_a_configuration_alone_is_enough(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", SMALL.to_hf("bfloat16"))
    planned = load_planned(str(tmp_path))
    assert planned.config.n_group == 2
    assert planned.recipe.handoff.dtype == "bfloat16"


def test_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QualifyError, match="neither a recipe nor a model directory"):
        load_planned(str(tmp_path / "nothing.json"))
