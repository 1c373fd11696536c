"""What a handoff keeps and what it catches: every target through every engine, and every fault of a model's files.

    python benchmarks/handoff.py                              # trains recipes/first.toml first; about half an hour more
    python benchmarks/handoff.py --run runs/first             # of a run that is there
    python benchmarks/handoff.py --run runs/first --part faults   # of files; --part engines: of an engine

Writes docs/results/handoff.json and docs/results/handoff.md. An engine that is not installed (`make engines`) is listed
as not run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from handoff_engines import engine_faults

from crosschip.chips import find_chip, fingerprint
from crosschip.chips.faults import CATALOGUE, faults_from, plant_files
from crosschip.engines import engine_command
from crosschip.errors import CrosschipError
from crosschip.handoff.answers import Side, compare_answers
from crosschip.handoff.handing_off import HandoffResult, hand_off
from crosschip.handoff.targets import TARGETS
from crosschip.rundir import read_json, write_json, write_text

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "first.toml"
OUT = ROOT / "docs" / "results" / "handoff"
ENGINES = ("model", "transformers", "native", "vllm", "llamacpp")
ANSWERING = ("native", "vllm", "llamacpp")  # the others score prompts and generate nothing
TASKS = ("answers", "format", "length")
_CELL = 160  # characters of a message in a table
OUTSIDE = "crosschip.chips.faults.file_mutations"

OUTSIDE_TITLES = {
    "ExpertsSwapped": "two experts have each other's weights",
    "SquareTransposed": "a square matrix is transposed",
    "OlderShard": "one shard is of an older step",
    "StaleTokenizer": "two tokens have each other's ids",
    "TemplateCharacter": "the chat template has a space more",
}

# What is planted where: a row of the catalogue in each of its forms, then what is in no catalogue.
FAULTS: tuple[tuple[str, str], ...] = (
    ("H1", "hf"),
    ("H1,mode=shuffle", "hf"),
    ("H1,tensor=*o_proj.weight", "fp8"),
    ("H1,tensor=*o_proj.weight", "w8a8"),
    ("H6", "hf"),
    ("H6,mode=uninitialised", "hf"),
    ("H6,mode=zeros", "hf"),
    ("H7", "fp8"),
    ("H7,mode=dropped", "fp8"),
    ("H10", "fp8"),
    ("H10,mode=values", "fp8"),
    ("H13", "hf"),
    ("H13,which=rope_theta", "hf"),
    ("H13,which=rope_interleave", "hf"),
    ("H13,which=routed_scaling_factor", "hf"),
    (f"{OUTSIDE}:ExpertsSwapped", "hf"),
    (f"{OUTSIDE}:SquareTransposed", "hf"),
    (f"{OUTSIDE}:OlderShard", "hf"),
    (f"{OUTSIDE}:StaleTokenizer", "hf"),
    (f"{OUTSIDE}:TemplateCharacter", "hf"),
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=None, help="a run after training, or a model directory")
    parser.add_argument("--part", choices=("all", "targets", "faults", "engines"), default="all")
    parser.add_argument("--targets", nargs="*", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--engines", nargs="*", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--num-problems", type=int, default=200, help="0: no answers are asked")
    parser.add_argument("--levels", type=int, nargs="*", default=[1])
    parser.add_argument("--max-tokens", type=int, default=120)
    parser.add_argument("--dtypes", nargs="*", default=None, help="only these dtypes of the targets")
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args()


@contextmanager
def trained(run: Path | None) -> Iterator[Path]:
    """The run that was named, or one that is trained here and thrown away."""
    if run is not None:
        yield run
        return
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "first"
        subprocess.run([sys.executable, "-m", "crosschip", "train", str(RECIPE), "--out", str(path)], check=True)
        yield path


def targets_table(run: Path, options: argparse.Namespace, place: Path) -> list[dict[str, Any]]:
    """One row for each target, dtype and engine."""
    first = hand_off(run, "hf", out=place / "before", engines=("model",), chip="cpu", dtype="float32")
    rows = []
    for name in options.targets:
        for dtype in (each for each in TARGETS[name].dtypes if options.dtypes is None or each in options.dtypes):
            for engine in options.engines:
                row = _row(run, name, dtype, engine, first.directory, options, place)
                print(json.dumps(row), flush=True)
                rows.append(row)
    return rows


def _row(
    run: Path, name: str, dtype: str, engine: str, before: Path, options: argparse.Namespace, place: Path
) -> dict[str, Any]:
    row: dict[str, Any] = {"target": name, "dtype": dtype, "engine": engine}
    if engine == "vllm" and TARGETS[name].quantised in ("fp8", "int8"):
        return {**row, "not_run": "vLLM has no kernels for experts in 8 bits on a CPU without AMX"}
    began = time.monotonic()
    out = place / f"{name}-{dtype}-{engine}"
    try:
        result = hand_off(run, name, out=out, engines=(engine,), chip="cpu", dtype=dtype)
    except CrosschipError as error:  # an engine that is not installed, or that does not read this form
        return {**row, "not_run": error.problem.partition(" that lies in ")[0]}
    row |= _replay(result, engine)
    if options.num_problems and engine in ANSWERING and not row.get("broke"):
        row["answers"] = _answers(before, result.directory, engine, options)
    return {**row, "time_s": round(time.monotonic() - began, 1)}


def _replay(result: HandoffResult, engine: str) -> dict[str, Any]:
    """The replay's verdict and the worst of its views."""
    document = result.certificate.document
    found = next(each for each in document["replays"] if each["engine"]["name"] == engine)
    numbers = [{each["what"]: each for each in view["measures"]} for view in found["views"]]
    kl, top1 = "upper 95 % bound of the mean KL, in nats", "same first token"
    worst = max(numbers, key=lambda each: float(each[kl]["value"]), default=None)
    return {
        "verdict": found["verdict"],
        "certificate": document["verdict"],
        "message": found["message"],
        "blame": found["blame"],
        "broke": found["broke"],
        "mean_kl": worst and worst["mean KL, in nats"]["value"],
        "kl_upper": worst and worst[kl]["value"],
        "kl_limit": worst and worst[kl]["limit"],
        "top1": min((each[top1]["value"] for each in numbers), default=None),
        "engine_version": found["engine"].get("version"),
    }


