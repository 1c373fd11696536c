"""A real server over a taught tiny model, in a process of its own, once for this directory."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from crosschip.data import ChatTokenizer, train_tokenizer
from crosschip.model import save_model
from crosschip.qualify.serving.examination import PROBES, EngineRequest, examine_engine
from crosschip.rundir import write_json
from tests.qualify.serving.faulty_engine import Faults, faulty_engine
from tests.serve.conftest import CONVERSATIONS, TEXTS, RunningServer, make_model, running_server, teach, tiny_config

QUESTIONS = tuple(question for question, _, _ in CONVERSATIONS)


@pytest.fixture(scope="package")
def chat_tokenizer() -> ChatTokenizer:
    spoken = [text for turns in CONVERSATIONS for text in turns if text]
    return train_tokenizer((TEXTS + spoken) * 4, 400)


@pytest.fixture(scope="package")
def taught_model(tmp_path_factory: pytest.TempPathFactory, chat_tokenizer: ChatTokenizer) -> Path:
    """Knows three conversations by heart; its longest prompt makes the ladder short."""
    directory = tmp_path_factory.mktemp("serving") / "taught-tiny"
    torch.set_num_threads(1)
    config = tiny_config(
        chat_tokenizer.vocab_size, eos_token_id=chat_tokenizer.eos_id, hidden_size=96, max_position_embeddings=1100
    )
    model = make_model(config, seed=1)
    teach(model, chat_tokenizer)
    save_model(model, directory, torch.float32)
    chat_tokenizer.save(directory)
    write_json(directory / "generation_config.json", {"eos_token_id": [chat_tokenizer.eos_id], "do_sample": False})
    return directory


@pytest.fixture(scope="package")
def honest_server(taught_model: Path) -> Iterator[RunningServer]:
    with running_server(taught_model, max_batch_size=16) as server:
        yield server


@pytest.fixture
def proxy(honest_server: RunningServer) -> Iterator[tuple[str, Faults]]:
    """The address of a proxy before the honest server, and the faults that it plants."""
    with faulty_engine(honest_server.url) as running:
        yield running


def examine(url: str, directory: Path, *probes: str, **more: Any) -> dict[str, Any]:
    names = tuple(f"serving_{probe}" for probe in probes) or tuple(PROBES)
    # Much more time than it takes: what is not reached on a busy machine would make the exam inconclusive.
    settings: dict[str, Any] = {"questions": QUESTIONS, "max_answer_tokens": 256, "time_s": 1200.0} | more
    return examine_engine(EngineRequest(url, directory / "report.json", probes=names, **settings))


def failures(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [finding for finding in report["findings"] if finding["verdict"] == "FAIL"]


def exam_named(report: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(exam for exam in report["exams"] if exam["exam"] == name)
    return found


def not_covered(report: dict[str, Any]) -> str:
    return "\n".join(line for exam in report["exams"] for line in exam["not_covered"])


def check_reproducer(path: str, url: str, faults: Faults) -> None:
    """The file needs the standard library only, fails at the faulty engine and passes when the fault is gone."""
    for node in ast.walk(ast.parse(Path(path).read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
            assert all(name.split(".")[0] in sys.stdlib_module_names for name in names), names
    command = [sys.executable, "-I", path, "--url", url]
    broken = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert broken.returncode == 1, broken.stdout + broken.stderr
    assert "expected:" in broken.stdout
    assert "got:" in broken.stdout
    vars(faults).update(vars(Faults()))
    mended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert mended.returncode == 0, mended.stdout + mended.stderr
