"""`compare` on files: what is printed and written, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from crosschip.cli import app
from crosschip.rundir import read_json, write_json
from tests.report.qualifications import finding, qualification


@pytest.fixture
def reports(tmp_path: Path) -> list[str]:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    write_json(good, qualification(chip="cuda:0", model_name="NVIDIA H20"))
    write_json(bad, qualification(finding("FAIL")))
    return [str(good), str(bad)]


def test_two_reports_become_text_a_page_and_a_document(reports: list[str], tmp_path: Path) -> None:
    page, text, document = (tmp_path / name for name in ("c.html", "c.md", "c.json"))
    ended = CliRunner().invoke(app, ["compare", *reports, "--out", str(page), "--json", str(document)])
    assert ended.exit_code == 0
    assert "NVIDIA H20" in ended.output
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert read_json(document)["document"] == "comparison"
    CliRunner().invoke(app, ["compare", *reports, "--out", str(text)])
    assert text.read_text(encoding="utf-8") in ended.output


def test_a_locale_that_lacks_a_character_ends_nothing(reports: list[str]) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "crosschip", "compare", *reports]
    ended = subprocess.run(command, capture_output=True, env=environment, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert b"\\u2013" in ended.stdout  # a dash


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ('{"document": "offline check"}', "is no qualification report"),
        ('{"document": "qualification", "schema_version": 99}', "schema version 99"),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_report_is_refused_by_name(
    reports: list[str], tmp_path: Path, content: str | None, said: str
) -> None:
    third = tmp_path / "third.json"
    if content is not None:
        third.write_text(content)
    ended = CliRunner().invoke(app, ["compare", *reports, str(third), "--out", str(tmp_path / "c.html")])
    assert ended.exit_code == 2
    assert "third.json" in ended.stderr
    assert said in ended.stderr
    assert not (tmp_path / "c.html").exists()


def test_one_report_is_nothing_to_compare(reports: list[str]) -> None:
    assert CliRunner().invoke(app, ["compare", reports[0]]).exit_code == 2
    twice = CliRunner().invoke(app, ["compare", reports[0], reports[0]])
    assert twice.exit_code == 2
    assert "is given twice" in twice.stderr


@pytest.mark.parametrize("option", ["--out", "--json"])
@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("", "it is a directory"),
        (".", "it is a directory"),
        ("{tmp}/pipe", "it is no ordinary file"),
        ("{tmp}", "it is a directory"),
        ("{tmp}/good.json/c.html", "good.json: Not a directory"),
        ("{tmp}/bad.json", "bad.json is read, and would be lost"),
        ("{tmp}/other/../good.json", "good.json is read, and would be lost"),
    ],
)
def test_a_place_that_nothing_can_be_written_to_is_refused_before_anything_is_written(
    reports: list[str], tmp_path: Path, option: str, place: str, said: str
) -> None:
    (tmp_path / "other").mkdir()
    os.mkfifo(tmp_path / "pipe")
    before = {path: path.read_bytes() for path in tmp_path.glob("*.json")}
    other = "--json" if option == "--out" else "--out"
    words = [option, place.format(tmp=tmp_path), other, str(tmp_path / "c")]
    ended = CliRunner().invoke(app, ["compare", *reports, *words])
    assert ended.exit_code == 2
    assert said in ended.stderr
    assert option in ended.stderr
    assert {path: path.read_bytes() for path in tmp_path.glob("*.json")} == before
    assert not (tmp_path / "c").exists()


def test_the_page_and_the_document_are_two_files(reports: list[str], tmp_path: Path) -> None:
    one = str(tmp_path / "c")
    ended = CliRunner().invoke(app, ["compare", *reports, "--out", one, "--json", one])
    assert ended.exit_code == 2
    assert not (tmp_path / "c").exists()