def _answers(before: Path, after: Path, engine: str, options: argparse.Namespace) -> dict[str, Any]:
    """The paired comparison of the model's answers before and after."""
    longest = int(read_json(before / "config.json")["max_position_embeddings"])
    command = engine_command(engine, chip="cpu", max_length=min(longest, 1024))
    report = compare_answers(
        Side(str(before), "cpu"),
        Side(str(after), "cpu", command=command),
        num_problems=options.num_problems,
        tasks=TASKS,
        levels=tuple(options.levels),
        max_tokens=options.max_tokens,
    )
    tasks = {each.task: each.document() for each in report.tasks}
    kept = ("a", "b", "difference", "interval", "smallest_detectable", "verdict", "words", "num_pairs")
    return {
        "verdict": report.verdict,
        "problems": report.problems,
        "tasks": {name: {key: task[key] for key in kept} for name, task in tasks.items()},
    }


def faults_table(run: Path, place: Path) -> list[dict[str, Any]]:
    """One row for each planted fault; an honest handoff of each target is the control."""
    rows = []
    for spec, name in (*(("0", name) for name in dict.fromkeys(name for _, name in FAULTS)), *FAULTS):
        row = _caught(run, spec, name, place)
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


@contextmanager
def planted(name: str, spec: str) -> Iterator[dict[str, list[str]]]:
    """The target with the fault between its conversion and the gates; what the fault changed."""
    honest, changed = TARGETS[name], {}

    def export(*args: Any, **kwargs: Any) -> None:
        honest.export(*args, **kwargs)
        changed.update(plant_files(faults_from(f"sim:{spec}"), args[1]))

    TARGETS[name] = replace(honest, export=export)
    try:
        yield changed
    finally:
        TARGETS[name] = honest


def _caught(run: Path, spec: str, name: str, place: Path) -> dict[str, Any]:
    row_id = spec.partition(",")[0]
    row = CATALOGUE.get(row_id)
    title = row.title if row is not None else OUTSIDE_TITLES.get(row_id.partition(":")[2], "no fault")
    dtype = "float32" if "float32" in TARGETS[name].dtypes else None
    with planted(name, spec) as changed:
        try:
            result = hand_off(run, name, out=place / f"fault-{name}", engines=("model",), chip="cpu", dtype=dtype)
            gates = [each for each in result.certificate.document["gates"] if each["verdict"] == "FAIL"]
            found = [{"gate": each["name"], "subject": each["subject"], "message": each["message"]} for each in gates]
        except CrosschipError as error:
            found = [{"gate": "refused", "subject": None, "message": error.problem}]
    names = [each for several in changed.values() for each in several]
    return {
        "spec": spec,
        "target": name,
        "title": title,
        "expected": list(row.caught_by) if row is not None else [],
        "num_changed": len(names),
        "changed": names[:3],
        "caught": found,
        "named": _named(names, found),
    }


def _named(changed: list[str], found: list[dict[str, Any]]) -> str | None:
    """The first gate that names what was changed: a weight, for a scale; None if no gate does."""
    wanted = [name.removesuffix("_scale_inv").removesuffix("_scale") for name in changed]
    for each in found:
        said = f"{each['subject']} {each['message']}"
        if any(name in said for name in wanted):
            return str(each["gate"])
    return None


def table(document: dict[str, Any]) -> str:
    """The document as Markdown."""
    lines = ["# Handoff", "", "Made by `make bench-handoff`. Everything ran on a CPU; no accelerator was used.", ""]
    for part, tell in (("targets", _targets_lines), ("faults", _faults_lines), ("engines", _engine_lines)):
        if part in document:
            machine = document[part]["fingerprint"]
            lines += tell(document[part]["rows"])
            where = f"On {machine['host']['cpu']} ({machine['host']['usable_cores']} cores), torch "
            lines += [f"{where}{machine['software']['torch']}: `{document[part]['command']}`.", ""]
    return "\n".join(lines)


