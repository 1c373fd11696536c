"""Training on one chip with rollouts on another that rounds twice as coarsely: corrected, not corrected, and without.

    python benchmarks/two_chips.py --run RUN

RUN is a run of `recipes/first.toml`; all ways begin with the model that its fine-tuning ended with, and do what
`recipes/two-chips.toml` has from `[rl]` on, on the CPU and in bf16 throughout. The other chip is simulated
(`sim:noisy`); its score at the end is compared problem by problem (McNemar) with that of the run whose rollouts came
from the trainer's own chip. Writes docs/results/two-chips.json and two-chips.md.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import rl_ours

from crosschip.chips import find_chip, fingerprint
from crosschip.recipe import load_recipe
from crosschip.rundir import read_json, write_json, write_text

RECIPE = rl_ours.RECIPES / "two-chips.toml"
SETTINGS = load_recipe(RECIPE).model_dump()["rl"]
OUT = Path(__file__).parent.parent / "docs" / "results" / "two-chips"
UNCORRECTED = ('rl.rollouts.correction="none"', "rl.rollouts.replay_routes=false", 'rl.rollouts.on_mismatch="warn"')
SAME = "the trainer's chip"


def ways(chip: str) -> dict[str, tuple[str, ...]]:
    """What each way sets in the recipe."""
    bf16 = ('rl.dtype="bfloat16"', 'rl.rollouts.dtype="bfloat16"')
    here = (*bf16, 'chips.train="cpu"', 'chips.serve="cpu"')
    there = (*here, f'rl.rollouts.engines=["native@{chip}"]')
    return {SAME: here, f"{chip}, corrected": there, f"{chip}, not corrected": (*there, *UNCORRECTED)}


def mean_of(records: list[dict[str, Any]], key: str) -> float | None:
    """Over the steps that have it."""
    values = [float(record[key]) for record in records if record.get(key) is not None]
    return sum(values) / len(values) if values else None


def crosschip(*words: object) -> None:
    """One command; its table is for a reader of the log."""
    subprocess.run([sys.executable, "-m", "crosschip", *map(str, words)], check=True)


def one_way(options: argparse.Namespace, model: Path, place: Path, settings: tuple[str, ...]) -> dict[str, Any]:
    """Train, and ask the held-out problems."""
    always = (
        f"seed={options.seed}",
        f"rl.steps={options.steps}",
        f"rl.validate_every={options.steps}",
        f"rl.checkpoint_every={options.steps}",
        f"rl.sample_every={options.steps}",
        f"rl.validation_sequences={options.problems}",
    )
    records = rl_ours.train(RECIPE, model, place, (*always, *settings))
    asked = ("--num-problems", options.problems)
    crosschip("evaluate", place, *asked, "--json", place / "evaluation.json")
    facts = ("mismatch_k3", "mismatch_mean_dp", "truncated_share", "both_work_share", "entropy")
    return {
        "seconds": records[-1]["seconds"],
        "scores": [[record["step"], record["score"]] for record in records if "score" in record],
        "means": {name: mean_of(records, name) for name in facts},
    }


def markdown(document: dict[str, Any]) -> str:
    """The document as Markdown."""
    recipe, machine = document["recipe"], document["fingerprint"]
    lines = [
        "# Rollouts on another chip",
        "",
        f"{document['settings']['steps']} steps of {recipe['prompts']} problems times {recipe['samples']} answers "
        f"from one fine-tuned model, as in `recipes/two-chips.toml`; all sides compute in bf16. Greedy answers to "
        f"{document['settings']['problems']} held-out problems; before, {document['before']:.1%}.",
        "",
        "| rollouts on | after | beside the trainer's chip | p | KL (k3) | cut off |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in document["ways"].items():
        test, means = found.get("test"), found["means"]
        beside = "" if test is None else f"{100 * test['difference']:+.1f} ({_interval(test)})"
        p = "" if test is None else f"{test['p']:.2g}"
        k3, cut = (f"{means[key]:.1e}" for key in ("mismatch_k3", "truncated_share"))
        lines.append(f"| {name} | {found['after']:.1%} | {beside} | {p} | {k3} | {cut} |")
    host, software = machine["host"], machine["software"]
    lines += [
        "",
        "Points with their 95 % interval, McNemar's p; KL in nats a token, share of tokens whose weight was cut off.",
    ]
    lines += [
        "",
        f"On {host['cpu']} ({host['usable_cores']} cores), torch {software['torch']}: `{document['command']}`",
    ]
    return "\n".join([*lines, ""])


def _interval(test: dict[str, Any]) -> str:
    return f"{100 * test['low_95']:+.1f} to {100 * test['high_95']:+.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    rl_ours.add_options(parser)
    parser.add_argument("--steps", type=int, default=SETTINGS["steps"], help="as in the recipe: %(default)s")
    parser.add_argument("--chip", default="sim:noisy", help="of the rollouts")
    parser.add_argument("--out", type=Path, default=OUT, help="without .json and .md")
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="crosschip-two-chips-"))
    try:
        model = rl_ours.start_model(options.run, place)
        asked = ("--stage", "sft", "--recipe", RECIPE, "--num-problems", options.problems)
        crosschip("evaluate", options.run, *asked, "--json", place / "before.json")
        found: dict[str, dict[str, Any]] = {}
        for number, (name, settings) in enumerate(ways(options.chip).items()):
            found[name] = one_way(options, model, place / str(number), settings)
            answers = place / str(number) / "evaluation.json"
            found[name]["after"] = read_json(answers)["score"]
            if number:
                crosschip("evaluate", place / "0" / "evaluation.json", answers, "--json", place / "test.json")
                found[name]["test"] = read_json(place / "test.json")["greedy"]
        document = {
            "benchmark": "two-chips",
            "command": shlex.join(["python", "benchmarks/two_chips.py", *sys.argv[1:]]),
            "settings": {name: str(value) for name, value in vars(options).items()},
            "recipe": SETTINGS,
            "before": read_json(place / "before.json")["score"],
            "ways": found,
            "fingerprint": fingerprint(find_chip("cpu")),
        }
        write_json(options.out.with_suffix(".json"), document)
        write_text(options.out.with_suffix(".md"), markdown(document))
        print(markdown(document))
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
