"""The serving exam at engines that are not ours, in the environments that `make engines` made, with a taught model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from crosschip.chips import find_chip
from crosschip.data import ChatTokenizer
from crosschip.golden.record import RecordPlan, record
from crosschip.golden.training_curve import CurvePlan
from crosschip.model import save_model
from crosschip.rundir import write_json
from tests.engines.other_engines import SIZES, skip_without, started_engine
from tests.qualify.serving.conftest import exam_named, examine, failures, not_covered
from tests.serve.conftest import make_model, teach, tiny_config

pytestmark = [pytest.mark.engines, pytest.mark.slow]

LENGTH = 1100


@pytest.fixture(scope="module")
def model_and_bundle(chat_tokenizer: ChatTokenizer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("others") / "taught"
    torch.set_num_threads(1)
    sizes = {**SIZES, "max_position_embeddings": LENGTH, "eos_token_id": chat_tokenizer.eos_id}
    model = make_model(tiny_config(chat_tokenizer.vocab_size, **sizes), seed=1)
    teach(model, chat_tokenizer)
    save_model(model, directory, torch.float32)
    chat_tokenizer.save(directory)
    write_json(directory / "generation_config.json", {"eos_token_id": [chat_tokenizer.eos_id], "do_sample": False})
    plan = RecordPlan(max_tokens=700, reorderings=1, curve=CurvePlan(num_steps=0))
    record(directory, find_chip("cpu"), directory.parent / "golden", plan=plan)
    return directory, directory.parent / "golden"


@pytest.mark.parametrize("kind", ["vllm", "llamacpp"])
def test_an_engine_that_serves_the_model_rightly_does_not_fail(
    kind: str, model_and_bundle: tuple[Path, Path], tmp_path: Path
) -> None:
    skip_without(kind)
    directory, bundle = model_and_bundle
    with started_engine(kind, directory, tmp_path, LENGTH) as running:
        report = examine(running.url, tmp_path, model=directory, golden=bundle)
    assert failures(report) == []
    assert {exam["ended"] for exam in report["exams"]} == {"complete"}
    golden = exam_named(report, "serving_golden")
    assert golden["num_checks"]["golden log-probs"] > 10
    # llama.cpp scores no prompts: a few last positions may be too few to show that rounding is within the limit.
    assert golden["verdict"] in (("PASS",) if kind == "vllm" else ("PASS", "INCONCLUSIVE"))
    assert all(view["mean_kl"] < 1e-5 for view in golden["measurements"])
    others = {exam["verdict"] for exam in report["exams"] if exam is not golden}
    assert others <= {"PASS", "PASS WITH LIMITS"}
    for name in ("serving_ladder", "serving_batching", "serving_streaming", "serving_stopping", "serving_reasoning"):
        assert sum(exam_named(report, name)["num_checks"].values()) > 0, not_covered(report)


def test_other_weights_than_the_recorded_ones_fail(model_and_bundle: tuple[Path, Path], tmp_path: Path) -> None:
    skip_without("vllm")
    directory, bundle = model_and_bundle
    other = tmp_path / "other"
    other.mkdir()
    for file in directory.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace('"routed_scaling_factor": 1.0', '"routed_scaling_factor": 2.0'))
    assert (other / "config.json").read_text() != config
    with started_engine("vllm", other, tmp_path, LENGTH) as running:
        report = examine(running.url, tmp_path, "determinism", model=other, golden=bundle)
    causes = {finding["details"].get("cause") for finding in failures(report)}
    assert causes == {"config field"}, failures(report)
