"""An engine against a golden bundle: clean when it serves what was recorded; else the finding says who is to blame."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from crosschip.chips import find_chip
from crosschip.errors import GoldenError
from crosschip.golden import engine_replay
from crosschip.golden.bundle import load_bundle
from crosschip.golden.record import RecordPlan, record
from crosschip.golden.training_curve import CurvePlan
from crosschip.model import init_weights, load_model, save_model
from crosschip.qualify.finding import ExamRecord
from crosschip.qualify.serving.client import EngineClient
from crosschip.qualify.serving.golden_bundle import open_replay
from crosschip.qualify.serving.identity import identify_engine
from crosschip.qualify.serving.judge import Noise, limits_from
from crosschip.qualify.serving.prompts import make_prompts
from crosschip.qualify.serving.sitting import Sitting
from crosschip.rundir import read_json, write_json
from tests.qualify.serving.conftest import check_reproducer, exam_named, examine, failures, not_covered
from tests.qualify.serving.faulty_engine import Faults
from tests.serve.conftest import RunningServer, running_server


@pytest.fixture(scope="module")
def bundle(taught_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("golden") / "bundle"
    plan = RecordPlan(max_tokens=700, reorderings=1, curve=CurvePlan(num_steps=0))
    record(taught_model, find_chip("cpu"), out, plan=plan)
    return out


def golden_findings(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [finding for finding in failures(report) if finding["exam"] == "serving_golden"]


def test_the_recorded_model_passes(
    honest_server: RunningServer, bundle: Path, taught_model: Path, tmp_path: Path
) -> None:
    report = examine(honest_server.url, tmp_path, "determinism", golden=bundle, model=taught_model)
    assert report["findings"] == []
    exam = exam_named(report, "serving_golden")
    assert exam["verdict"] == "PASS"
    assert [view["view"] for view in exam["measurements"]] == ["one by one", "8 at once"]
    assert sum(view["positions"] for view in exam["measurements"]) == exam["num_checks"]["golden log-probs"]
    assert all(view["positions"] > 500 for view in exam["measurements"])
    assert all(view["mean_kl"] < 1e-6 for view in exam["measurements"])


def test_without_scores_of_prompts_the_last_positions_are_compared(
    proxy: tuple[str, Faults], bundle: Path, taught_model: Path, tmp_path: Path
) -> None:
    url, faults = proxy
    faults.refuses_echo = True
    report = examine(url, tmp_path, "determinism", golden=bundle, model=taught_model)
    assert failures(report) == []
    assert exam_named(report, "serving_golden")["num_checks"]["golden log-probs"] > 10
    assert "all but the last position of each golden row" in not_covered(report)


def test_an_engine_that_is_off_is_to_blame(
    proxy: tuple[str, Faults], bundle: Path, taught_model: Path, tmp_path: Path
) -> None:
    url, faults = proxy
    faults.scores_off_beyond_length = 40
    report = examine(url, tmp_path, "determinism", golden=bundle, model=taught_model)
    found = golden_findings(report)
    assert found
    assert {finding["details"]["cause"] for finding in found} <= {"length", "engine"}
    assert any("the engine is to blame" in finding["message"] for finding in found)
    check_reproducer(next(finding["reproducer"] for finding in found if finding["reproducer"]), url, faults)


def test_an_engine_that_scores_no_prompts_and_is_off_is_caught_at_the_last_positions(
    proxy: tuple[str, Faults], bundle: Path, taught_model: Path, tmp_path: Path
) -> None:
    url, faults = proxy
    faults.refuses_echo, faults.generated_off_beyond_length = True, 1
    report = examine(url, tmp_path, "determinism", golden=bundle, model=taught_model)
    assert "mean KL, last positions" in {finding["check"] for finding in golden_findings(report)}


def test_an_engine_that_breaks_off_in_the_replay_is_a_finding(
    proxy: tuple[str, Faults], bundle: Path, tmp_path: Path
) -> None:
    url, faults = proxy
    faults.server_error, faults.only_beyond_length = True, 100
    report = examine(url, tmp_path, "determinism", golden=bundle)
    assert "golden replay runs" in {finding["check"] for finding in golden_findings(report)}
    assert "were not given" in not_covered(report)


def _copy(model: Path, directory: Path) -> Path:
    shutil.copytree(model, directory)
    return directory


def test_a_changed_field_of_the_files_is_named(bundle: Path, taught_model: Path, tmp_path: Path) -> None:
    changed = _copy(taught_model, tmp_path / "model")
    config = read_json(changed / "config.json")
    write_json(changed / "config.json", config | {"rms_norm_eps": 1e-3})
    with running_server(changed, max_batch_size=4) as server:
        report = examine(server.url, tmp_path, "determinism", golden=bundle, model=changed)
    found = golden_findings(report)
    assert {finding["details"]["cause"] for finding in found} == {"config field"}
    assert any("rms_norm_eps" in finding["message"] for finding in found)


def test_a_changed_tensor_of_the_files_is_named(bundle: Path, taught_model: Path, tmp_path: Path) -> None:
    """Rows permuted, as a converter did that restacked them wrongly."""
    changed = _copy(taught_model, tmp_path / "model")
    model = load_model(changed, dtype=torch.float32)
    weight = model.layers[1].self_attn.o_proj.weight
    with torch.no_grad():
        weight.copy_(weight.roll(1, 0))
    save_model(model, changed, torch.float32)
    with running_server(changed, max_batch_size=4) as server:
        report = examine(server.url, tmp_path, "determinism", golden=bundle, model=changed)
    found = golden_findings(report)
    assert {finding["details"]["cause"] for finding in found} == {"conversion"}
    assert any("layers.1.self_attn.o_proj.weight" in finding["message"] for finding in found)
    assert any(finding["check"] == "mean KL, one by one" for finding in found)  # and the engine's answers show it


def test_a_bundle_of_other_weights_or_an_altered_one_is_refused_before_anything_is_asked(
    bundle: Path, taught_model: Path, tmp_path: Path
) -> None:
    nowhere = "http://127.0.0.1:9"
    other = load_model(taught_model, dtype=torch.float32)
    init_weights(other, seed=9)
    save_model(other, tmp_path / "other", torch.float32)
    with pytest.raises(GoldenError, match="made for other weights"):
        examine(nowhere, tmp_path, golden=bundle, model=tmp_path / "other")
    altered = tmp_path / "altered"
    shutil.copytree(bundle, altered)
    file = altered / "golden.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(GoldenError, match="cut or altered"):
        examine(nowhere, tmp_path, golden=altered, model=taught_model)
    assert not (tmp_path / "report.json").exists()


def sitting_of(url: str, directory: Path, left_s: float) -> Sitting:
    """A sitting with the engine at `url` that ends in so many seconds."""
    client = EngineClient(url, total_s=60.0)
    until = time.monotonic() + left_s
    client.deadline = until + 1.0
    identity, noise = identify_engine(client), limits_from(Noise(0.0, 0.0, 0))
    prompts = make_prompts(client, identity, 0)
    return Sitting(client, identity, prompts, "smoke", directory, noise, ExamRecord("serving_golden"), until)


def test_an_engine_that_trickles_does_not_outlast_the_exam(
    proxy: tuple[str, Faults], bundle: Path, tmp_path: Path
) -> None:
    """Each byte comes within any limit of silence; an answer of some 10 kB would take half an hour."""
    url, faults = proxy
    sitting = sitting_of(url, tmp_path, 5.0)
    faults.trickles = True
    began = time.monotonic()
    open_replay(bundle, None).examine(sitting)
    assert time.monotonic() - began < 30
    document = sitting.record.document()
    assert document["verdict"] == "INCONCLUSIVE"
    rows = document["coverage"]["rows of the golden bundle"]
    assert (rows["made"], rows["planned"]) == (0, len(load_bundle(bundle).lengths))
    assert "for lack of time" in document["not_covered"][0]


def test_the_weights_are_hashed_once(
    honest_server: RunningServer, bundle: Path, taught_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay = open_replay(bundle, taught_model)
    monkeypatch.setattr(engine_replay, "check_files", lambda *_: pytest.fail("the files were compared again"))
    sitting = sitting_of(honest_server.url, tmp_path, 600.0)
    replay.examine(sitting)
    assert (sitting.record.verdict, sitting.record.ended) == ("PASS", "complete")
    rows = sitting.record.coverage["rows of the golden bundle"]
    assert rows.made == rows.planned == len(replay.bundle.lengths)
