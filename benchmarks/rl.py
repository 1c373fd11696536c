"""Reinforcement learning: ours against TRL's GRPO trainer, same weights, problems, batch, threads and machine.

    make engines ENGINES=trl
    python benchmarks/rl.py --run RUN

RUN is a run of `recipes/first.toml`; both begin with the model that its fine-tuning ended with, which answers about
half of the problems. Ours goes first, one version of the weights behind; TRL is on-policy and generates with
transformers. Its time leaves out what saving takes. Ours leaves out looking at the score and bringing the weights to
the engine, which goes on with the next batch meanwhile, so that it is less than the clock's. One program measures the
scores of both. Both learn at a constant rate after two steps of warm-up, and keep groups without signal. Writes
docs/results/rl.json, rl.md and rl.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import rl_ours
import torch
from matplotlib.figure import Figure

from crosschip.chips import find_chip, fingerprint
from crosschip.data import load_tokenizer, make_problem, open_source
from crosschip.data.arithmetic import is_held_out
from crosschip.engines.environments import engine_python, engine_versions
from crosschip.model import load_model
from crosschip.recipe import DataSettings, RlSettings
from crosschip.rundir import read_json, write_json, write_text
from crosschip.train.rl.scoring import HeldOutProblems

OUT = Path(__file__).parent.parent / "docs" / "results" / "rl"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    rl_ours.add_options(parser)
    parser.add_argument("--level", type=int, default=2)
    parser.add_argument("--steps", type=int, default=26)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--learning-rate", type=float, default=1.5e-4)
    parser.add_argument("--every", type=int, default=4, help="steps between two scores")
    parser.add_argument("--their-steps", type=int, default=8, help="theirs takes longer; the rate needs few")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=OUT, help="without .json, .md and .svg")
    return parser.parse_args()


def our_side(options: argparse.Namespace, model: Path, place: Path) -> list[dict[str, Any]]:
    """Plain GRPO as TRL has it: groups without signal are kept, bad answers count as much as good ones."""
    settings = {
        "seed": options.seed,
        "data.levels": [options.level],
        "rl.data.levels": [options.level],
        "rl.steps": options.steps,
        "rl.prompts": options.prompts,
        "rl.samples": options.samples,
        "rl.seq_len": options.max_new_tokens + 64,
        "rl.max_new_tokens": options.max_new_tokens,
        "rl.temperature": options.temperature,
        "rl.learning_rate": options.learning_rate,
        "rl.warmup_steps": 2,
        "rl.decay_share": 0.0,
        "rl.beta2": 0.95,
        "rl.negative_weight": 1.0,
        "rl.drop_without_signal": "false",
        "rl.validate_every": options.every,
        "rl.validation_sequences": options.problems,
    }
    recipe = rl_ours.RECIPES / "first.toml"
    return rl_ours.train(recipe, model, place / "ours", (f"{name}={value}" for name, value in settings.items()))


def their_side(options: argparse.Namespace, model: Path, place: Path, python: Path) -> list[dict[str, Any]]:
    """The same with TRL."""
    problems = (make_problem(options.level, options.seed, index) for index in range(8000))
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
        "temperature": options.temperature,
        "learning-rate": options.learning_rate,
    }
    flags = [part for name, number in numbers.items() for part in (f"--{name}", str(number))]
    peer = Path(__file__).with_name("rl_peer.py")
    subprocess.run([str(python), str(peer), str(model), str(place / "problems.jsonl"), str(out), *flags], check=True)
    records = rl_ours.read_lines(out / "steps.jsonl")
    for record in records:
        if (saved := out / f"step-{record['step']:05d}").is_dir():
            _forget_prediction_modules(saved)
            record["score"] = score_of(saved, model, options)
    return records


def _forget_prediction_modules(model: Path) -> None:
    """transformers saves none of their tensors, and goes on to say in config.json that there are some."""
    config = read_json(model / "config.json")
    write_json(model / "config.json", config | {"num_nextn_predict_layers": 0})


def score_of(model: Path, start: Path, options: argparse.Namespace) -> float:
    """The share of held-out problems that a model directory answers right; the tokenizer is that of the start."""
    settings = RlSettings(
        steps=3,
        seq_len=options.max_new_tokens + 64,
        max_new_tokens=options.max_new_tokens,
        validation_sequences=options.problems,
    )
    source = open_source(DataSettings(source="arithmetic", levels=[options.level], num_problems=8000), options.seed)
    tokenizer = load_tokenizer(start)
    found = HeldOutProblems(source, tokenizer, settings).score(load_model(model, dtype=torch.float32))
    return found.num_right / found.num_problems


def rate(records: list[dict[str, Any]], options: argparse.Namespace) -> float:
    """Samples a second after the first step, in which both sides warm up."""
    steps, seconds = records[-1]["step"] - records[0]["step"], records[-1]["seconds"] - records[0]["seconds"]
    return float(steps * options.prompts * options.samples / seconds)


def curve(document: dict[str, Any], side: str) -> list[tuple[float, float]]:
    """Seconds of training, and the score after them."""
    scored = [(each["seconds"], each["score"]) for each in document[side] if "score" in each]
    return [(0.0, document["score_before"]), *scored]


def markdown(document: dict[str, Any]) -> str:
    """The document as Markdown."""
    settings, rates, machine = document["settings"], document["samples_per_s"], document["fingerprint"]
    shares = document["both_work_share"]
    lines = [
        "# Reinforcement learning beside TRL",
        "",
        f"{settings['prompts']} problems of level {settings['level']} times {settings['samples']} answers a step, at "
        f"most {settings['max_new_tokens']} tokens, temperature {settings['temperature']}, learning rate "
        f"{settings['learning_rate']}; {settings['threads']} threads.",
        "",
        f"Ours {rates['ours']:.1f} samples/s, TRL {rates['trl']:.1f}: **{document['ratio']:.1f} times**. Our engine "
        f"and trainer work at the same time for {sum(shares) / len(shares):.0%} of the time.",
        "",
        "![score over wall-clock time](rl.svg)",
        "",
        "Seconds are those of the steps: TRL's without saving, ours without looking at the score and bringing the "
        "weights to the engine, which goes on meanwhile with the next batch.",
        "",
        f"Greedy score on {settings['problems']} held-out problems after seconds of training:",
        "",
    ]
    for side in ("ours", "trl"):
        points = ", ".join(f"{score:.1%} at {seconds:.0f} s" for seconds, score in curve(document, side))
        lines.append(f"- {side}: {points}")
    versions = ", ".join(f"{name} {version}" for name, version in document["trl_versions"].items())
    host, software = machine["host"], machine["software"]
    lines += [
        "",
        f"On {host['cpu']} ({host['usable_cores']} cores), torch {software['torch']}; TRL's environment: {versions}.",
    ]
    return "\n".join([*lines, "", f"`{document['command']}`", ""])


def draw(document: dict[str, Any], path: Path) -> None:
    """Score over wall-clock time, both sides."""
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    for side in ("ours", "trl"):
        seconds, scores = zip(*curve(document, side), strict=True)
        axes.plot(seconds, [100 * score for score in scores], marker="o", label=side)
    axes.set(xlabel="seconds of training", ylabel="greedy score, %")
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    options = arguments()
    python = engine_python("trl")
    if python is None:
        sys.exit("TRL's environment is not there; what to do: make engines ENGINES=trl")
    torch.set_num_threads(options.threads)
    place = Path(tempfile.mkdtemp(prefix="crosschip-rl-"))
    try:
        model = rl_ours.start_model(options.run, place)
        ours = our_side(options, model, place)
        theirs = their_side(options, model, place, python)
        document = {
            "benchmark": "rl",
            "command": shlex.join(["python", "benchmarks/rl.py", *sys.argv[1:]]),
            "settings": {name: str(value) for name, value in vars(options).items()},
            "score_before": score_of(model, model, options),
            "samples_per_s": {"ours": rate(ours, options), "trl": rate(theirs, options)},
            "ratio": rate(ours, options) / rate(theirs, options),
            "both_work_share": [
                record["both_work_share"] for record in ours if record.get("both_work_share") is not None
            ],
            "ours": [
                {name: record[name] for name in ("step", "seconds", "score") if name in record} for record in ours
            ],
            "trl": theirs,
            "trl_versions": engine_versions("trl", str(python)),
            "fingerprint": fingerprint(find_chip("cpu")),
        }
        write_json(options.out.with_suffix(".json"), document)
        write_text(options.out.with_suffix(".md"), markdown(document))
        draw(document, options.out.with_suffix(".svg"))
        print(markdown(document))
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
