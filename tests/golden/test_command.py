"""`crosschip golden` in a process of its own: what it prints, what it writes, and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from crosschip.data import train_tokenizer
from crosschip.golden.bundle import load_bundle
from crosschip.model import save_model
from tests.golden.conftest import CONFIG
from tests.model.configs import random_model
from tests.serve.conftest import TEXTS

ROOT = Path(__file__).parent.parent.parent


def golden(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "crosschip", "golden", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_texts_are_recorded_with_the_models_tokenizer_and_replayed(model_dir: Path, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS * 4, 300)
    save_model(random_model(CONFIG.__class__(**{**vars(CONFIG), "vocab_size": tokenizer.vocab_size})), tmp_path / "m")
    tokenizer.save(tmp_path / "m")
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(TEXTS), encoding="utf-8")
    recorded = golden("record", tmp_path / "m", "--chip", "cpu", "--out", tmp_path / "b", "--texts", texts)
    assert recorded.returncode == 0, recorded.stderr
    assert "the chip's own noise: mean KL" in recorded.stdout
    assert [row["origin"] for row in load_bundle(tmp_path / "b").manifest["rows"]].count("text") == len(TEXTS)
    replayed = golden("replay", tmp_path / "b", "--model", tmp_path / "m", "--chip", "sim")
    assert replayed.returncode == 0, replayed.stderr
    assert replayed.stdout.startswith("PASS: sim, float32, target fp32 to fp32\n")


def test_a_failure_ends_with_1_names_the_cause_and_writes_the_numbers(
    bundle_dir: Path, model_dir: Path, tmp_path: Path
) -> None:
    file = tmp_path / "replay.json"
    ended = golden("replay", bundle_dir, "--model", model_dir, "--chip", "sim:N2", "--json", file)
    assert ended.returncode == 1
    assert "cause: operator (layers.0.self_attn)" in ended.stdout
    document = json.loads(file.read_text())
    assert (document["verdict"], document["cause"]) == ("FAIL", "operator")
    assert document["comparison"]["views"][0]["points"][0]["point"] == "embed_tokens"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["replay", "{bundle}", "--model", "{model}", "--json", "{bundle}"], "it is a directory"),
        (["replay", "{bundle}"], "neither --model nor --url is given"),
        (["replay", "nothing", "--model", "{model}"], "there is no golden bundle at nothing"),
        (["replay", "{bundle}", "--model", "nothing"], "nothing has no config.json"),
        (["replay", "{bundle}", "--url", "http://127.0.0.1:9"], "no model is listed"),
        (["record", "{model}", "--chip", "cpu"], "--out is missing"),
        (["record", "{model}", "--chip", "cpu", "--out", "{bundle}/x", "--texts", "none.txt"], "cannot be read"),
        (["record", "{bundle}", "--chip", "cpu"], "neither a model directory"),
    ],
)
def test_what_cannot_be_done_ends_with_2(bundle_dir: Path, model_dir: Path, arguments: list[str], words: str) -> None:
    ended = golden(*(each.format(bundle=bundle_dir, model=model_dir) for each in arguments))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert words in ended.stderr
    assert "what to do: " in ended.stderr
