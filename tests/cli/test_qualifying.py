"""`qualify`'s ways: which exclude each other, and which need no chip."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from crosschip.cli import app
from crosschip.qualify import qualification
from crosschip.rundir import read_json

TINY = "tests.qualify.tiny:subject"


def run(*arguments: object) -> tuple[int, str, str]:
    ended = CliRunner().invoke(app, ["qualify", *map(str, arguments)])
    return ended.exit_code, ended.stdout, ended.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--model is missing"),
        (["--model", TINY, "--trace-only", "--offline", "x.whl"], "--offline and --trace-only are different"),
        (["--engine", "http://127.0.0.1:1", "--dry-voyage", "native"], "--engine and --dry-voyage are different"),
        (["--model", TINY, "--exams", "softwear"], "there is no exam 'softwear'"),
        (["--model", TINY, "--exams", "golden"], "the exam 'golden' replays a bundle"),
        (["--model", TINY, "--minutes", "inf"], "--minutes inf is no time"),
        (["--model", TINY, "--minutes", "1e308"], "--minutes 1e+308 is no time"),
        (["--model", TINY, "--seed", "99999999999999"], "--seed"),
        (["--model", TINY, "--json", "."], "it is a directory"),
        (["--model", TINY, "--json", "report.html"], "its page goes there"),
        (["--engine", "http://127.0.0.1:1", "--json", "."], "it is a directory"),
        (["--model", TINY, "--dry-voyage", "native", "--json", "."], "it is a directory"),
    ],
)
def test_what_does_not_fit_together_is_said(arguments: list[str], said: str) -> None:
    code, _, error = run(*arguments)
    assert code == 2
    assert said in error


def test_a_report_that_could_not_be_written_is_refused_before_the_examination(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, error = run("--model", TINY, "--json", tmp_path / "file" / "new" / "report.json")
    assert code == 2
    assert f"{tmp_path / 'file'}: Not a directory" in error
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_another_document_in_the_report_s_place_does_not_hide_what_went_wrong(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    code, _, error = run("--model", tmp_path / "nothing", "--chip", "cpu", "--json", tmp_path / "config.json")
    assert code == 2
    assert f"there is no {tmp_path / 'nothing'}" in error


def test_a_golden_bundle_reaches_the_examination(tmp_path: Path) -> None:
    code, _, error = run("--model", TINY, "--chip", "cpu", "--golden", tmp_path / "none", "--json", tmp_path / "r.json")
    assert code == 2
    assert str(tmp_path / "none") in error
    assert not (tmp_path / "r.json").exists()


def test_an_operator_list_is_held_against_the_trace(tmp_path: Path) -> None:
    listed, document = tmp_path / "mlu_functions.yaml", tmp_path / "offline.json"
    listed.write_text("aten:\n  - func: addmm\n    derived_type: fallback\n  - func: mm\n")
    code, output, error = run("--model", TINY, "--offline", listed, "--json", document)
    assert (code, error) == (0, "")
    assert "coverage estimate, not a verdict" in output
    assert read_json(document)["document"] == "offline check"


@pytest.mark.parametrize("way", [["--trace-only"], ["--offline", "{listed}"]])
def test_what_writes_no_report_needs_no_place_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: list[str]
) -> None:
    (listed := tmp_path / "mlu_functions.yaml").write_text("aten:\n  - func: mm\n")
    (tmp_path / "qualify").write_text("a file, where reports go by default")
    monkeypatch.chdir(tmp_path)
    words = [word.format(listed=listed) for word in way]
    code, _, error = run("--model", TINY, "--chip", "cpu", *words)
    assert (code, error) == (0, "")
    code, _, error = run("--model", TINY, "--chip", "cpu", *words, "--json", tmp_path)
    assert code == 2
    assert "it is a directory" in error
    code, _, error = run("--model", TINY, "--chip", "cpu")
    assert code == 2
    assert "the report cannot be written to" in error


def test_an_operator_list_is_not_overwritten(tmp_path: Path) -> None:
    (listed := tmp_path / "mlu_functions.yaml").write_text("aten:\n  - func: mm\n")
    code, _, error = run("--model", TINY, "--offline", listed, "--json", listed)
    assert code == 2
    assert "is read, and would be lost" in error


def test_an_operator_list_that_is_none_is_refused_before_the_subject_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qualification, "record_trace_document", lambda *_: pytest.fail("recorded"))
    wrong = tmp_path / "torch_npu.whl"
    wrong.write_bytes(b"PK not a wheel")
    code, output, error = run("--model", TINY, "--offline", wrong)
    assert (code, output) == (2, "")
    assert "torch_npu.whl" in error


def test_a_report_has_its_page_beside_it(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    code, output, _ = run("--model", TINY, "--chip", "cpu", "--exams", "software", "--minutes", 0.5, "--json", report)
    assert code in (0, 3)  # a busy machine covers less
    assert str(report.with_suffix(".html")) in output.replace("\n", "")
    assert "qualification" in report.with_suffix(".html").read_text(encoding="utf-8")
