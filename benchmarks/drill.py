"""The drill on this machine: faults in two groups and in one, and a clean run.

    python benchmarks/drill.py                                   # all parts; an hour and a half
    python benchmarks/drill.py --part groups --minutes 10        # one part; the others stay as they were
    python benchmarks/drill.py --take other.json                 # adds runs of another seed or machine

Writes docs/results/drill.json and docs/results/drill.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from crosschip.chips import find_chip, fingerprint
from crosschip.report.drill_table import drill_markdown
from crosschip.rundir import read_json, write_json, write_text

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "first.toml"
OUT = ROOT / "docs" / "results" / "drill"

# Steps of the recipe's model are kept short, so that a drill of minutes has enough of them between two faults.
SHORT = (
    "train.batch_size=8",
    "train.checkpoint_every=20",
    "train.validate_every=1000000",
    "train.sample_every=1000000",
)
TWO_GROUPS = ("groups.num_groups=2",)
PARTS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], float]] = {
    "groups": ("Two groups of one process", (*SHORT, *TWO_GROUPS), (), 30.0),
    "one": ("One process", SHORT, (), 30.0),
    "clean": ("Two groups of one process, no fault", (*SHORT, *TWO_GROUPS), ("--faults", "none"), 30.0),
}


def drill(
    settings: tuple[str, ...], options: tuple[str, ...], minutes: float, mtbf: float, seed: int
) -> dict[str, Any]:
    """Run `crosschip drill` and return its report."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "drill.json"
        command = [sys.executable, "-m", "crosschip", "drill", str(RECIPE), "--out", f"{directory}/run"]
        command += ["--json", str(report), "--minutes", str(minutes), "--mtbf", str(mtbf)]
        command += ["--seed", str(seed), *options]
        command += [part for setting in settings for part in ("--set", setting)]
        ended = subprocess.run(command, cwd=ROOT)
        if not report.exists():
            raise SystemExit(f"the drill ended with exit code {ended.returncode} and left no report")
        found = read_json(report)
    if found["interrupted"]:
        raise SystemExit(ended.returncode)
    return found


def table(document: dict[str, Any]) -> str:
    """The document as Markdown."""
    lines = [
        "# Drills",
        "",
        "Faults planted into a running training of `recipes/first.toml` ([what each of them does](../drill.md)). "
        "*After* is from the strike to the event, *steps again* are those that the struck group computed once more.",
        "",
    ]
    for name in (name for name in PARTS if name in document):
        for run in document[name]:
            machine = run["fingerprint"]
            lines.append(drill_markdown(run["report"], PARTS[name][0]))
            lines.append(
                f"On {machine['host']['cpu']} ({machine['host']['usable_cores']} cores), torch "
                f"{machine['software']['torch']}: `{run['command']}`.\n"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; repeatable")
    parser.add_argument("--minutes", type=float, default=None)
    parser.add_argument("--mtbf", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT, help="where to, without .json and .md")
    parser.add_argument("--take", type=Path, action="append", help="add the runs in this file instead of drilling")
    options = parser.parse_args()
    path = options.out.with_suffix(".json")
    document: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for other in options.take or ():
        for name, runs in read_json(other).items():
            document[name] = [*document.get(name, []), *runs]
    for name in () if options.take else options.part or PARTS:
        _, settings, more, minutes = PARTS[name]
        report = drill(settings, more, options.minutes or minutes, options.mtbf, options.seed)
        run = {
            "command": " ".join(["python", "benchmarks/drill.py", *sys.argv[1:]]),
            "fingerprint": fingerprint(find_chip("cpu")),
            "report": report,
        }
        document[name] = [run]
        write_json(path, document)
    write_json(path, document)
    write_text(path.with_suffix(".md"), table(document) + "\n")
    print(f"{path} and {path.with_suffix('.md')}")


if __name__ == "__main__":
    main()
