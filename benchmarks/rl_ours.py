"""Our side of the benchmarks of reinforcement learning: a stage of `crosschip train` from a fine-tuned model."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from crosschip.handoff.export import export_model
from crosschip.handoff.source import last_checkpoint, open_source
from crosschip.handoff.targets import TARGETS
from crosschip.rundir import write_text

__all__ = ["add_options", "read_lines", "start_model", "train"]

RECIPES = Path(__file__).parent.parent / "recipes"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What both benchmarks begin with."""
    parser.add_argument(
        "--run", type=Path, required=True, help="a run of recipes/first.toml; its stage sft is the start"
    )
    parser.add_argument("--problems", type=int, default=200, help="held-out problems of a score")
    parser.add_argument("--seed", type=int, default=1)


def start_model(run: Path, place: Path) -> Path:
    """The model that the run's fine-tuning ended with, as a Hugging Face directory in fp32."""
    return export_model(open_source(last_checkpoint(run, "sft")), TARGETS["hf"], place / "start", "float32")


def train(recipe: Path, model: Path, run: Path, settings: Iterable[str]) -> list[dict[str, Any]]:
    """Train as `run` what a shipped recipe has from `[rl]` on, with more settings as `--set` takes them.

    One record a step, with `seconds` since the beginning, and the `score` where it was looked at.
    """
    text = recipe.read_text(encoding="utf-8")
    from_rl_on = text[text.index("\n[rl]") :]
    head = f'name = "rl"\n[model]\ndirectory = "{model.absolute()}"\n[data]\nsource = "arithmetic"\nlevels = [2]\n'
    path = run.with_suffix(".toml")
    write_text(path, head + from_rl_on)
    given = [part for setting in settings for part in ("--set", setting)]
    subprocess.run([sys.executable, "-m", "crosschip", "train", str(path), "--out", str(run), *given], check=True)
    stage = run / "train" / "rl"
    scores = {record["step"]: record["score"] for record in read_lines(stage / "validation.jsonl")}
    records, seconds = [], 0.0
    for record in read_lines(stage / "metrics.jsonl"):
        seconds += record["seconds"]
        scored = {"score": scores[record["step"]]} if record["step"] in scores else {}
        records.append(record | {"seconds": seconds} | scored)
    return records


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one on each line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
