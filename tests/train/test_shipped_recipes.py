"""A few steps of the shipped recipes on the text they are meant for."""

import itertools
import json
import os
from pathlib import Path

import pytest

from crosschip.recipe import load_recipe
from crosschip.rundir import RunDirectory
from crosschip.train import evaluate_recipe, train_recipe
from crosschip.train.progress import LineProgress

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("CROSSCHIP_TEST_DATA", ROOT.parent / "shared/data"))
FEW_STEPS = ("steps=3", "warmup_steps=1", "batch_size=4", "validation_sequences=4", "dtype=float32")


def few_steps(*stages: str) -> list[str]:
    return [f"{stage}.{setting}" for stage in stages for setting in FEW_STEPS]


def beginning_of(name: str, num_lines: int, directory: Path) -> Path:
    """The first lines of a shared file, as a file of their own: enough for a few steps."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not there; put the data there or set CROSSCHIP_TEST_DATA")
    with path.open(encoding="utf-8") as file:
        beginning = directory / path.name
        beginning.write_text("".join(itertools.islice(file, num_lines)), encoding="utf-8")
    return beginning


def losses(run: RunDirectory, stage: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (run.stage(stage) / "metrics.jsonl").read_text().splitlines()]


def test_shakespeare(tmp_path) -> None:
    path = beginning_of("text/tinyshakespeare.txt", 8_000, tmp_path)
    recipe = load_recipe(ROOT / "recipes/shakespeare.toml", [f"data.path={path}", *few_steps("train")])
    run = RunDirectory(tmp_path / "run")
    outcome = train_recipe(recipe, run, progress=LineProgress(None))
    assert outcome.stages[-1].step == 3
    assert 5.5 < losses(run, "pretrain")[0] < 8.0  # ln 1024 = 6.9
    assert (run.stage("pretrain") / "samples.jsonl").stat().st_size > 0


def test_gsm8k(tmp_path) -> None:
    path = beginning_of("gsm8k/train.jsonl", 800, tmp_path)
    overrides = [
        f"data.path={path}",
        *few_steps("train", "sft"),
        "evaluate.num_problems=2",
        "evaluate.max_new_tokens=8",
    ]
    recipe = load_recipe(ROOT / "recipes/gsm8k.toml", overrides)
    run = RunDirectory(tmp_path / "run")
    outcome = train_recipe(recipe, run, progress=LineProgress(None))
    assert [(end.stage, end.step) for end in outcome.stages] == [("pretrain", 3), ("sft", 3)]
    assert losses(run, "sft")[-1] < losses(run, "pretrain")[0]
    document = evaluate_recipe(recipe, run, LineProgress(None))
    assert document["num_problems"] == 2
    assert all(problem["expected"].replace(",", "").lstrip("-").isdigit() for problem in document["problems"])
