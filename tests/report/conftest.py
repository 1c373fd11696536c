"""Documents of a run as the other rooms write them, made by hand so that the page is tested without training."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from crosschip.recipe import parse_recipe
from crosschip.rundir import RunDirectory, write_json

RECIPE: dict[str, Any] = {
    "name": "first",
    "data": {"source": "arithmetic", "levels": [1, 2]},
    "train": {"steps": 600, "batch_size": 32, "validate_every": 100, "sample_every": 100},
    "sft": {"steps": 200, "batch_size": 32, "warmup_steps": 5, "validate_every": 50, "sample_every": 100},
    "evaluate": {"num_problems": 200},
}


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def metric_rows(steps: int, start: float, floor: float, seed: int) -> list[dict[str, Any]]:
    noise = random.Random(seed)
    rows = []
    for step in range(1, steps + 1):
        warmth = min(1.0, step / 20)
        rows.append(
            {
                "step": step,
                "loss": floor + (start - floor) * math.exp(-5 * step / steps) + noise.gauss(0, 0.03),
                "gradient_norm": math.exp(noise.gauss(-0.7, 0.3)) * (9 if step == steps // 2 else 1),
                "tokens": 8192,
                "seconds": 0.38,
                "learning_rate": 1e-3 * warmth * (0.55 + 0.45 * math.cos(math.pi * step / steps)),
                "tokens_per_s": 21500 + noise.gauss(0, 300),
                "mtp_loss": floor + 0.2 + (start - floor) * math.exp(-4 * step / steps) + noise.gauss(0, 0.03),
                "router_imbalance": 1.1 + math.exp(-6 * step / steps) + abs(noise.gauss(0, 0.02)),
            }
        )
    return rows


def write_stage(run: RunDirectory, stage: str, steps: int, start: float, floor: float) -> None:
    directory = run.stage(stage)
    rows = metric_rows(steps, start, floor, seed=len(stage))
    write_lines(directory / "metrics.jsonl", rows)
    every = max(1, steps // 6)
    validated = [
        {"step": row["step"], "validation_loss": row["loss"] + 0.05, "bits_per_byte": row["loss"] * 0.45}
        for row in rows[every - 1 :: every]
    ]
    write_lines(directory / "validation.jsonl", validated)
    answer = "<think>47 + 38: 7 + 8 = 15, write 5, carry 1; 4 + 3 + 1 = 8.</think>85"
    samples = [
        {
            "step": row["step"],
            "prompt": "What is 47 + 38?",
            "text": answer if row["step"] > steps / 2 else "<think>4 + 3 7 7 8",
        }
        for row in rows[every - 1 :: every]
    ]
    write_lines(directory / "samples.jsonl", samples)
    write_lines(
        directory / "events.jsonl",
        [
            {
                "step": 0,
                "event": "start",
                "detail": "bfloat16: 2.3 times as fast as float32 in a 2048 cube",
                "action": "",
            },
            {"step": steps, "event": "finished", "detail": f"{steps} steps", "action": "checkpoint kept"},
        ],
    )


def problem(number: int, right: bool) -> dict[str, Any]:
    left, added = 17 + number % 80, 21 + number % 60
    total = left + added
    steps = f"{left} + {added}: {left % 10} + {added % 10} = {left % 10 + added % 10}."
    text = f"<think>{steps}</think>{total if right else total + 10}"
    return {
        "question": f"What is {left} + {added}?",
        "expected": str(total),
        "text": text,
        "right": right,
        "level": 1 + number % 2,
    }


def voyage_document() -> dict[str, Any]:
    fingerprint = {"host": "lab-3", "cpu": "EPYC 7763", "cores": 2, "torch": "2.13.0+cpu", "dtypes": {"bfloat16": True}}
    return {
        "schema_version": 1,
        "finished": True,
        "num_parameters": 3_412_480,
        "chips": {"train": {"name": "cpu", "reason": "no accelerator was found, so cpu", "fingerprint": fingerprint}},
        "steps": [
            {
                "name": "chips",
                "title": "Find the chips",
                "state": "finished",
                "seconds": 1.2,
                "outcome": "cpu trains and serves",
            },
            {
                "name": "train",
                "title": "Train",
                "state": "finished",
                "seconds": 331.0,
                "outcome": "pretrain 600, sft 200 steps",
            },
            {
                "name": "evaluate",
                "title": "Evaluate",
                "state": "finished",
                "seconds": 12.5,
                "outcome": "174 of 200 right",
            },
            {"name": "handoff", "title": "Hand off", "state": "finished", "seconds": 0.8, "outcome": "hf, float32"},
            {
                "name": "compare",
                "title": "Compare",
                "state": "finished",
                "seconds": 9.0,
                "outcome": "199 of 200 the same",
            },
        ],
        "agreement": {
            "compared": "token",
            "num_asked": 200,
            "num_same": 199,
            "num_right_before": 174,
            "num_right_after": 174,
            "num_tokens_before": 8123,
            "num_tokens_after": 8121,
            "sides": [["dtype", "bfloat16", "float32"]],
            "differences": [
                {"question": "What is 9 + 8?", "before": "…8 = 17", "after": "…8 = 16", "unit": "token", "position": 12}
            ],
        },
    }


def write_whole_run(path: Path) -> RunDirectory:
    run = RunDirectory(path)
    write_json(run.resolved_recipe, parse_recipe(RECIPE, "made up").model_dump(mode="json"))
    write_stage(run, "pretrain", 600, 6.9, 0.9)
    write_stage(run, "sft", 200, 1.4, 0.35)
    rows = [problem(number, right=number % 8 != 3) for number in range(200)]
    write_json(run.evaluation, {"schema_version": 1, "problems": rows})
    for name, size in (
        ("config.json", 1200),
        ("model.safetensors", 13_650_000),
        ("tokenizer.json", 62_000),
        ("COMPLETE", 0),
    ):
        file = run.handoff("hf") / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as handle:
            handle.truncate(size)
    write_json(run.path / "voyage.json", voyage_document())
    return run


@pytest.fixture
def whole_run(tmp_path: Path) -> RunDirectory:
    """A finished voyage with every document."""
    return write_whole_run(tmp_path / "runs" / "first")


@pytest.fixture
def add_line() -> Callable[[Path, bytes], None]:
    def append(path: Path, line: bytes) -> None:
        with path.open("ab") as file:
            file.write(line)

    return append
