"""`qualify` with a golden bundle: the exam is taken, passes an honest chip, names a fault, and refuses what it must."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from crosschip.chips import find_chip
from crosschip.errors import GoldenError, QualifyError
from crosschip.golden.bundle import load_bundle
from crosschip.golden.record import RecordPlan, record
from crosschip.model import load_model, save_model
from crosschip.qualify.exams.golden.exam import _has_weights, _weights_of, check_bundle
from crosschip.qualify.programme import Request
from crosschip.qualify.qualification import qualify
from crosschip.qualify.subjects.subject import load_subject
from crosschip.recipe.tables import ModelSettings
from tests.golden.conftest import CONFIG, PLAN
from tests.model.configs import random_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model, its bundle, and another model."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("golden-exam")
    save_model(random_model(CONFIG), place / "model")
    save_model(random_model(CONFIG, seed=1), place / "other")
    record(place / "model", find_chip("cpu"), place / "bundle", plan=PLAN)
    return place


def examined(made: Path, report: Path, chip: str, model: str = "model", **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"exams": (), "time_s": 120.0, "golden": made / "bundle", "report": report} | changes
    return qualify(Request(str(made / model), chip, **settings))


def test_it_is_in_the_programme_only_with_a_bundle() -> None:
    assert "golden" not in [exam.name for exam, _ in Request("m").programme]
    assert [exam.name for exam, _ in Request("m", golden=Path("b")).programme][-1] == "golden"
    assert [exam.name for exam, _ in Request("m", golden=Path("b"), exams=()).programme] == ["golden"]


def test_an_honest_chip_passes_with_every_row(made: Path, tmp_path: Path) -> None:
    report = examined(made, tmp_path / "report.json", "sim:reordered")
    exam = report["exams"][0]
    assert (report["verdict"], exam["exam"], exam["ended"]) == ("PASS", "golden", "complete")
    rows = exam["coverage"]["rows of the golden bundle"]
    assert rows["made"] == rows["planned"] > 10
    assert {"mean KL, alone", "router choices, in a batch of 4", "training curve"} <= set(exam["num_checks"])
    measured = {each["check"] for each in exam["measurements"]}
    assert measured == {"golden weights", "golden replay", "golden training curve"}
    assert exam["measurements"][0]["words"] == f"replayed the weights in {made / 'model'}"


def test_a_faulty_operator_is_named(made: Path, tmp_path: Path) -> None:
    report = examined(made, tmp_path / "report.json", "sim:N2", role="serve")
    assert report["verdict"] == "FAIL"
    worst = report["findings"][0]
    assert (worst["exam"], worst["kind"], worst["subject"]) == ("golden", "numerics", "layers.0.self_attn")
    assert worst["details"]["cause"] == "operator"
    assert worst["details"]["again"].endswith("--chip sim:N2")
    assert "training curve" not in report["exams"][0]["num_checks"]  # a chip that serves need not train


def test_a_bundle_of_other_weights_is_refused_before_anything_is_examined(made: Path, tmp_path: Path) -> None:
    with pytest.raises(QualifyError, match="was made for other weights"):
        examined(made, tmp_path / "report.json", "cpu", model="other")
    assert not (tmp_path / "report.json").exists()


def test_a_tensor_that_differs_is_named_though_the_files_are_read_once(made: Path, tmp_path: Path) -> None:
    """What was found beforehand is what the exam reports."""
    model = load_model(made / "model")
    with torch.no_grad():
        model.layers[0].self_attn.o_proj.weight *= 1.5
    save_model(model, tmp_path / "altered")
    report = examined(made, tmp_path / "report.json", "cpu", model=str(tmp_path / "altered"))
    worst = report["findings"][0]
    assert (report["verdict"], worst["details"]["cause"]) == ("FAIL", "conversion")
    assert "model.layers.0.self_attn.o_proj.weight is the recorded tensor times 1.5" in str(worst)


@pytest.mark.parametrize("chip", ["cpu", "cuda:63"])
def test_a_damaged_bundle_is_refused_before_anything_is_examined(made: Path, tmp_path: Path, chip: str) -> None:
    shutil.copytree(made / "bundle", tmp_path / "bundle")
    with (tmp_path / "bundle" / "golden.safetensors").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(QualifyError, match="was cut or altered"):
        examined(made, tmp_path / "report.json", chip, golden=tmp_path / "bundle")
    assert not (tmp_path / "report.json").exists()


REST = """\
name = "made"
[data]
source = "arithmetic"
[tokenizer]
vocab_size = 320
[train]
steps = 100
batch_size = 2
seq_len = 32
"""


def a_recipe(path: Path, **fields: Any) -> str:
    """A recipe of the recorded model, but for these fields of its `[model]`."""
    own = {key: value for key, value in asdict(CONFIG).items() if key in ModelSettings.model_fields}
    values = {key: value for key, value in (own | fields).items() if value is not None}
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    path.write_text("\n".join([REST, "[model]", *lines]) + "\n")
    return str(path)


def test_a_recipe_of_the_recorded_model_is_examined_with_the_recorded_weights(made: Path, tmp_path: Path) -> None:
    report = examined(made, tmp_path / "report.json", "cpu", model=a_recipe(tmp_path / "same.toml"), role="serve")
    exam = report["exams"][0]
    assert (report["verdict"], exam["ended"]) == ("PASS", "complete")
    words = f"replayed the weights in {made / 'model'}"
    assert words in [each.get("words") for each in exam["measurements"]]
    assert any(words in each for each in exam["not_covered"])


def test_a_recipe_of_another_model_is_refused_with_the_fields(made: Path, tmp_path: Path) -> None:
    """The bundle, held against the files that it was recorded from, says nothing about this recipe."""
    assert check_bundle(a_recipe(tmp_path / "same.toml"), made / "bundle")["fields"] == []
    other = a_recipe(tmp_path / "other.toml", hidden_size=128, rms_norm_eps=1e-5, num_hidden_layers=4, v_head_dim=32)
    with pytest.raises(GoldenError) as refused:
        check_bundle(other, made / "bundle")
    problem = refused.value.problem
    assert f"the model of {other} is not the one" in problem
    assert "hidden_size = 128, recorded 64, num_hidden_layers = 4, recorded 3, v_head_dim = 32" in problem
    assert "and 1 more fields" in problem
    with pytest.raises(QualifyError, match="hidden_size = 128, recorded 64"):
        examined(made, tmp_path / "report.json", "cpu", model=other)
    assert not (tmp_path / "report.json").exists()


def test_a_recipe_that_names_weights_is_examined_with_these(made: Path, tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(f'{REST}[model]\ndirectory = "{made / "model"}"\n')
    assert check_bundle(str(tmp_path / "own.toml"), made / "bundle")["weights"] == []
    without = a_recipe(tmp_path / "without.toml")
    origins = [str(tmp_path / "own.toml"), str(made / "model"), without]
    contexts: list[Any] = [SimpleNamespace(subject=load_subject(origin)) for origin in origins]
    assert [_has_weights(context) for context in contexts] == [True, True, False]
    (tmp_path / "other.toml").write_text(f'{REST}[model]\ndirectory = "{made / "other"}"\n')
    with pytest.raises(GoldenError, match="was made for other weights"):
        check_bundle(str(tmp_path / "other.toml"), made / "bundle")


def test_a_function_is_refused_and_the_directory_asked_for(made: Path) -> None:
    with pytest.raises(GoldenError, match="is a function") as refused:
        check_bundle("tests.qualify.drawing:make", made / "bundle")
    assert "--model DIR" in refused.value.remedy


def test_the_recorded_place_is_found_from_elsewhere(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = a_recipe(tmp_path / "same.toml")
    monkeypatch.chdir(made)
    record(Path("model"), find_chip("cpu"), made / "from-here", plan=replace(PLAN, max_tokens=200))
    monkeypatch.chdir(tmp_path)
    assert load_bundle(made / "from-here").manifest["source"] == str(made / "model")
    assert check_bundle(recipe, made / "from-here")["weights"] == []
    older = load_bundle(made / "bundle")
    typed = replace(older, manifest=older.manifest | {"source": "model"})
    assert _weights_of(recipe, typed) == made / "model"
    gone = replace(older, manifest=older.manifest | {"source": "gone/model"})
    with pytest.raises(GoldenError, match="gone/model, which the bundle was recorded from, is not here"):
        _weights_of(recipe, gone)


@pytest.fixture(scope="module")
def llama(made: Path) -> Path:
    """A model that ours does not run, and its bundle, recorded through transformers."""
    sizes = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 70}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, **heads, initializer_range=0.3)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(made / "llama")
    record(made / "llama", find_chip("cpu"), made / "llama-bundle", plan=RecordPlan(max_tokens=300))
    return made / "llama-bundle"


@pytest.mark.parametrize(("chip", "verdict"), [("cpu", "PASS"), ("sim:N2", "FAIL")])
def test_a_bundle_recorded_through_transformers_is_replayed_through_it(
    made: Path, llama: Path, tmp_path: Path, chip: str, verdict: str
) -> None:
    report = examined(made, tmp_path / "report.json", chip, model="llama", golden=llama, role="serve")
    exam = report["exams"][0]
    assert report["verdict"] == verdict, report["findings"]
    assert {"mean KL, alone", "activations, attention by one call"} <= set(exam["num_checks"])
    rows = exam["coverage"]["rows of the golden bundle"]
    assert rows["made"] == rows["planned"] > 5
    if verdict == "FAIL":
        assert (report["findings"][0]["subject"], report["findings"][0]["kind"]) == ("layers.0", "numerics")
