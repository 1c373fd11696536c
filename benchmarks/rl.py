"""Reinforcement learning: ours against TRL's GRPO trainer, same weights, problems, batch, threads and machine.

    make engines ENGINES=trl
    python benchmarks/rl.py --model MODEL_DIR --json docs/results/rl.json

MODEL_DIR is a handed-off model that answers about half of the problems of a level (`recipes/first.toml` without
`[rl]`). Ours goes first. TRL generates with transformers; its time leaves out what saving takes, ours leaves out
looking at the score. One program measures the scores of both.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from crosschip.chips import find_chip, fingerprint
from crosschip.data import load_tokenizer, make_problem, open_source
from crosschip.data.arithmetic import is_held_out
from crosschip.engines.environments import engine_python, engine_versions
from crosschip.model import load_model
from crosschip.recipe import DataSettings, RlSettings
from crosschip.rundir import write_json, write_text
from crosschip.train.checkpoint import find_newest
from crosschip.train.rl.scoring import HeldOutProblems

ROOT = Path(__file__).parent.parent


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--level", type=int, default=2)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--their-steps", type=int, default=8, help="theirs takes longer; the rate needs few")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=120)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--every", type=int, default=4, help="steps between two scores")
    parser.add_argument("--problems", type=int, default=200, help="held-out problems of a score")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def our_side(options: argparse.Namespace, place: Path) -> list[dict[str, Any]]:
    """Train with `crosschip train`; one record a step, with the score where it was looked at."""
    text = f"""
name = "rl"
seed = {options.seed}
[model]
directory = "{options.model.absolute()}"
[data]
source = "arithmetic"
levels = [{options.level}]
num_problems = 4000
[rl]
steps = {options.steps}
prompts = {options.prompts}
samples = {options.samples}
seq_len = {options.max_new_tokens + 64}
max_new_tokens = {options.max_new_tokens}
learning_rate = {options.learning_rate}
drop_without_signal = false
validate_every = {options.every}
validation_sequences = {options.problems}
checkpoint_every = 1000
sample_every = 1000
"""
    write_text(place / "recipe.toml", text)
    command = [sys.executable, "-m", "crosschip", "train", str(place / "recipe.toml"), "--out", str(place / "run")]
    subprocess.run(command, check=True)
    stage = place / "run" / "train" / "rl"
    steps = _lines(stage / "metrics.jsonl")
    scores = {record["step"]: record["score"] for record in _lines(stage / "validation.jsonl")}
    records, seconds = [], 0.0
    for record in steps:
        seconds += record["seconds"]
        told = {"step": record["step"], "seconds": seconds, "both_work_share": record.get("both_work_share")}
        records.append(told | ({"score": scores[record["step"]]} if record["step"] in scores else {}))
    assert find_newest(stage, print) is not None
    return records


def their_side(options: argparse.Namespace, place: Path, python: Path) -> list[dict[str, Any]]:
    """The same with TRL."""
    problems = (make_problem(options.level, options.seed, index) for index in range(4000))
    rows = [{"question": each.question, "answer": each.answer} for each in problems if not is_held_out(each.question)]
    write_text(place / "problems.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    out = place / "theirs"
    numbers = {
        "steps": options.their_steps,
        "prompts": options.prompts,
        "samples": options.samples,
        "max-new-tokens": options.max_new_tokens,
        "save-every": options.every,
        "threads": options.threads,
        "seed": options.seed,
        "learning-rate": options.learning_rate,
    }
    flags = [part for name, number in numbers.items() for part in (f"--{name}", str(number))]
    peer = Path(__file__).with_name("rl_peer.py")
    subprocess.run(
        [str(python), str(peer), str(options.model), str(place / "problems.jsonl"), str(out), *flags], check=True
    )
    records = _lines(out / "steps.jsonl")
    for record in records:
        if (saved := out / f"step-{record['step']:05d}").is_dir():
            record["score"] = score_of(saved, options)
    return records


def score_of(model: Path, options: argparse.Namespace) -> float:
    """The share of held-out problems that a model directory answers right."""
    settings = RlSettings(
        steps=3,
        seq_len=options.max_new_tokens + 64,
        max_new_tokens=options.max_new_tokens,
        validation_sequences=options.problems,
    )
    source = open_source(DataSettings(source="arithmetic", levels=[options.level], num_problems=4000), options.seed)
    tokenizer = load_tokenizer(options.model)
    found = HeldOutProblems(source, tokenizer, settings).score(load_model(model, dtype=torch.float32))
    return found.num_right / found.num_problems


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rate(records: list[dict[str, Any]], options: argparse.Namespace) -> float:
    """Samples a second after the first step, in which both sides warm up."""
    steps, seconds = records[-1]["step"] - records[0]["step"], records[-1]["seconds"] - records[0]["seconds"]
    return float(steps * options.prompts * options.samples / seconds)


def main() -> None:
    options = arguments()
    python = engine_python("trl")
    if python is None:
        sys.exit("TRL's environment is not there; what to do: make engines ENGINES=trl")
    torch.set_num_threads(options.threads)
    place = Path(tempfile.mkdtemp(prefix="crosschip-rl-"))
    try:
        ours, theirs = our_side(options, place), their_side(options, place, python)
        document = {
            "benchmark": "rl",
            "command": " ".join(["python", "benchmarks/rl.py", *sys.argv[1:]]),
            "settings": {name: str(value) for name, value in vars(options).items()},
            "score_before": score_of(options.model, options),
            "samples_per_s": {"ours": rate(ours, options), "trl": rate(theirs, options)},
            "ratio": rate(ours, options) / rate(theirs, options),
            "both_work_share": [record["both_work_share"] for record in ours if record["both_work_share"] is not None],
            "ours": ours,
            "trl": theirs,
            "trl_versions": engine_versions("trl", str(python)),
            "fingerprint": fingerprint(find_chip("cpu")),
        }
        print(json.dumps(document, indent=2))
        if options.json:
            write_json(options.json, document)
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
