"""The dry voyage with other people's engines, in the environments that `make engines` made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from crosschip.dry_voyage import DryVoyageRequest, dry_voyage
from crosschip.engines import engine_python

pytestmark = [pytest.mark.engines, pytest.mark.slow]

FIRST = Path("recipes/first.toml")


def interpreter(engine: str) -> Path:
    python = engine_python(engine)
    if python is None:
        pytest.skip(f"`make engines` has not made {engine}")
    return python


def rehearse(engine: str, python: Path, recipe: Path, report: Path, **environment: str) -> dict[str, Any]:
    request = DryVoyageRequest(
        str(recipe), engine, report, engine_python=python, environment=environment, most_parameters=3_000_000
    )
    return dry_voyage(request)


def with_q_lora_rank(directory: Path) -> Path:
    recipe = directory / "recipe.toml"
    recipe.write_text(FIRST.read_text().replace("kv_lora_rank = 64", "kv_lora_rank = 64\nq_lora_rank = 48"))
    return recipe


def test_llamacpp_refuses_an_architecture_without_q_lora_rank_and_the_field_is_named(tmp_path: Path) -> None:
    python = interpreter("llamacpp")
    report = rehearse("llamacpp", python, FIRST, tmp_path / "report.json")
    assert report["verdict"] == "FAIL"
    assert report["findings"][0]["details"]["fields"] == {"q_lora_rank": None}


def test_llamacpp_takes_the_architecture_with_that_field_and_computes_the_same(tmp_path: Path) -> None:
    python, recipe = interpreter("llamacpp"), with_q_lora_rank(tmp_path)
    report = rehearse("llamacpp", python, recipe, tmp_path / "report.json")
    assert report["findings"] == []
    assert report["verdict"] == "PASS"
    assert report["exams"][0]["num_checks"]["log-probs"] > 20


def test_llamacpp_with_a_converter_that_is_missing_says_so(tmp_path: Path) -> None:
    nowhere = {"LLAMA_CPP_CONVERT": str(tmp_path / "convert_hf_to_gguf.py")}
    report = rehearse("llamacpp", interpreter("llamacpp"), FIRST, tmp_path / "report.json", **nowhere)
    assert report["verdict"] == "FAIL"
    assert "conversion to GGUF" in report["findings"][0]["message"]
    assert report["findings"][0]["details"]["fields"] == {}


def test_vllm_serves_the_architecture_or_names_the_field_to_change(tmp_path: Path) -> None:
    report = rehearse("vllm", interpreter("vllm"), FIRST, tmp_path / "report.json")
    assert report["verdict"] in ("PASS", "FAIL")
    if report["verdict"] == "FAIL":
        (finding,) = report["findings"]
        assert finding["check"] == "log-probs" or finding["details"]["fields"]
