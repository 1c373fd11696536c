"""The dry voyage with other people's engines, each in an environment of its own that a variable names.

CROSSCHIP_LLAMACPP_PYTHON: an interpreter with the packages xllamacpp and gguf.
CROSSCHIP_VLLM_PYTHON: one with vLLM. It was not at hand when this was written: the test says what is expected of it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from crosschip.dry_voyage import DryVoyageRequest, dry_voyage

pytestmark = [pytest.mark.engines, pytest.mark.slow]

CONVERTER = Path(__file__).with_name("gguf_of_deepseek.py")
FIRST = Path("recipes/first.toml")


def interpreter(variable: str) -> Path:
    if variable not in os.environ:
        pytest.skip(f"{variable} names no interpreter")
    return Path(os.environ[variable])


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
    python = interpreter("CROSSCHIP_LLAMACPP_PYTHON")
    report = rehearse("llamacpp", python, FIRST, tmp_path / "report.json", LLAMA_CPP_CONVERT=str(CONVERTER))
    assert report["verdict"] == "FAIL"
    assert report["findings"][0]["details"]["fields"] == {"q_lora_rank": None}


def test_llamacpp_takes_the_architecture_with_that_field_and_computes_the_same(tmp_path: Path) -> None:
    python, recipe = interpreter("CROSSCHIP_LLAMACPP_PYTHON"), with_q_lora_rank(tmp_path)
    report = rehearse("llamacpp", python, recipe, tmp_path / "report.json", LLAMA_CPP_CONVERT=str(CONVERTER))
    assert report["findings"] == []
    assert report["verdict"] == "PASS"
    assert report["exams"][0]["num_checks"]["log-probs"] > 20


def test_llamacpp_without_a_converter_blames_the_environment(tmp_path: Path) -> None:
    python, nowhere = interpreter("CROSSCHIP_LLAMACPP_PYTHON"), {"PATH": str(tmp_path), "LLAMA_CPP_CONVERT": ""}
    report = rehearse("llamacpp", python, FIRST, tmp_path / "report.json", **nowhere)
    assert report["verdict"] == "FAIL"
    assert "convert_hf_to_gguf.py" in report["findings"][0]["message"]
    assert report["findings"][0]["details"]["fields"] == {}


def test_vllm_serves_the_architecture_or_names_the_field_to_change(tmp_path: Path) -> None:
    report = rehearse("vllm", interpreter("CROSSCHIP_VLLM_PYTHON"), FIRST, tmp_path / "report.json")
    assert report["verdict"] in ("PASS", "FAIL")
    if report["verdict"] == "FAIL":
        (finding,) = report["findings"]
        assert finding["check"] == "log-probs" or finding["details"]["fields"]
