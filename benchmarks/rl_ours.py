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


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is learned, and how; as in `recipes/first.toml`."""
    parser.add_argument(
        "--run", type=Path, required=True, help="a run of recipes/first.toml; its stage sft is the start"
    )
    parser.add_argument("--level", type=int, default=2)
    parser.add_argument("--steps", type=int, default=26)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--learning-rate", type=float, default=1.5e-4)
    parser.add_argument("--every", type=int, default=4, help="steps between two scores")
    parser.add_argument("--problems", type=int, default=200, help="held-out problems of a score")
    parser.add_argument("--seed", type=int, default=1)


def start_model(run: Path, place: Path) -> Path:
    """The model that the run's fine-tuning ended with, as a Hugging Face directory in fp32."""
    return export_model(open_source(last_checkpoint(run, "sft")), TARGETS["hf"], place / "start", "float32")


def train(options: argparse.Namespace, model: Path, run: Path, extra: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Train as `run`, with more settings as `--set` takes them; one record a step, with `seconds` since the beginning,
    and the `score` where it was looked at."""
    recipe = f"""
name = "rl"
seed = {options.seed}
[model]
directory = "{model.absolute()}"
[data]
source = "arithmetic"
levels = [{options.level}]
num_problems = 8000
[rl]
steps = {options.steps}
prompts = {options.prompts}
samples = {options.samples}
seq_len = {options.max_new_tokens + 64}
max_new_tokens = {options.max_new_tokens}
temperature = {options.temperature}
learning_rate = {options.learning_rate}
schedule = "wsd"
warmup_steps = 2
decay_share = 0.0
validate_every = {options.every}
validation_sequences = {options.problems}
checkpoint_every = 1000
sample_every = 1000
[rl.rollouts]
dtype = "float32"
max_batch_size = 128
[evaluate]
num_problems = {options.problems}
level = {options.level}
max_new_tokens = {options.max_new_tokens}
"""
    path = run.with_suffix(".toml")
    write_text(path, recipe)
    settings = [part for setting in extra for part in ("--set", setting)]
    subprocess.run([sys.executable, "-m", "crosschip", "train", str(path), "--out", str(run), *settings], check=True)
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
