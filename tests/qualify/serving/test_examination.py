"""The serving exam against a real server: clean when it is honest, and each planted fault caught under its own name."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from crosschip.errors import QualifyError
from crosschip.qualify.serving.examination import EngineRequest, examine_engine
from crosschip.report.compare import compare
from crosschip.report.qualification import ReportError
from tests.qualify.serving.conftest import QUESTIONS, check_reproducer, examine, failures
from tests.qualify.serving.faulty_engine import Faults
from tests.serve.conftest import RunningServer, running_server


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_an_honest_server_passes(honest_server: RunningServer, tmp_path: Path, seed: int) -> None:
    report = examine(honest_server.url, tmp_path, seed=seed)
    assert report["findings"] == []
    assert report["verdict"] == "PASS"
    assert {exam["ended"] for exam in report["exams"]} == {"complete"}
    assert report["role"] == "serve"
    assert honest_server.url in report["chip"]
    assert json.loads((tmp_path / "report.json").read_text())["verdict"] == "PASS"


def test_the_proxy_alone_changes_nothing(proxy: tuple[str, Faults], taught_model: Path, tmp_path: Path) -> None:
    report = examine(proxy[0], tmp_path, "ladder", "batching", "streaming", "utf8", model=taught_model)
    assert report["findings"] == []
    measured = [each for exam in report["exams"] for each in exam["measurements"] if each["what"] == "ladder"]
    assert max(each["reference_mean"] for each in measured) < 1e-4  # both compute in fp32


def test_engines_that_serve_a_model_under_other_names_can_be_compared_by_its_directory(
    honest_server: RunningServer, taught_model: Path, tmp_path: Path
) -> None:
    def reports(served_as: str, model: Path | None) -> dict[str, dict[str, Any]]:
        with running_server(taught_model, model_name=served_as, max_batch_size=4) as other:
            urls = honest_server.url, other.url
            return {f"{url}.json": examine(url, tmp_path, "stopping", model=model) for url in urls}

    named = reports("lab/other-name", taught_model)
    assert [each["subject"] for each in named.values()] == [taught_model.name] * 2
    assert [each["fingerprint"]["engine"]["model"] for each in named.values()][1] == "lab/other-name"
    assert compare(named)["subject"] == taught_model.name
    with pytest.raises(ReportError, match="is of the subject 'lab/other-name'"):
        compare(reports("lab/other-name", None))


@pytest.mark.parametrize(
    ("planted", "probe", "check", "subject"),
    [
        ({"prefix_off_in_long": 511}, "ladder", "common prefix", "prompt of 512 tokens"),
        ({"prefix_off_in_long": 1024}, "ladder", "common prefix", "prompt of 1025 tokens"),
        ({"generated_off_beyond_length": 128}, "ladder", "generated as prompt", "prompt of 129 tokens"),
        ({"off_in_batches": True}, "batching", "alone against together", "prompt of "),
        ({"cuts_in_batches": True}, "batching", "alone against together", "prompt of "),
        ({"empties_in_batches": True}, "batching", "alone against together", "prompt of "),
        ({"cuts_on_cache_hit": True}, "prefix_cache", "hit against miss", "cached prompt of 15 tokens"),
        ({"off_on_cache_hit": True}, "prefix_cache", "hit against miss", "cached prompt of 15 tokens"),
        ({"samples_greedy": True}, "determinism", "run to run", "greedy answer after "),
        ({"drops_chunk": True}, "streaming", "stream: text", "stream "),
        ({"wrong_finish_reason": True}, "streaming", "stream: finish reason", "stream after 8 tokens"),
        ({"no_done": True}, "streaming", "stream: end", "stream after 8 tokens"),
        ({"ignores_stop": True}, "stopping", "stop string", "stop string "),
        ({"ignores_stop_tokens": True}, "stopping", "stop token", "stop token "),
        ({"bans_a_token": True}, "determinism", "greedy is most likely", "greedy answer after "),
        ({"loses_last_score": True}, "ladder", "number of scores", "prompt of "),
        ({"one_token_less": True}, "stopping", "max_tokens", "max_tokens "),
        ({"changes_echo": True}, "utf8", "echo", "echo of "),
        ({"suppresses_end": True}, "reasoning", "generation health", "reasoning"),
        ({"splits_characters": True}, "utf8", "split character", ""),
    ],
)
def test_a_planted_fault_is_named_and_reproduced(
    proxy: tuple[str, Faults], tmp_path: Path, planted: dict[str, Any], probe: str, check: str, subject: str
) -> None:
    url, faults = proxy
    vars(faults).update(planted)
    report = examine(url, tmp_path, probe)
    assert report["verdict"] == "FAIL"
    found = [finding for finding in failures(report) if finding["check"] == check]
    assert found, failures(report)
    assert found[0]["kind"] == "serving"
    assert any(finding["subject"].startswith(subject) for finding in found), found
    names = [finding["reproducer"] for finding in found if finding["reproducer"]]
    check_reproducer(names[0], url, faults)


def test_a_stream_with_the_log_probs_of_fewer_tokens_is_a_limit(proxy: tuple[str, Faults], tmp_path: Path) -> None:
    """As llama.cpp's, which has none for the ends of reasoning."""
    url, faults = proxy
    faults.leaves_out_a_streamed_score = True
    report = examine(url, tmp_path, "streaming")
    assert report["verdict"] == "PASS WITH LIMITS"
    assert {finding["check"] for finding in report["findings"]} == {"stream: log-probs left out"}


