"""What `crosschip qualify --engine` and `--dry-voyage` call: options, printed report, exit codes."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from crosschip.cli.engines import (
    DryVoyageOption,
    EngineCommandOption,
    EngineOption,
    EnginePythonOption,
    GoldenOption,
    qualify_dry_voyage,
    qualify_engine,
)
from crosschip.cli.guard import guarded
from crosschip.report.qualify_page import write_qualification_page
from crosschip.rundir import write_json
from tests.qualify.serving.faulty_engine import Faults
from tests.report.qualifications import qualification
from tests.serve.conftest import RunningServer

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
@guarded
def qualify(
    engine: EngineOption = None,
    golden: GoldenOption = None,
    dry_voyage: DryVoyageOption = None,
    engine_python: EnginePythonOption = None,
    engine_command: EngineCommandOption = None,
    model: str | None = None,
    json_path: Path | None = None,
    exams: str | None = None,
    minutes: float | None = None,
) -> None:
    """Stand in for the verb."""
    if engine is not None:
        qualify_engine(engine, model=model, golden=golden, json_path=json_path, exams=exams, minutes=minutes)
    elif dry_voyage is not None:
        qualify_dry_voyage(
            model,
            dry_voyage,
            engine_python=engine_python,
            engine_command=engine_command,
            json_path=json_path,
            minutes=minutes,
        )


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def earlier(report: Path) -> dict[Path, bytes]:
    """What an earlier examination left, a report and its page, which say PASS."""
    write_json(report, qualification())
    page = write_qualification_page(report)
    assert page is not None
    return {path: path.read_bytes() for path in (report, page)}


def test_a_healthy_engine_ends_with_0_and_a_report(honest_server: RunningServer, tmp_path: Path) -> None:
    report = tmp_path / "deep" / "report.json"
    ran = run(
        "--engine",
        honest_server.url,
        "--exams",
        "serving_determinism,serving_stopping",
        "--minutes",
        10,
        "--json-path",
        report,
    )
    assert ran.exit_code == 0, ran.output
    assert ran.output.startswith("PASS")
    assert f"report: {report}" in ran.output
    assert json.loads(report.read_text())["document"] == "qualification"


def test_a_faulty_engine_ends_with_1_and_the_reproducer_is_named(proxy: tuple[str, Faults], tmp_path: Path) -> None:
    url, faults = proxy
    faults.ignores_stop = True
    ran = run("--engine", url, "--exams", "serving_stopping", "--json-path", tmp_path / "report.json")
    assert ran.exit_code == 1, ran.output
    assert "for the vendor:" in ran.output


def test_a_missing_engine_ends_with_3(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    ran = run("--engine", url, "--json-path", tmp_path / "report.json")
    assert ran.exit_code == 3, ran.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--engine", "localhost:8000"), "is not an address"),
        (("--engine", "http://127.0.0.1:9", "--exams", "operators"), "no serving probe"),
        (("--engine", "http://127.0.0.1:9", "--model", "recipes/first.toml"), "is no model directory"),
        (("--engine", "http://127.0.0.1:9", "--golden", "nowhere"), "no golden bundle"),
        (("--dry-voyage", "native"), "--model is missing"),
        (("--dry-voyage", "sglang", "--model", "recipes/first.toml"), "not known here"),
        (("--dry-voyage", "vllm", "--model", "recipes/first.toml"), "--engine-python"),
        (("--dry-voyage", "command", "--model", "recipes/first.toml", "--engine-command", "x"), "{model} and {port}"),
        (("--dry-voyage", "native", "--model", "nowhere.toml"), "nowhere.toml"),
    ],
)
def test_bad_usage_ends_with_2_and_a_remedy(
    words: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROSSCHIP_ENGINES", str(tmp_path))  # no engine that `make engines` made here
    ran = run(*words, "--json-path", tmp_path / "report.json")
    assert ran.exit_code == 2, ran.output
    assert message in ran.output
    assert "what to do" in ran.output
    assert not (tmp_path / "report.json").exists()
    before = earlier(tmp_path / "report.json")
    assert run(*words, "--json-path", tmp_path / "report.json").exit_code == 2
    assert {path: path.read_bytes() for path in before} == before


def test_a_dry_voyage_that_is_refused_ends_with_1_and_one_that_never_starts_with_3(tmp_path: Path) -> None:
    words = ("--dry-voyage", "command", "--model", "recipes/first.toml", "--json-path", tmp_path / "report.json")
    refusing = "python3 -c 'exit(print(\"ValueError: Unknown RoPE scaling type\") or 1)' {model} {port}"
    ran = run(*words, "--engine-command", refusing)
    assert ran.exit_code == 1, ran.output
    assert "rope_scaling" in ran.output
    ran = run(*words, "--engine-command", "sh -c 'sleep 600' {model} {port}", "--minutes", "0.02")
    assert ran.exit_code == 3, ran.output


def test_an_interrupted_engine_exam_leaves_a_page_of_its_own(honest_server: RunningServer, tmp_path: Path) -> None:
    report, page = tmp_path / "report.json", tmp_path / "report.html"
    earlier(report)

    def tell(line: str) -> None:
        assert not page.exists()  # that of the earlier one, which goes before its report does
        if line.startswith("serving_stopping"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qualify_engine(
            honest_server.url, json_path=report, exams="serving_determinism,serving_stopping", minutes=10, tell=tell
        )
    assert json.loads(report.read_text())["complete"] is False
    assert honest_server.url in page.read_text()
    assert "interrupted" in page.read_text()


def test_an_interrupted_dry_voyage_has_no_report_and_leaves_the_earlier_one(tmp_path: Path) -> None:
    before = earlier(tmp_path / "report.json")

    def tell(line: str) -> None:
        assert not (tmp_path / "report.html").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qualify_dry_voyage("recipes/first.toml", "native", json_path=tmp_path / "report.json", tell=tell)
    assert {path: path.read_bytes() for path in before} == before
