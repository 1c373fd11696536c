"""`qualify` with a golden bundle: the exam is taken, passes an honest chip, names a fault, and refuses what it must."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from crosschip.chips import find_chip
from crosschip.errors import QualifyError
from crosschip.golden.record import record
from crosschip.model import load_model, save_model
from crosschip.qualify.programme import Request
from crosschip.qualify.qualification import qualify
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
    assert {each["check"] for each in exam["measurements"]} == {"golden replay", "golden training curve"}


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


def test_a_damaged_bundle_is_refused_before_anything_is_examined(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "bundle", tmp_path / "bundle")
    with (tmp_path / "bundle" / "golden.safetensors").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(QualifyError, match="was cut or altered"):
        examined(made, tmp_path / "report.json", "cpu", golden=tmp_path / "bundle")
    assert not (tmp_path / "report.json").exists()