def _targets_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## Every target through every engine",
        "",
        "*KL*: the upper 95 % bound of its mean per position, against the limit that the code states. *Answers*: right "
        "before and after, with the 90 % interval of the difference, over the same problems.",
        "",
        "| target | engine | replay | KL | limit | same first token | answers | verdict on answers |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        head = [f"{row['target']}, {row['dtype']}", row["engine"]]
        if "not_run" in row:
            cells = [f"not run: {row['not_run']}", *[""] * 5]
        else:
            numbers = [f"{row[key]:.1e}" if row[key] is not None else "-" for key in ("kl_upper", "kl_limit")]
            top1 = "-" if row["top1"] is None else f"{100 * row['top1']:.2f} %"
            verdict = row["verdict"] if row["verdict"] == "PASS" else f"{row['verdict']}: {_short(row['message'])}"
            cells = [verdict, *numbers, top1, *_answer_cells(row.get("answers"))]
        lines.append("| " + " | ".join(each.replace("|", "/").replace("\n", " ") for each in (*head, *cells)) + " |")
    return [*lines, ""]


def _answer_cells(answers: dict[str, Any] | None) -> tuple[str, str]:
    if answers is None:
        return "-", "-"
    task = answers["tasks"]["answers"]
    low, high = (100 * task["interval"][end] for end in ("low", "high"))
    shares = f"{100 * task['a']:.1f} % → {100 * task['b']:.1f} % ({low:+.1f} to {high:+.1f})"
    return shares, answers["verdict"] if not answers[
        "problems"
    ] else f"{answers['verdict']}: {_short(answers['problems'][0])}"


def _short(words: str) -> str:
    """So much that a cell of a table stays readable; all of it is in the JSON file."""
    return words if len(words) <= _CELL else f"{words[:_CELL].rstrip()} ..."


def _faults_lines(rows: list[dict[str, Any]]) -> list[str]:
    words = (
        "Planted between the conversion and the gates. *Named by*: the first gate that names a tensor, field or file "
        "which the fault changed."
    )
    return _planted_lines("Planted faults of files", words, rows)


def _engine_lines(rows: list[dict[str, Any]]) -> list[str]:
    words = (
        "Nothing is planted: the engine computes another model from honest files. *Named by*: the replay that gives it "
        "the blame."
    )
    return _planted_lines("An engine that errs", words, rows)


def _planted_lines(heading: str, words: str, rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"## {heading}",
        "",
        words,
        "",
        "| fault | what happens | target | changed | named by | what it says |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        said = next((each["message"] for each in row["caught"] if each["gate"] == row["named"]), "")
        more = f" and {row['num_changed'] - 1} more" if row["num_changed"] > 1 else ""
        changed = f"{row['changed'][0]}{more}" if row["changed"] else "nothing"
        said = said if len(said) <= 160 else f"{said[:160]} ..."
        cells = [f"`{row['spec'].removeprefix(f'{OUTSIDE}:')}`", row["title"], row["target"], changed, _by(row), said]
        lines.append("| " + " | ".join(each.replace("|", "/").replace("\n", " ") for each in cells) + " |")
    met = [row for row in rows if row["num_changed"]]
    caught = sum(row["named"] is not None for row in met)
    alarms = sum(bool(row["caught"]) for row in rows if row["spec"] == "0")
    return [*lines, "", f"{caught} of {len(met)} caught and named; {alarms} false alarms without a fault.", ""]


def _by(row: dict[str, Any]) -> str:
    if row["named"]:
        return str(row["named"])
    if row["caught"]:
        return f"not named; **{row['caught'][0]['gate']}** fails"
    return "no alarm" if row["spec"] == "0" else "not applicable" if not row["num_changed"] else "**missed**"


def main() -> None:
    options = arguments()
    path = options.out.with_suffix(".json")
    document: dict[str, Any] = read_json(path) if path.exists() else {}
    head = {
        "command": " ".join(["python", "benchmarks/handoff.py", *sys.argv[1:]]),
        "fingerprint": fingerprint(find_chip("cpu")),
    }
    with trained(options.run) as run, tempfile.TemporaryDirectory() as place:
        parts = {
            "targets": lambda: targets_table(run, options, Path(place)),
            "faults": lambda: faults_table(run, Path(place)),
            "engines": lambda: list(engine_faults(run, Path(place))),
        }
        for part in parts if options.part == "all" else (options.part,):
            document[part] = {**head, "rows": parts[part]()}
    write_json(path, document)
    write_text(path.with_suffix(".md"), table(document) + "\n")
    print(f"{path} and {path.with_suffix('.md')}")


if __name__ == "__main__":
    main()
