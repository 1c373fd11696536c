"""Architectures that our own model does not run: recorded and replayed through transformers, on any chip."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from crosschip.chips import find_chip
from crosschip.errors import GoldenError
from crosschip.golden.bundle import Bundle, load_bundle
from crosschip.golden.comparison import Comparison
from crosschip.golden.judge import Judgement, judge
from crosschip.golden.plan import RecordPlan
from crosschip.golden.record import record
from crosschip.golden.replay import replay
from crosschip.golden.transformers_replay import replay_through_transformers
from tests.golden.conftest import Tensors

COMMON = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 70,
    "initializer_range": 0.3,
}
PLAN = RecordPlan(max_tokens=600)


def made(directory: Path, kind: str) -> Path:
    torch.manual_seed(0)
    transformers.logging.disable_progress_bar()
    config = {
        "llama": lambda: transformers.LlamaConfig(**COMMON),
        "qwen3": lambda: transformers.Qwen3Config(**COMMON, head_dim=12, tie_word_embeddings=True),
    }[kind]()
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("route") / "llama", "llama")


@pytest.fixture(scope="module")
def recorded(llama: Path) -> Bundle:
    record(llama, find_chip("cpu"), llama.parent / "bundle", plan=PLAN)
    return load_bundle(llama.parent / "bundle")


def replayed(bundle: Bundle, directory: Path, chip: str = "cpu") -> tuple[Comparison, Judgement]:
    comparison = replay_through_transformers(bundle, directory, find_chip(chip))
    return comparison, judge(comparison)


def test_the_bundle_says_how_it_was_made(recorded: Bundle) -> None:
    assert recorded.route == "transformers"
    assert recorded.manifest["points"] == ["embed_tokens", "layers.0", "layers.1", "norm", "lm_head"]
    assert recorded.manifest["curve"] is None
    assert recorded.floor["mean_kl"] < 1e-9, "batches and another attention differ by rounding"
    assert len(recorded.floor["measured_by"]) == 2


@pytest.mark.parametrize("chip", ["cpu", "sim"])
def test_an_honest_chip_passes(recorded: Bundle, llama: Path, chip: str) -> None:
    comparison, judgement = replayed(recorded, llama, chip)
    assert (judgement.verdict, judgement.findings) == ("PASS", [])
    assert [view.name for view in comparison.views] == ["alone", "in a batch of 4", "attention by one call"]
    assert any("router choices" in words for words in judgement.not_covered)


def test_tied_embeddings_and_bf16_pass_as_well(tmp_path: Path) -> None:
    directory = made(tmp_path / "qwen3", "qwen3")
    record(directory, find_chip("cpu"), tmp_path / "bundle", plan=PLAN, dtype=torch.bfloat16)
    bundle = load_bundle(tmp_path / "bundle")
    assert bundle.dtype == "bfloat16"
    assert {run["run"] for run in bundle.floor["measured_by"]} >= {"without rounding"}
    assert replayed(bundle, directory)[1].verdict == "PASS"


def test_a_wrong_attention_of_the_chip_is_named_by_its_layer(recorded: Bundle, llama: Path) -> None:
    _, judgement = replayed(recorded, llama, "sim:N2")
    assert judgement.verdict == "FAIL"
    assert (judgement.diagnosis.cause, judgement.diagnosis.subject) == ("operator", "layers.0")


@pytest.fixture
def changed(llama: Path, tmp_path: Path) -> Callable[[Callable[[Tensors], None]], Path]:
    def change(how: Callable[[Tensors], None]) -> Path:
        copy = Path(shutil.copytree(llama, tmp_path / "changed"))
        tensors = load_file(copy / "model.safetensors")
        how(tensors)
        save_file({name: each.contiguous() for name, each in tensors.items()}, copy / "model.safetensors")
        return copy

    return change


def test_permuted_rows_are_a_conversion(recorded: Bundle, changed: Callable[[Callable[[Tensors], None]], Path]) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    directory = changed(lambda tensors: tensors.update({name: tensors[name].flip(0)}))
    comparison, judgement = replayed(recorded, directory)
    assert (judgement.verdict, judgement.diagnosis.cause, judgement.diagnosis.subject) == ("FAIL", "conversion", name)
    first = comparison.views[0].first_diverging
    assert first is not None
    assert first.point == "layers.1"


@pytest.mark.parametrize(("field", "value"), [("rms_norm_eps", 1e-3), ("hidden_act", "gelu"), ("mlp_bias", None)])
def test_a_changed_field_is_named(recorded: Bundle, llama: Path, tmp_path: Path, field: str, value: object) -> None:
    copy = Path(shutil.copytree(llama, tmp_path / "changed"))
    config = json.loads((copy / "config.json").read_text())
    assert config[field] != value
    config[field] = value
    (copy / "config.json").write_text(json.dumps(config))
    _, judgement = replayed(recorded, copy)
    assert (judgement.verdict, judgement.diagnosis.cause, judgement.diagnosis.subject) == (
        "FAIL",
        "config field",
        field,
    )


def test_names_and_storage_are_no_difference(recorded: Bundle, llama: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(llama, tmp_path / "changed"))
    config = json.loads((copy / "config.json").read_text())
    config |= {"transformers_version": "0", "_name_or_path": "x", "use_cache": False}
    (copy / "config.json").write_text(json.dumps(config))
    assert replayed(recorded, copy)[1].verdict == "PASS"


def test_our_own_model_refuses_such_a_bundle(recorded: Bundle, llama: Path) -> None:
    with pytest.raises(GoldenError, match="recorded through transformers"):
        replay(recorded, llama, find_chip("cpu"))


def test_a_bundle_of_our_own_model_replays_in_transformers_with_layers(bundle: Bundle, model_dir: Path) -> None:
    comparison, judgement = replayed(bundle, model_dir)
    assert judgement.verdict == "PASS", judgement.findings
    assert [point.point for point in comparison.views[0].points][:3] == ["embed_tokens", "layers.0", "layers.1"]


@pytest.mark.parametrize("document", [{}, {"model_type": "none-such"}, {"model_type": "llama", "vocab_size": "many"}])
def test_what_nobody_runs_is_refused(llama: Path, tmp_path: Path, document: dict[str, object]) -> None:
    copy = Path(shutil.copytree(llama, tmp_path / "changed"))
    (copy / "config.json").write_text(json.dumps(document))
    with pytest.raises(GoldenError):
        record(copy, find_chip("cpu"), tmp_path / "bundle", plan=PLAN)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "the files lack model.norm.weight"),
        (lambda tensors: tensors.update({"model.x.weight": torch.ones(2)}), "no place in the model for model.x.weight"),
    ],
)
def test_files_that_transformers_would_complete_by_chance_are_refused(
    recorded: Bundle, changed: Callable[[Callable[[Tensors], None]], Path], how: Callable[[Tensors], None], words: str
) -> None:
    directory = changed(how)
    with pytest.raises(GoldenError, match=words):
        record(directory, find_chip("cpu"), directory.parent / "bundle", plan=PLAN)
    comparison, judgement = replayed(recorded, directory)
    assert (judgement.verdict, judgement.diagnosis.cause) == ("FAIL", "conversion")
    assert words in str(comparison.broke)


def test_rotary_tables_in_the_files_are_no_gap(
    recorded: Bundle, changed: Callable[[Callable[[Tensors], None]], Path]
) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    comparison, _ = replayed(recorded, changed(lambda tensors: tensors.update({name: torch.ones(6)})))
    assert comparison.broke is None


def test_rows_that_there_is_no_time_for_are_left_out(recorded: Bundle, llama: Path) -> None:
    asked: list[float] = []

    def has_time(share: float) -> bool:
        asked.append(share)
        return asked.count(share) <= 3

    comparison = replay_through_transformers(recorded, llama, find_chip("cpu"), has_time=has_time)
    assert (comparison.rows_made, comparison.rows_planned) == (3, len(recorded.lengths))
    assert [len(view.rows) for view in comparison.views] == [3, 3, 3]
    assert comparison.views[0].kl.mean < 1e-9
    assert judge(comparison).verdict == "INCONCLUSIVE"
