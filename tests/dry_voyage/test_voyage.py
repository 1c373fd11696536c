"""The dry voyage with real engines: our own server and transformers, honest and misreading, refusing and dying."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from crosschip.dry_voyage import DryVoyageRequest, dry_voyage
from crosschip.rundir import read_json

RECIPE = "recipes/first.toml"
MISREADING = Path(__file__).with_name("misreading_engine.py")


def rehearse(report: Path, **settings: Any) -> dict[str, Any]:
    document = dry_voyage(DryVoyageRequest(RECIPE, report=report, chip="cpu", **settings))
    assert read_json(report) == document
    return document


def misreading(report: Path, fault: str) -> dict[str, Any]:
    command = f"{sys.executable} {MISREADING} {{model}} {{port}} '{fault}'"
    root = str(Path(__file__).parents[2])
    return rehearse(report, engine="command", engine_command=command, environment={"PYTHONPATH": root})


@pytest.mark.parametrize("engine", ["native", pytest.param("transformers", marks=pytest.mark.slow)])
def test_an_engine_that_reads_the_export_rightly_passes(tmp_path: Path, engine: str) -> None:
    report = rehearse(tmp_path / "report.json", engine=engine)
    assert report["findings"] == []
    assert report["verdict"] == "PASS"
    (exam,) = report["exams"]
    assert exam["exam"] == "dry_voyage"
    assert exam["num_checks"]["log-probs"] > 300
    compared = [each for each in exam["measurements"] if each["what"] == "dry voyage"]
    assert max(each["mean"] for each in compared) < 1e-3


def test_what_our_own_server_refuses_names_the_field(tmp_path: Path) -> None:
    command = f"{sys.executable} -m crosschip serve {{model}} --port {{port}} --chip cpu --max-model-len 99999"
    report = rehearse(tmp_path / "report.json", engine="command", engine_command=command)
    assert report["verdict"] == "FAIL"
    (finding,) = report["findings"]
    assert finding["check"] == "engine starts"
    assert finding["subject"] == "max_position_embeddings"
    assert finding["details"]["fields"] == {"max_position_embeddings": 512}
    assert "512" in finding["message"]


@pytest.mark.parametrize(
    ("fault", "suspect"),
    [
        ("no router bias", "e_score_correction_bias (topk_method)"),
        pytest.param("rope_theta=20000", "rope_theta", marks=pytest.mark.slow),
        pytest.param("routed_scaling_factor=1.1", "routed_scaling_factor", marks=pytest.mark.slow),
    ],
)
def test_an_engine_that_computes_something_else_is_caught_and_the_part_suspected(
    tmp_path: Path, fault: str, suspect: str
) -> None:
    report = misreading(tmp_path / "report.json", fault)
    assert report["verdict"] == "FAIL"
    (finding,) = report["findings"]
    assert finding["check"] == "log-probs"
    assert suspect in finding["message"]
    assert finding["measured"] > finding["limit"]


@pytest.mark.slow
def test_the_misreading_engine_without_a_fault_passes(tmp_path: Path) -> None:
    assert misreading(tmp_path / "report.json", "none")["verdict"] == "PASS"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "verdict", "words"),
    [("no echo", "PASS", "log-probs of prompts"), ("no log-probs", "INCONCLUSIVE", "log-probs of prompts")],
)
def test_an_engine_that_tells_less_is_compared_by_what_it_tells(
    tmp_path: Path, fault: str, verdict: str, words: str
) -> None:
    report = misreading(tmp_path / "report.json", fault)
    assert report["findings"] == []
    assert report["verdict"] == verdict
    assert any(words in line for line in report["exams"][0]["not_covered"])


@pytest.mark.slow
def test_an_engine_that_dies_when_it_is_asked_leaves_a_report_with_its_last_words(tmp_path: Path) -> None:
    report = misreading(tmp_path / "report.json", "dies when asked")
    assert report["verdict"] == "FAIL"
    (finding,) = report["findings"]
    assert finding["check"] == "engine answers"
    assert finding["subject"] == "rope_scaling"


def test_an_engine_that_never_answers_is_inconclusive(tmp_path: Path) -> None:
    command = f"{sys.executable} -c 'import time; time.sleep(600)' {{model}} {{port}}"
    report = rehearse(tmp_path / "report.json", engine="command", engine_command=command, start_s=2.0)
    assert report["verdict"] == "INCONCLUSIVE"
    assert report["findings"][0]["check"] == "engine starts"
