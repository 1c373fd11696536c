"""Recipes and DeepSeek-V3 directories as subjects, and what their steps give on different devices."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from crosschip.chips import find_chip
from crosschip.chips.simulated import activate, plant
from crosschip.errors import QualifyError
from crosschip.model import ModelConfig, Transformer
from crosschip.qualify.subjects import recipe_subject
from crosschip.qualify.subjects.fitting import BYTES_PER_PARAMETER, fitted_config, small_config
from crosschip.qualify.subjects.made_tokens import ruled_tokens
from crosschip.qualify.subjects.recipe_subject import TransformerSubject
from crosschip.qualify.subjects.subject import load_subject, working_dtype
from crosschip.recipe import load_recipe
from crosschip.rundir import write_json
from crosschip.train.preparation import VOCAB_MULTIPLE
from tests.qualify.conftest import FIRST

CPU = torch.device("cpu")
SUBJECT = "crosschip.qualify.subjects.subject"


def write_config(directory: Path, **fields: Any) -> str:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(fields))
    return str(directory)


DEEPSEEK = {
    "model_type": "deepseek_v3",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "max_position_embeddings": 128,
}


# Our own recipes and DeepSeek-V3


def test_the_small_recipe_learns_within_a_hundred_steps_alike_on_both_devices() -> None:
    activate("sim")
    plant([])
    subject = load_subject(FIRST)
    losses = {}
    for device in (CPU, torch.device("sim:0")):
        workload = subject.workload(device, torch.float32, seed=0, small=True)
        losses[device.type] = [workload.train_step(index).loss for index in range(100)]
    assert losses["cpu"][0] == pytest.approx(math.log(512), rel=0.01)
    assert sum(losses["cpu"][-10:]) / 10 < 1.0  # one who knows the rule has 0.73 nats, a guess among 64 costs 4.16
    for ours, theirs in zip(losses["cpu"], losses["sim"], strict=True):
        assert theirs == pytest.approx(ours, rel=1e-3)


def test_the_small_recipe_is_quick() -> None:
    workload = load_subject(FIRST).workload(CPU, torch.float32, small=True)
    workload.train_step(0)
    started = time.process_time()
    for index in range(1, 11):
        workload.train_step(index)
    # 33 ms of one core were measured on a machine of 2024; a hundred steps must stay far below a minute.
    assert (time.process_time() - started) / 10 < 0.3


def test_the_small_recipe_has_each_kind_of_layer() -> None:
    module = load_subject(FIRST).workload(CPU, torch.float32, small=True).module
    kinds = {type(each).__name__ for each in module.modules()}
    assert {"MixtureOfExperts", "GatedMLP", "MultiTokenPrediction", "LatentAttention"} <= kinds
    assert len(module.layers) == 2


def test_weights_and_inputs_depend_on_the_seed_alone() -> None:
    subject = load_subject(FIRST)
    first, again, other = (subject.workload(CPU, torch.float32, seed=seed, small=True) for seed in (3, 3, 4))
    measures = [workload.train_step(0) for workload in (first, again, other)]
    assert measures[0] == measures[1] != measures[2]


def test_the_full_recipe_has_the_recipe_s_batch_and_vocabulary() -> None:
    subject = load_subject(FIRST)
    assert isinstance(subject, TransformerSubject)
    plan = subject._plan()
    assert (plan.stage.batch_size, plan.stage.seq_len, plan.config.vocab_size, plan.notes) == (32, 128, 512, [])
    assert (subject.dtype_setting("train"), subject.dtype_setting("serve")) == ("auto", "float32")


def test_the_vocabulary_is_rounded_as_train_rounds_it(tmp_path: Path) -> None:
    assert recipe_subject._VOCAB_MULTIPLE == VOCAB_MULTIPLE
    text = Path(FIRST).read_text().replace("vocab_size = 512", "vocab_size = 500")
    (tmp_path / "other.toml").write_text(text)
    assert load_subject(str(tmp_path / "other.toml")).config.vocab_size == 512


def test_a_large_batch_is_capped_and_the_trace_says_so(tmp_path: Path) -> None:
    text = Path(FIRST).read_text().replace("batch_size = 32", "batch_size = 4096")
    (tmp_path / "large.toml").write_text(text)
    plan = load_subject(str(tmp_path / "large.toml"))._plan()
    assert plan.stage.batch_size < 4096
    assert plan.stage.seq_len == 128
    assert "instead of 4096 x 128" in plan.notes[0]


def test_serving_gives_every_step_s_logits_alike_on_both_devices() -> None:
    activate("sim")
    plant([])
    found = []
    for device in (CPU, torch.device("sim:0")):
        workload = load_subject(FIRST).workload(device, torch.float32, small=True)
        found.append(workload.serve_step())
        rows = workload.serve_rows([0, 3, 5])
        assert rows.shape == (3, 512)
        assert torch.equal(workload.serve_step(), found[-1])  # a second step starts anew
    assert found[0].shape[1] == 512
    assert found[0].device.type == "cpu"
    # Sums over 128 hidden values in fp32 in another order, through three layers.
    assert torch.allclose(*found, rtol=1e-3, atol=1e-4)


def test_serving_after_training_uses_the_new_weights() -> None:
    workload = load_subject(FIRST).workload(CPU, torch.float32, small=True)
    before = workload.serve_rows([0])
    workload.train_step(0)
    assert not torch.equal(workload.serve_rows([0]), before)


def test_a_row_is_the_same_prompt_in_every_company() -> None:
    workload = load_subject(FIRST).workload(CPU, torch.float32, small=True)
    together = workload.serve_rows([2, 7, 1])
    assert torch.allclose(workload.serve_rows([7]), together[1:2], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(together[0], together[1], rtol=1e-3, atol=1e-4)


def test_a_run_directory_is_its_recipe(tmp_path: Path) -> None:
    shutil.copy(FIRST, tmp_path / "recipe.toml")
    subject = load_subject(str(tmp_path))
    assert (subject.name, subject.origin) == ("first", str(tmp_path))


def test_a_run_is_examined_with_what_was_set_over_its_recipe(tmp_path: Path) -> None:
    shutil.copy(FIRST, tmp_path / "recipe.toml")
    recipe = load_recipe(Path(FIRST), ["model.hidden_size=96", "train.dtype='bfloat16'"])
    write_json(tmp_path / "resolved.json", recipe.model_dump(mode="json"))
    subject = load_subject(str(tmp_path))
    assert isinstance(subject, TransformerSubject)
    assert subject.config.hidden_size == 96
    assert subject.dtype_setting("train") == "bfloat16"


def test_deepseek_goes_to_our_own_transformer(tmp_path: Path) -> None:
    origin = write_config(tmp_path / "tiny-v3", **DEEPSEEK)
    subject = load_subject(origin)
    assert isinstance(subject, TransformerSubject)
    assert subject.name == "tiny-v3"
    assert math.isfinite(subject.workload(CPU, torch.float32).train_step(0).loss)


def test_a_non_finite_step_is_measured_as_such() -> None:
    workload = load_subject(FIRST).workload(CPU, torch.float32, small=True)
    with torch.no_grad():
        next(workload.module.parameters()).fill_(math.inf)
    assert math.isnan(workload.train_step(0).loss)


def big(**changes: Any) -> ModelConfig:
    fields = {
        "vocab_size": 32768,
        "hidden_size": 512,
        "intermediate_size": 4096,
        "moe_intermediate_size": 512,
        "num_hidden_layers": 12,
        "num_nextn_predict_layers": 2,
        "num_attention_heads": 16,
        "n_routed_experts": 64,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
    }
    return ModelConfig(**{**fields, **changes})


@pytest.mark.parametrize("most_bytes", [2 << 30, 1 << 30, 600 << 20])
def test_a_model_is_cut_until_it_fits_and_keeps_hidden_and_head_sizes(most_bytes: int) -> None:
    config = big()
    fitted, notes = fitted_config(config, most_bytes)
    with torch.device("meta"):
        needed = BYTES_PER_PARAMETER * sum(each.numel() for each in Transformer(fitted).parameters())
    assert needed <= most_bytes
    assert (fitted.hidden_size, fitted.qk_head_dim, fitted.v_head_dim) == (512, config.qk_head_dim, config.v_head_dim)
    assert (fitted.num_hidden_layers, fitted.first_k_dense_replace) == (2, 1)
    assert "num_hidden_layers 12 -> 2" in notes[0]


def test_a_model_that_fits_is_left_alone_and_one_that_never_does_is_refused() -> None:
    small = small_config(big())
    assert fitted_config(small, 1 << 30) == (small, [])
    with pytest.raises(QualifyError, match="still needs"):
        fitted_config(big(), 1 << 20)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"first_k_dense_replace": 0},
        {"first_k_dense_replace": 12},
        {"n_group": 1, "topk_group": 1},
        {"q_lora_rank": 99},
    ],
)
def test_small_models_have_the_same_kinds_of_layers_and_run(changes: dict[str, Any]) -> None:
    config = big(**changes)
    small = small_config(config)
    for kind in (True, False):
        had = kind in {config.is_moe_layer(layer) for layer in range(config.num_hidden_layers)}
        assert had == (kind in {small.is_moe_layer(layer) for layer in range(small.num_hidden_layers)})
    assert (small.n_group > 1) == (config.n_group > 1)
    assert (small.q_lora_rank is None) == (config.q_lora_rank is None)
    subject = TransformerSubject("small", "small", config, recipe_subject.StageSettings(steps=100), "auto")
    assert math.isfinite(subject.workload(CPU, torch.float32, small=True).train_step(0).loss)


def test_ruled_tokens_follow_their_rule_nine_times_in_ten() -> None:
    tokens = ruled_tokens(512, 64, 128, seed=1, index=0)
    pairs = torch.stack([tokens[:, :-1].flatten(), tokens[:, 1:].flatten()])
    counts = torch.zeros(64, 64).index_put_(tuple(pairs), torch.ones(pairs.shape[1]), accumulate=True)
    share = float(counts.max(dim=1).values.sum() / counts.sum())
    assert share == pytest.approx(0.9 + 0.1 / 64, abs=0.02)
    assert not torch.equal(tokens, ruled_tokens(512, 64, 128, seed=1, index=1))


# The working dtype


def test_the_working_dtype_is_the_setting_s_or_the_faster_one(monkeypatch: pytest.MonkeyPatch) -> None:
    chip = find_chip("cpu")
    assert working_dtype(chip, "float32") == torch.float32
    assert working_dtype(chip, "bfloat16") == torch.bfloat16
    times = {torch.float32: 1.2, torch.bfloat16: 1.0}
    monkeypatch.setattr(
        "crosschip.qualify.subjects.subject.best_product_time_s", lambda chip, dtype, size: times[dtype]
    )
    assert working_dtype(chip, "auto") == torch.bfloat16
    times[torch.bfloat16] = 1.1
    assert working_dtype(chip, "auto") == torch.float32


def test_a_chip_without_bf16_products_works_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(chip: Any, dtype: torch.dtype, size: int) -> float:
        raise NotImplementedError("no bf16 here")

    monkeypatch.setattr(f"{SUBJECT}.best_product_time_s", refuse)
    assert working_dtype(find_chip("cpu"), "auto") == torch.float32
