"""A real server on the simulated chip: the serving exam names the chip's fault, and none on an honest one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from crosschip.data import ChatTokenizer
from tests.qualify.serving.conftest import examine, failures
from tests.serve.conftest import logged_process

pytestmark = pytest.mark.slow  # a call on the simulated chip takes several times as long

MOST = 300  # tokens, which keeps the ladder short


@contextmanager
def served_on(chip: str, directory: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "crosschip", "serve", str(directory), "--port", "0", "--chip", chip]
    with logged_process([*command, "--max-model-len", str(MOST)], r"chat: (http://\S+)") as server:
        yield server.url


def test_an_honest_chip_passes(taught_model: Path, tmp_path: Path) -> None:
    with served_on("sim", taught_model) as url:
        report = examine(url, tmp_path, "determinism", "ladder", "reasoning", model=taught_model)
    assert report["findings"] == []
    assert report["verdict"] == "PASS"


def test_output_that_is_corrupt_beyond_a_position_is_named_by_the_ladder(taught_model: Path, tmp_path: Path) -> None:
    """V2. Every request is corrupt in the same way, so that only the model itself can tell."""
    with served_on("sim:V2,limit=100", taught_model) as url:
        report = examine(url, tmp_path, "ladder", model=taught_model)
    found = [finding for finding in failures(report) if finding["check"] == "reference"]
    assert found
    assert min(finding["details"]["first_position"] for finding in found) > 100
    assert {int(finding["subject"].split()[2]) for finding in found} >= {127, 128, 129}


def test_a_suppressed_stop_token_is_named_by_generation_health(
    taught_model: Path, chat_tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    """V3."""
    with served_on(f"sim:V3,token={chat_tokenizer.eos_id}", taught_model) as url:
        report = examine(url, tmp_path, "reasoning")
    (found,) = failures(report)
    assert (found["exam"], found["check"]) == ("serving_reasoning", "generation health")
    assert "stop token" in found["message"]


def test_answers_that_differ_from_run_to_run_are_named_by_determinism(taught_model: Path, tmp_path: Path) -> None:
    """V13."""
    with served_on("sim:V13,scale=0.3", taught_model) as url:
        report = examine(url, tmp_path, "determinism")
    assert "run to run" in {finding["check"] for finding in failures(report)}
