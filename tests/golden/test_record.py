"""What is recorded: the contents that the design names, within the size, with the chip's own noise floor."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from crosschip.chips import find_chip
from crosschip.cli.golden import _lines_of
from crosschip.errors import GoldenError
from crosschip.golden.bundle import Bundle
from crosschip.golden.record import MAX_BYTES, RecordPlan, bytes_per_position, model_directory_of, record
from crosschip.golden.training_curve import CurvePlan
from crosschip.model import config_from_settings, load_model
from crosschip.recipe import load_recipe
from tests.golden.conftest import CONFIG, PLAN

FIRST = Path(__file__).parent.parent.parent / "recipes" / "first.toml"


def test_the_contents_are_those_of_the_design(bundle: Bundle, model_dir: Path) -> None:
    manifest, arrays, positions = bundle.manifest, bundle.arrays, sum(bundle.lengths)
    assert bundle.lengths[-1] == CONFIG.max_position_embeddings
    assert {1, 15, 16, 17, 127, 128, 129} <= set(bundle.lengths)
    assert arrays["topk_logprobs"].shape == arrays["topk_ids"].shape == (positions, 20)
    assert arrays["target_logprob"].dtype == arrays["topk_logprobs"].dtype == np.float32
    for point in ("embed_tokens", "layers.0.self_attn", "layers.2.mlp", "norm", "lm_head"):
        assert arrays[f"sketch/{point}"].shape == (positions, 8)
    assert arrays["router_ids/layers.1"].shape == (positions, 2)
    assert (arrays["router_margin/layers.2"] >= 0).all()
    assert len(manifest["curve"]["loss"]) == len(manifest["curve"]["gradient_norm"]) == PLAN.curve.num_steps
    assert [each["run"] for each in manifest["noise_floor"]["measured_by"]] == [
        "in a batch of 4",
        "sums in order 1",
        "sums in order 2",
    ]
    assert manifest["fingerprint"]
    assert set(bundle.weights) == set(load_names(model_dir))


def load_names(model_dir: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(model_dir / "model.safetensors", framework="pt") as file:
        return list(file.keys())


def test_the_recorded_log_probs_are_those_of_the_model(bundle: Bundle, model_dir: Path) -> None:
    model = load_model(model_dir)
    start = sum(bundle.lengths[:8])
    ids = torch.tensor(bundle.rows[8])
    with torch.no_grad():
        right = model(ids[None])[0].double().log_softmax(-1)
    own = slice(start, start + len(ids))
    target = bundle.arrays["target_logprob"][own]
    assert np.allclose(target[:-1], right[:-1].gather(-1, ids[1:, None])[:, 0].numpy(), atol=1e-5)
    assert math.isnan(target[-1])
    mass = np.exp(bundle.arrays["topk_logprobs"][own].astype(float)).sum(1)
    assert np.allclose(mass + np.exp(bundle.arrays["rest_logprob"][own].astype(float)), 1.0, atol=1e-5)


def test_the_noise_floor_is_there_and_is_noise(bundle: Bundle) -> None:
    floor = bundle.floor
    assert 0 < floor["mean_kl"] < 1e-9
    assert 0 < floor["router_margin"] < 1e-5
    assert floor["points"]["embed_tokens"]["error"] == 0.0
    assert all(0 < each["error"] < 1e-5 for name, each in floor["points"].items() if name != "embed_tokens")
    assert 0 < floor["gradient_norm"] < 1e-4


def test_in_16_bits_arithmetic_without_rounding_is_part_of_the_floor(model_dir: Path, tmp_path: Path) -> None:
    plan = RecordPlan(max_tokens=200, reorderings=1, curve=CurvePlan(num_steps=0))
    manifest = record(model_dir, find_chip("cpu"), tmp_path / "b", dtype=torch.bfloat16, plan=plan)
    runs = {each["run"]: each["mean_kl"] for each in manifest["noise_floor"]["measured_by"]}
    assert 0 < runs["sums in order 1"] < 2 * runs["without rounding"]  # most sums round to the same 16 bits
    assert manifest["noise_floor"]["mean_kl"] >= 2 * runs["without rounding"]
    assert manifest["compute_dtype"] == "bfloat16"
    assert manifest["lengths_left_out"]


def test_the_default_recipe_fits_into_50_megabytes() -> None:
    config = config_from_settings(load_recipe(FIRST).model, vocab_size=512)
    assert RecordPlan().max_tokens * bytes_per_position(config) < MAX_BYTES == 50_000_000


def test_what_does_not_fit_is_refused(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(GoldenError, match="leave room for"):
        record(model_dir, find_chip("cpu"), tmp_path / "b", plan=RecordPlan(max_bytes=40_000))
    assert list(tmp_path.iterdir()) == []


def test_records_of_the_weights_take_no_room_from_the_answers(model_dir: Path, tmp_path: Path) -> None:
    """A model with many experts has more bytes of records than a bundle has in all."""
    plan = RecordPlan(max_tokens=70, max_bytes=100_000, reorderings=1, curve=CurvePlan(num_steps=0))
    manifest = record(model_dir, find_chip("cpu"), tmp_path / "b", plan=plan)
    assert 2 * len(json.dumps(manifest["weights"])) > plan.max_bytes
    assert [row["length"] for row in manifest["rows"]] == [1, 2, 15, 16, 17]


def test_a_chip_that_does_not_run_the_model_is_told_and_no_defect(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(GoldenError, match=r"cannot be recorded on sim:.*silu"):
        record(model_dir, find_chip("sim:W3,operator=silu"), tmp_path / "b", plan=RecordPlan(max_tokens=70))
    assert list(tmp_path.iterdir()) == []


def test_a_text_of_another_vocabulary_is_refused(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(GoldenError, match="token 97, the model's vocabulary ends at 96"):
        record(model_dir, find_chip("cpu"), tmp_path / "b", token_rows=[[1, 97]])


def test_a_text_may_hold_what_ends_lines_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("one\u2028still one\r\n\ntwo\x0c\n", encoding="utf-8")
    assert _lines_of(tmp_path / "texts") == ["one\u2028still one", "two\x0c"]


def test_a_run_means_its_last_complete_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(GoldenError, match="neither a model directory"):
        model_directory_of(tmp_path)
    for stage, step, complete in (("pretrain", 20, True), ("sft", 10, True), ("sft", 20, True), ("sft", 30, False)):
        checkpoint = tmp_path / "train" / stage / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        if complete:
            (checkpoint / "COMPLETE").touch()
    assert model_directory_of(tmp_path)[0] == tmp_path / "train" / "sft" / "checkpoints" / "step-00000020"
