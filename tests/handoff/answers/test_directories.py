"""Model directories as sides: served by crosschip itself, one after the other, and ended again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from crosschip.data import train_tokenizer
from crosschip.engines import EngineCommand
from crosschip.errors import HandoffError
from crosschip.handoff.answers import Side, answers_lines, compare_answers
from crosschip.model import ModelConfig, save_model
from tests.model.configs import random_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: nothing is right, and all of it is said."""
    directory = tmp_path_factory.mktemp("models") / "random"
    tokenizer = train_tokenizer(["What is 12 + 7?", "1 + 2 = 3 so the answer is 3."] * 20, 300)
    config = ModelConfig(
        vocab_size=384,
        hidden_size=32,
        num_hidden_layers=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )
    save_model(random_model(config, seed=3), directory, torch.float32)
    tokenizer.save(directory)
    return directory


def test_a_directory_against_itself_gives_the_same_answers_and_no_power(directory: Path) -> None:
    report = compare_answers(
        str(directory),
        str(directory),
        num_problems=12,
        samples=1,
        tasks="answers,length",
        max_tokens=24,
        chip="cpu",
    )
    assert report.verdict == "INCONCLUSIVE"  # nothing is right on either side
    assert report.problems == []
    assert "0 %" in report.not_covered[0]
    length = next(each for each in report.tasks if each.task == "length")
    assert (length.num_pairs, length.difference) == (24, 0.0)  # greedy and sampled: the same seeds, the same answers
    assert report.a["health"] == report.b["health"]
    assert report.a["health"]["num_replies"] == 24
    assert any("no power" in line for line in answers_lines(report.document()))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"config.json": {"model_type": "llama"}, "model.safetensors": None}, "does not load .*llama"),
        ({"config.json": {"model_type": "deepseek_v3"}, "model.gguf": None}, "holds a GGUF file"),
        ({"config.json": {"model_type": "deepseek_v3"}}, "holds no weights"),
        ({"config.json": [], "model.safetensors": None}, "does not load"),
    ],
)
def test_what_cannot_be_served_here_is_refused_before_the_other_side_is_asked(
    directory: Path, tmp_path: Path, files: dict[str, Any], words: str
) -> None:
    for name, document in files.items():
        (tmp_path / name).write_text(json.dumps(document))
    for sides in ((directory, tmp_path), (tmp_path, directory)):
        with pytest.raises(HandoffError, match=words):
            compare_answers(*map(str, sides), num_problems=2, tasks="answers")


def test_a_directory_that_no_engine_loads_is_told_with_its_last_words(directory: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    failing = EngineCommand(("python3", "-c", "import sys; sys.exit('no such architecture')", "{model}", "{port}"))
    report = compare_answers(
        Side(str(broken), command=failing), Side(str(directory)), num_problems=10, tasks="answers", max_tokens=8
    )
    assert report.verdict == "INCONCLUSIVE"
    assert "the engine ended with exit code 1 before it answered: no such architecture" in report.problems[0]
    assert report.b["num_asked"] == 10
