"""Reports that cannot be told apart, or that contradict themselves, recommend nothing."""

from __future__ import annotations

from typing import Any

import pytest

from crosschip.report.compare import compare
from crosschip.report.qualification import ReportError
from crosschip.report.thoroughness import SERVING_PROBES
from tests.report.qualifications import finding, qualification
from tests.report.test_compare import ASCEND, H20, answer, of_engine

LOCAL = "http://127.0.0.1:8000"


def on_machine(host: str | None, url: str = LOCAL) -> dict[str, Any]:
    title = f"{url} on {host} (vllm 0.11)" if host else f"{url} (vllm 0.11)"
    report = of_engine(title, "serving_noise", *SERVING_PROBES)
    engine = {"url": url, "model": "served/name"} | ({"host": host} if host else {})
    return {**report, "fingerprint": {"engine": engine}}


def test_engines_at_one_address_on_two_machines_are_two() -> None:
    document = compare({"a.json": on_machine("lab-3"), "b.json": on_machine("lab-4")})
    assert [chip["title"] for chip in document["chips"]] == [f"{LOCAL} on lab-{n} (vllm 0.11)" for n in (3, 4)]
    assert document["notes"] == []
    assert document["recommendations"]["serve"]["answer"] == "INCONCLUSIVE"


@pytest.mark.parametrize("url", [LOCAL, "http://localhost:8000", "https://[::1]:8000/", "http://0.0.0.0"])
@pytest.mark.parametrize("host", [None, "lab-3"])
def test_an_engine_on_a_machine_that_nobody_knows_is_not_recommended(host: str | None, url: str) -> None:
    document = compare({"a.json": on_machine(None, url), "b.json": on_machine(host, url)})
    assert len(document["chips"]) == 2
    assert f"a.json does not say on which machine {url} (vllm 0.11) is" in "; ".join(document["notes"])
    assert "examined twice" not in "; ".join(document["notes"])
    serve = document["recommendations"]["serve"]
    assert serve["chip"] == (f"{url} on lab-3 (vllm 0.11)" if host else None)


def test_an_address_that_names_its_machine_is_one_engine() -> None:
    reports = {file: on_machine(None, "http://lab-3:8000") for file in ("a.json", "b.json")}
    document = compare(reports)
    assert len(document["chips"]) == 1
    assert "examined twice" in document["notes"][0]


def test_engines_of_other_models_are_not_compared() -> None:
    """Without --model the origin of both is the address, which says nothing of the model."""
    two = {f"{name}.json": of_engine("http://lab-3 (vllm)", "serving_noise", subject=name) for name in ("one", "two")}
    with pytest.raises(ReportError, match="is of the subject 'two'"):
        compare(two)


def test_a_dead_chip_is_still_the_one_of_the_engine_s_model() -> None:
    gone = qualification(finding("FAIL"), role="serve", model_name=None, dtype=None, subject="recipes/first.toml")
    engine = of_engine("http://lab-3 (vllm)", "serving_noise", *SERVING_PROBES)
    assert compare({"gone.json": gone, "engine.json": engine})["subject"] == "first"


@pytest.mark.parametrize("key", ["findings", "exams"])
def test_a_pass_that_holds_a_failure_is_undecided(key: str) -> None:
    altered = qualification(**H20)
    altered[key] = [*altered[key], {"exam": "operators", "verdict": "FAIL", "subject": "mm", "message": "off"}]
    failed = qualification(finding("FAIL"), **ASCEND)
    found = answer("train", altered, failed)
    assert (found["answer"], found["chip"]) == ("INCONCLUSIVE", None)
    notes = compare({"a.json": altered, "b.json": failed})["notes"]
    assert "a.json says PASS and holds a failure of its own (exam operators)" in notes[0]
