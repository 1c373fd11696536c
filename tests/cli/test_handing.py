"""`crosschip handoff` in a process of its own: what it prints, what it leaves, and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from crosschip.certificate import Certificate
from crosschip.certificate.words import serving_lines
from crosschip.cli import app
from crosschip.handoff import answers
from crosschip.model import save_model
from tests.golden.conftest import CONFIG
from tests.handoff.answers.spoken import chat, speaking
from tests.model.configs import random_model

ROOT = Path(__file__).parent.parent.parent


def handoff(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "crosschip", "handoff", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_a_model_is_handed_off_signed_verified_and_a_changed_byte_found(tmp_path: Path) -> None:
    save_model(random_model(CONFIG), tmp_path / "model")
    assert handoff("keygen", tmp_path / "key").returncode == 0
    out, document = tmp_path / "served", tmp_path / "certificate.json"
    options = ("--out", out, "--engine", "model", "--chip", "cpu", "--key", tmp_path / "key", "--json", document)
    made = handoff(tmp_path / "model", "--to", "hf", *options)
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith("PASS: hf, float32, ")
    assert "golden bundle: recorded by the handoff, on cpu" in made.stdout
    assert "serve it with" not in made.stdout, "nothing that serves was asked"
    assert f"crosschip handoff certify {out} --golden BUNDLE --engine ENGINE" in made.stdout
    assert json.loads(document.read_text()) == json.loads((out / "certificate.json").read_text())
    verified = handoff("verify", out, "--public-key", tmp_path / "key.pub")
    assert (verified.returncode, verified.stdout.split(":")[0]) == (0, "VERIFIED")
    weights = out / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    found = handoff("verify", out)
    assert found.returncode == 1
    assert "model.safetensors holds other bytes than the certified ones" in found.stdout


def test_a_place_for_the_report_that_goes_away_takes_no_answers_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = answers.compare_answers

    def late(*sides: str, **settings: Any) -> object:
        (tmp_path / "report.json").mkdir()
        return real(*sides, **settings)

    monkeypatch.setattr(answers, "compare_answers", late)
    options = ("--json", str(tmp_path / "report.json"), "--num-problems", "2", "--tasks", "answers")
    with speaking(lambda body: chat("4")) as engine:
        ended = CliRunner().invoke(app, ["handoff", "compare", engine.url, engine.url, *options])
    assert ended.exit_code == 2
    assert "B against A on the same" in ended.output


@pytest.mark.parametrize(
    ("engines", "name", "route", "words"),
    [
        (["native", "model"], "hf", "model", "serve it with: crosschip serve 'a b'"),
        (["vllm"], "hf", "transformers", "certified with: vllm"),
        (["transformers"], "hf", "transformers", "(vllm or an address)"),
        (["model"], "gguf", "model", "(llamacpp or an address)"),
    ],
)
def test_what_serves_is_told_where_a_replay_says_so(engines: list[str], name: str, route: str, words: str) -> None:
    replays = [{"engine": {"name": each}, "verdict": "PASS"} for each in engines]
    document = {"target": {"name": name}, "golden": {"route": route}, "replays": replays}
    (line,) = serving_lines(Certificate(Path("a b") / "certificate.json", document))
    assert words in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["verify", "nowhere"], "there is no directory nowhere"),
        (["nowhere", "--to", "hf"], "there is no directory nowhere"),
        (["--to", "hf", "nowhere"], "there is no directory nowhere"),
        (["make", "nowhere", "--to", "onnx"], "'onnx' is not a target"),
        (["nowhere"], "Missing option"),
        (["certify", ".", "--golden", "nothing"], "there is no golden bundle at nothing"),
        (["certify", "nowhere", "--golden", "."], "there is no directory nowhere"),
        (["certify", ".", "--golden", ".", "--json", "sub/x.json"], "its certificate no longer holds"),
        (["certify", "x", "--golden", ".", "--json", "."], "it is a directory"),
        (["make", "x", "--to", "hf", "--out", "y", "--json", "y/x.json"], "its certificate no longer holds"),
        (["make", "x", "--to", "hf", "--json", "x/handoff/hf/x.json"], "its certificate no longer holds"),
        (["make", "x", "--to", "hf", "--out", "y", "--golden", "y/golden"], "--golden y/golden lies in y"),
        (["make", "x", "--to", "hf", "--out", "y", "--key", "y/sub/../key"], "--key y/sub/../key lies in y"),
        (["make", "x", "--to", "hf", "--out", "y", "--answers", "y/a.json"], "--answers y/a.json lies in y"),
        (["compare", "x", "y", "--json", "."], "the report cannot be written to .: it is a directory"),
        (["verify", ".", "--public-key", "nothing"], "the key nothing cannot be read"),
    ],
)
def test_what_cannot_be_done_ends_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = CliRunner().invoke(app, ["handoff", *arguments])
    assert ended.exit_code == 2
    assert words in ended.output
    assert list(tmp_path.iterdir()) == []
