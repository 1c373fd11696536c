"""A report of answers counts for the files that gave them, and for no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from crosschip.certificate.document import write_certificate
from crosschip.checkpoints import VERDICT_FILE
from crosschip.errors import HandoffError
from crosschip.handoff.answers.identity import weights_hash
from crosschip.handoff.certificate.taken_over import answer_gates, bound_answer_gates, summarised, write_read_gate
from crosschip.rundir import read_json, sha256_of, write_json

COUNTS = ("num_reasoning_open", "num_without_one_answer", "num_loops", "num_not_utf8")


def side(target: object, **more: Any) -> dict[str, Any]:
    return {"target": str(target), "health": {"num_replies": 9, **dict.fromkeys(COUNTS, 0)}, **more}


def of_directory(directory: Path) -> dict[str, Any]:
    return side(directory, weights=weights_hash(directory))


def report(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    task = {"task": "answers", "verdict": "PASS", "difference": 0.0, "margin": 0.03, "smallest_detectable": 0.01}
    return {"verdict": "PASS", "tasks": [task], "not_covered": [], "a": a, "b": b}


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    made = []
    for name in ("source", "served", "another"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)
        made.append(tmp_path / name)
    return made


def test_a_report_about_these_files_counts(models: list[Path]) -> None:
    source, served, _ = models
    gates = bound_answer_gates(report(of_directory(source), of_directory(served)), served, source)
    assert [(gate.verdict, gate.not_covered) for gate in gates] == [("PASS", []), ("PASS WITH LIMITS", [])]


def test_a_report_about_other_files_covers_nothing(models: list[Path]) -> None:
    source, served, another = models
    for b, why in (
        (of_directory(another), "the weights certified here are other files"),
        (side(served), "make it again"),
    ):
        gates = bound_answer_gates(report(of_directory(source), b), served, source)
        assert [gate.verdict for gate in gates] == ["NOT COVERED", "NOT COVERED"]
        assert f"the report is about B = {b['target']}" in gates[0].message
        assert why in gates[0].message


def test_files_that_changed_since_are_other_files(models: list[Path]) -> None:
    source, served, _ = models
    document = report(of_directory(source), of_directory(served))
    (served / "model.safetensors").write_text("retrained")
    assert bound_answer_gates(document, served, source)[0].verdict == "NOT COVERED"


def test_an_address_counts_and_is_said_to_be_one(models: list[Path]) -> None:
    source, served, _ = models
    url = "http://127.0.0.1:8000"
    gates = bound_answer_gates(report(side(url), side(url)), served, source)
    assert [gate.verdict for gate in gates] == ["PASS", "PASS WITH LIMITS"]
    assert [words.partition(":")[0] for words in gates[0].not_covered] == ["A = http", "B = http"]
    assert "is not known" in gates[0].not_covered[1]


@pytest.mark.parametrize(("at_hand", "words"), [(True, "are other files than the source's"), (False, "not at hand")])
def test_what_it_was_compared_with_is_told_where_it_is_not_the_source(
    models: list[Path], at_hand: bool, words: str
) -> None:
    source, served, another = models
    (gate, _) = bound_answer_gates(
        report(of_directory(another), of_directory(served)), served, source if at_hand else None
    )
    assert gate.verdict == "PASS"
    assert words in gate.not_covered[0]


@pytest.mark.parametrize("number", [float("inf"), float("nan"), "many", None])
def test_a_count_that_is_none_is_refused(models: list[Path], number: object) -> None:
    source, served, _ = models
    document = report(of_directory(source), of_directory(served))
    document["b"]["health"]["num_replies"] = number
    with pytest.raises(HandoffError, match="has another form"):
        answer_gates(document)


def test_single_outcomes_stay_out_of_the_certificate_and_the_whole_reports_hash_is_in_it(
    models: list[Path], tmp_path: Path
) -> None:
    source, served, _ = models
    document = report(of_directory(source), of_directory(served))
    document["outcomes"] = [["answers", f"problem {number}", None, True, True] for number in range(1000)]
    write_json(tmp_path / "report.json", document)
    found = summarised(read_json(tmp_path / "report.json"))
    assert found.pop("report_sha256") == sha256_of(tmp_path / "report.json")
    assert {**found, "outcomes": document["outcomes"]} == document


def test_what_would_make_a_certificate_that_nobody_can_read_is_refused(models: list[Path]) -> None:
    source, served, _ = models
    document = report(of_directory(source), of_directory(served))
    deep: list[Any] = []
    for _ in range(80):
        deep = [deep]
    for more, words in (({"examples": deep}, "more than 64 deep"), ({"examples": "x" * (65 << 20)}, "B at most")):
        with pytest.raises(HandoffError, match=words):
            summarised({**document, **more})
        with pytest.raises(HandoffError, match=words):
            write_certificate(served, {**document, **more})
    for _ in range(3000):  # a file's reader comes so far, and no writer does
        deep = [deep]
    for name in ("examples", "outcomes"):
        with pytest.raises(HandoffError, match="too deep"):
            summarised({**document, name: deep})
    assert not (served / "certificate.json").exists()


def test_without_a_report_there_are_no_gates(models: list[Path]) -> None:
    assert bound_answer_gates(None, models[1], models[0]) == []


@pytest.mark.parametrize(
    ("loss", "verdict", "num_measures"),
    [
        ({"expected": 2.5, "found": 2.5, "limit": 0.0}, "right", 1),
        ({"expected": None, "found": 2.5, "limit": 0.0}, "right", 0),  # training skipped the step to compare with
        (None, "right", 0),
        ({"expected": 2.5, "found": 2.75, "limit": 0.0}, "wrong", 1),
        (["damaged"], "right", 0),
    ],
)
def test_what_was_found_when_a_checkpoint_was_read_back_is_taken_over(
    tmp_path: Path, loss: object, verdict: str, num_measures: int
) -> None:
    write_json(tmp_path / VERDICT_FILE, {"schema_version": 1, "verdict": verdict, "detail": "told", "loss": loss})
    gate = write_read_gate(tmp_path)
    assert gate is not None
    assert (gate.verdict, len(gate.measures)) == ({"right": "PASS", "wrong": "FAIL"}[verdict], num_measures)
    assert bool(gate.not_covered) == (num_measures == 0)
