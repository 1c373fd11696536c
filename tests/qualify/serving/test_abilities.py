"""Engines that can less, refuse or answer nonsense: what can be checked is checked, the rest is named, no traceback."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from crosschip.errors import QualifyError
from tests.qualify.serving.conftest import exam_named, examine, failures, not_covered
from tests.qualify.serving.faulty_engine import Faults
from tests.serve.conftest import running_server

WITHOUT_SCORES = ("determinism", "ladder", "batching", "prefix_cache", "streaming", "stopping")


def test_without_scores_of_prompts_the_rest_is_examined(proxy: tuple[str, Faults], tmp_path: Path) -> None:
    url, faults = proxy
    faults.refuses_echo = True
    report = examine(url, tmp_path, *WITHOUT_SCORES)
    assert report["findings"] == []
    assert report["verdict"] == "PASS"
    assert "log-probs of prompts: HTTP 400: Only no echo is supported" in not_covered(report)
    assert exam_named(report, "serving_ladder")["num_checks"]["generated as prompt"] > 10


@pytest.mark.parametrize(
    ("planted", "probe", "check"),
    [
        ({"off_in_batches": True}, "batching", "alone against together"),
        ({"off_on_cache_hit": True}, "prefix_cache", "hit against miss"),
        ({"drops_chunk": True}, "streaming", "stream: text"),
        ({"generated_off_beyond_length": 128}, "ladder", "generated as prompt"),
        ({"samples_greedy": True}, "determinism", "run to run"),
        ({"ignores_stop": True}, "stopping", "stop string"),
    ],
)
def test_without_scores_of_prompts_faults_are_still_caught(
    proxy: tuple[str, Faults], tmp_path: Path, planted: dict[str, Any], probe: str, check: str
) -> None:
    url, faults = proxy
    vars(faults).update(planted, refuses_echo=True)
    report = examine(url, tmp_path, probe)
    assert report["verdict"] == "FAIL"
    assert check in {finding["check"] for finding in failures(report)}


def test_without_any_log_probs_texts_are_compared(proxy: tuple[str, Faults], tmp_path: Path) -> None:
    url, faults = proxy
    faults.refuses_logprobs = True
    report = examine(url, tmp_path, "determinism", "streaming", "stopping", "utf8", "reasoning")
    assert failures(report) == []
    assert exam_named(report, "serving_determinism")["num_checks"]["run to run"] > 0
    assert "stop tokens" in not_covered(report)

    faults.drops_chunk = True
    assert "stream: text" in {finding["check"] for finding in failures(examine(url, tmp_path, "streaming"))}


def test_without_any_log_probs_a_changed_text_is_inconclusive(proxy: tuple[str, Faults], tmp_path: Path) -> None:
    """It may be a near tie: nobody can tell."""
    url, faults = proxy
    faults.refuses_logprobs = faults.samples_greedy = True
    report = examine(url, tmp_path, "determinism")
    assert report["verdict"] == "INCONCLUSIVE"
    assert "run to run" in {finding["check"] for finding in report["findings"]}


def test_without_prompts_of_ids_what_needs_them_is_inconclusive(proxy: tuple[str, Faults], tmp_path: Path) -> None:
    url, faults = proxy
    faults.refuses_ids = True
    report = examine(url, tmp_path, "determinism", "ladder", "streaming", "reasoning")
    assert failures(report) == []
    assert report["verdict"] == "INCONCLUSIVE"
    assert exam_named(report, "serving_reasoning")["verdict"] == "PASS"
    assert "prompts of token ids: the engine takes none" in not_covered(report)


def test_without_chats_they_are_named(proxy: tuple[str, Faults], tmp_path: Path) -> None:
    url, faults = proxy
    faults.refuses_chats = True
    report = examine(url, tmp_path, "streaming", "reasoning")
    assert failures(report) == []
    assert "streams of chats: HTTP 400: no chat template" in not_covered(report)
    assert "whether reasoning ends: HTTP 400: no chat template" in not_covered(report)


def test_log_probs_that_are_left_out_are_a_limit(proxy: tuple[str, Faults], tmp_path: Path) -> None:
    """As llama.cpp does with parts of characters: the answers are right, and cannot be judged token by token."""
    url, faults = proxy
    faults.loses_last_score = faults.refuses_echo = True
    report = examine(url, tmp_path, "ladder", "stopping", "batching")
    assert failures(report) == []
    assert "log-probs of all tokens" in {finding["check"] for finding in report["findings"]}
    assert "came with an id and a log-prob" in not_covered(report)
    assert "the engine's own noise" in not_covered(report)

    faults.off_in_batches = True  # beyond any rounding, so that it is caught all the same
    assert "alone against together" in {finding["check"] for finding in failures(examine(url, tmp_path, "batching"))}


def test_a_length_that_is_promised_and_refused_is_a_limit(proxy: tuple[str, Faults], tmp_path: Path) -> None:
    url, faults = proxy
    faults.refuses_beyond_length = 300
    report = examine(url, tmp_path, "ladder")
    found = [finding for finding in report["findings"] if finding["check"] == "length is taken"]
    assert [finding["subject"] for finding in found] == ["prompt of 511 tokens"]
    assert report["verdict"] == "PASS WITH LIMITS"
    assert "prompts of 511 tokens and more" in not_covered(report)


def test_a_very_short_context_ends_in_a_report(taught_model: Path, tmp_path: Path) -> None:
    with running_server(taught_model, max_batch_size=4, max_model_len=12) as server:
        report = examine(server.url, tmp_path)
    assert failures(report) == []
    assert report["verdict"] in ("PASS WITH LIMITS", "INCONCLUSIVE")


@pytest.mark.parametrize("seed", [*range(12), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(12, 100))])
def test_nonsense_ends_in_a_report(proxy: tuple[str, Faults], tmp_path: Path, seed: int) -> None:
    """Something else stands at a random place of every third answer."""
    url, faults = proxy
    faults.nonsense = random.Random(seed)
    try:
        report = examine(url, tmp_path, silence_s=5.0, time_s=20.0, max_answer_tokens=16, max_length=150)
    except QualifyError:  # not even a list of models came, which the message says
        return
    assert report["verdict"] in ("FAIL", "INCONCLUSIVE")
    written = (tmp_path / "report.json").read_text()
    json.loads(written, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_an_engine_without_a_model_is_refused_by_name(tmp_path: Path, proxy: tuple[str, Faults]) -> None:
    with pytest.raises(QualifyError, match="does not list its models"):
        examine(f"{proxy[0]}/nowhere", tmp_path)
