"""`crosschip handoff` in a process of its own: what it prints, what it leaves, and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from crosschip.cli import app
from crosschip.model import save_model
from tests.golden.conftest import CONFIG
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
    assert f"serve it with: crosschip serve {out}" in made.stdout
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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["verify", "nowhere"], "there is no directory nowhere"),
        (["nowhere", "--to", "hf"], "there is no directory nowhere"),
        (["--to", "hf", "nowhere"], "there is no directory nowhere"),
        (["make", "nowhere", "--to", "onnx"], "'onnx' is not a target"),
        (["nowhere"], "Missing option"),
        (["certify", "nowhere", "--golden", "nothing"], "there is no golden bundle at nothing"),
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