def test_scores_wrong_beyond_a_position_are_named_by_it(
    proxy: tuple[str, Faults], tmp_path: Path, taught_model: Path
) -> None:
    """The same in every request, so that only the model itself can tell."""
    url, faults = proxy
    faults.scores_off_beyond_length = 300
    report = examine(url, tmp_path, "ladder", model=taught_model)
    found = [finding for finding in failures(report) if finding["check"] == "reference"]
    assert {finding["details"]["first_position"] for finding in found} == {300}
    assert {finding["subject"] for finding in found} >= {"prompt of 511 tokens", "prompt of 1024 tokens"}
    check_reproducer(next(finding["reproducer"] for finding in found if finding["reproducer"]), url, faults)


@pytest.mark.parametrize(
    ("planted", "check"),
    [
        ({"truncates_json": True}, "garbage"),
        ({"hangs": True}, "time-out"),
        ({"trickles": True}, "time-out"),
        ({"cuts_off": True}, "cut off"),
        ({"server_error": True}, "status"),
    ],
)
def test_answers_that_are_none_become_findings(
    proxy: tuple[str, Faults], tmp_path: Path, planted: dict[str, Any], check: str
) -> None:
    url, faults = proxy
    vars(faults).update(planted, only_beyond_length=600)
    report = examine(url, tmp_path, "ladder", silence_s=2.0, total_s=3.0)
    assert report["verdict"] == "FAIL"
    assert report["complete"]
    found = failures(report)
    assert {finding["check"] for finding in found} == {check}
    assert found[0]["subject"] == "prompt of 1024 tokens"
    assert found[0]["reproducer"]
    ladder = next(exam for exam in report["exams"] if exam["exam"] == "serving_ladder")
    assert sum(each["what"] == "ladder" for each in ladder["measurements"]) == 10  # those up to 513 tokens were judged


def test_nobody_there_is_inconclusive(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    report = examine(url, tmp_path)
    assert report["verdict"] == "INCONCLUSIVE"
    assert "nobody" in report["findings"][0]["message"] or "unreachable" in report["findings"][0]["message"]


def test_something_that_is_no_engine_is_refused(tmp_path: Path, proxy: tuple[str, Faults]) -> None:
    with pytest.raises(QualifyError, match="not an address"):
        examine("somewhere", tmp_path)
    with pytest.raises(QualifyError, match="no serving probe"):
        examine(proxy[0], tmp_path, "taste")


def test_an_engine_that_dies_in_the_middle_leaves_a_report(taught_model: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    with running_server(taught_model, max_batch_size=4) as server:

        def tell(line: str) -> None:
            lines.append(line)
            if line.startswith("serving_ladder"):
                server.process.kill()

        request = EngineRequest(server.url, tmp_path / "report.json", questions=QUESTIONS, silence_s=5.0)
        report = examine_engine(request, tell)
    assert report["verdict"] == "FAIL"
    assert any(finding["check"] in ("unreachable", "cut off") for finding in failures(report))
    assert not any(line.startswith("serving_reasoning") for line in lines)


def test_too_little_time_says_what_is_missing(honest_server: RunningServer, tmp_path: Path) -> None:
    report = examine(honest_server.url, tmp_path, "ladder", time_s=0.05)
    ladder = next(exam for exam in report["exams"] if exam["exam"] == "serving_ladder")
    assert ladder["verdict"] == "INCONCLUSIVE"
    assert any("tokens and more" in line for line in ladder["not_covered"])


def test_a_killed_exam_leaves_a_whole_report(honest_server: RunningServer, tmp_path: Path) -> None:
    """Killed as soon as a report is there, again and again: each is whole and says that it is not complete."""
    report = tmp_path / "report.json"
    program = (
        "import pathlib; from crosschip.qualify.serving.examination import EngineRequest, examine_engine\n"
        f"probes = tuple(f'serving_{{name}}' for name in ('stopping', 'determinism', 'streaming', 'batching'))\n"
        f"examine_engine(EngineRequest({honest_server.url!r}, pathlib.Path({str(report)!r}), probes=probes))\n"
    )
    for written in range(3):
        report.unlink(missing_ok=True)
        exam = subprocess.Popen([sys.executable, "-c", program])
        seen = 0
        while seen <= written and exam.poll() is None:
            before = report.stat().st_mtime_ns if report.exists() else None
            while exam.poll() is None and (not report.exists() or report.stat().st_mtime_ns == before):
                time.sleep(0.002)
            seen += 1
        exam.kill()
        exam.wait()
        document = json.loads(report.read_text())
        assert not document["complete"]
        assert document["verdict"] == "INCONCLUSIVE"
        assert len(document["exams"]) >= 2 + written
