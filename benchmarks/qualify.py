"""What `qualify` catches: each fault of the catalogue planted, honest variants over many seeds, the judge's power.

    python benchmarks/qualify.py                     # all; over an hour on two cores
    python benchmarks/qualify.py --part faults       # the other parts stay as they were
    python benchmarks/qualify.py --part honest       # honest variants; goes on if cut off, anew with --anew
    python benchmarks/qualify.py --part honest-links # links, stability, golden on honest variants; the same
    python benchmarks/qualify.py --only N21 W1       # these faults again: their rows are replaced

Each row is a run of the command's own machinery (`crosschip.qualify.qualify`) in child processes. Writes
docs/results/qualify-faults.json and the table docs/results/qualify-faults.md, or elsewhere with --out.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from qualify_tables import TINY, table

from crosschip.qualify.finding import Role
from crosschip.qualify.proctor import PART_LIMIT_S
from crosschip.qualify.programme import Exam, Request, named_exams
from crosschip.qualify.qualification import DefectError, qualify
from crosschip.rundir import read_json, write_json, write_text

ROOT = Path(__file__).parent.parent
FIRST = str(ROOT / "recipes" / "first.toml")
HONEST = ("sim", "sim:fp32", "sim:reordered", "sim:naive", "sim:noisy", "sim:flush")
_STEP_LIMIT_S = 180.0  # a step of the subject takes seconds
SEEDED = ("sim:noisy", "sim:reordered")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=None, help="catalogue ids; then honest variants are left out")
    parser.add_argument("--part", choices=("all", "faults", "honest", "honest-links"), default="all")
    parser.add_argument("--anew", action="store_true", help="forget the rows of the honest parts that are asked for")
    parser.add_argument("--seeds", type=int, default=20, help="seeds of each honest variant")
    parser.add_argument("--honest-time", type=float, default=40.0, help="seconds of one honest qualification")
    parser.add_argument("--links-time", type=float, default=220.0, help="seconds of one of --part honest-links")
    parser.add_argument("--workers", type=int, default=2, help="qualifications at a time, a core each")
    parser.add_argument("--subject", default=FIRST)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "qualify-faults")
    return parser.parse_args()


def examine(
    subject: str,
    chip: str,
    role: Role,
    seed: int = 0,
    time_s: float | None = None,
    exams: tuple[Exam, ...] | None = None,
    part_limit_s: float = PART_LIMIT_S,
    golden: Path | None = None,
) -> dict[str, Any]:
    """One qualification in the smoke tier."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.json"
        return qualify(Request(subject, chip, role, "smoke", report, seed, exams, time_s, part_limit_s, golden))


def catch(row: Any, subject: str) -> dict[str, Any]:
    """Plant one fault; who names it, and after how long."""
    for role in ("train", "serve"):
        changed, calls = calls_changed(subject, row.id, role)
        if changed != 0 or role == "serve" or hasattr(row.make(), "collective"):
            break
    programme = _programme_for(row)
    try:
        report = examine(subject, f"sim:{row.id}", role, **programme)
    except DefectError as error:
        print(f"{row.id}: {error}", file=sys.stderr, flush=True)
        report = {"verdict": "defect", "findings": [], "time_s": 0.0}
    expected = [finding for finding in report["findings"] if finding["exam"] in row.caught_by]
    named = [finding for finding in expected if finding["verdict"] == "FAIL"]
    if not named and (limits := [each for each in expected if each["verdict"] == "PASS WITH LIMITS"]):
        honest = {_about(each) for each in examine(subject, "sim", role, **programme)["findings"]}
        named = [each for each in limits if _about(each) not in honest]  # an honest chip has limits, too
    first = min(named, key=lambda finding: finding["found_after_s"] or 1e9, default=None)
    return {
        "id": row.id,
        "title": row.title,
        "role": role,
        "verdict": report["verdict"],
        "expected_exams": row.caught_by,
        "failing_exams": sorted({each["exam"] for each in report["findings"] if each["verdict"] == "FAIL"}),
        "named": first and {key: first[key] for key in ("exam", "verdict", "subject", "message", "found_after_s")},
        "calls_changed": changed,
        "calls": calls,
        "acts_on_collectives": hasattr(row.make(), "collective"),
        "time_s": report["time_s"],
    }


_LINKS_WEIGHTS = {"links": 20.0, "stability": 6.0}  # a golden bundle has 30: four times ranks start take the most
_NEED_TIME = {"W4": 180.0, "I6": 300.0}  # ranks in a process each; a run long enough that bandwidth can fall


def _about(finding: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(finding[key]) for key in ("exam", "kind", "verdict", "check", "subject"))


def _programme_for(row: Any) -> dict[str, Any]:
    """The smoke tier leaves out links and stability, and has no time for a rehearsal of several ranks: rows that only
    those catch get them, and the time they need."""
    exams = named_exams(_exams_of(row))
    if row.id in _NEED_TIME:
        return {"exams": exams, "time_s": _NEED_TIME[row.id]}
    beyond = [exam for exam in exams if exam.weight_in("smoke") == 0]
    if len(beyond) < len(exams):
        return {}
    return {"exams": tuple(beyond), "time_s": 120.0, "part_limit_s": 20.0}


def _exams_of(row: Any) -> list[str]:
    """The exams of a chip that have to name the fault; those of a server are not taken here."""
    return [name for name in row.caught_by if not name.startswith("serving_")]


def calls_changed(subject: str, fault: str, role: Role) -> tuple[int | None, int]:
    """How many calls of one step of the subject the fault changes, delays or refuses, and of how many. In a child.

    None where the step dies or does not come back.
    """
    command = [sys.executable, __file__, "--count", subject, fault, role]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_STEP_LIMIT_S, check=True)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        return None, 0
    changed, calls = json.loads(done.stdout.splitlines()[-1])
    return changed, calls


def count(subject: str, fault: str, role: Role) -> None:
    """Run one step on the simulated chip with the fault counted; prints `[changed, calls]`."""
    from crosschip.chips.faults import faults_from
    from crosschip.chips.faults.counting import CountingFault
    from crosschip.chips.simulated import activate, plant
    from crosschip.qualify.subjects.subject import load_subject

    activate("sim")
    workload = load_subject(subject).workload(torch.device("sim", 0), torch.bfloat16)
    counting = [CountingFault(each) for each in faults_from(f"sim:{fault}")]
    plant(counting)
    with contextlib.suppress(Exception):  # a fault may refuse a call; what it did is counted
        workload.train_step(0) if role == "train" else workload.serve_step()
    plant([])
    print(json.dumps([sum(each.num_affected for each in counting), sum(sum(each.calls.values()) for each in counting)]))


def clear(variant: str, seed: int, time_s: float, subject: str = TINY, **programme: Any) -> dict[str, Any]:
    """Qualify an honest variant; the findings that accuse it."""
    chip = f"{variant},seed={seed}" if variant in SEEDED else variant
    role: Role = "train" if seed % 2 == 0 else "serve"
    report = examine(subject, chip, role, seed, time_s, **programme)
    accused = [
        finding
        for finding in report["findings"]
        if finding["verdict"] == "FAIL" or (finding["verdict"] == "INCONCLUSIVE" and finding["critical"])
    ]
    return {
        "variant": variant,
        "seed": seed,
        "role": role,
        "verdict": report["verdict"],
        "dtype": report["compute_dtype"],
        "num_checks": sum(sum(exam["num_checks"].values()) for exam in report["exams"]),
        "accused": [f"{each['exam']}: {each['subject']}: {each['message']}" for each in accused],
    }


def clear_all(
    name: str, ask: Callable[[str, int], dict[str, Any]], options: argparse.Namespace, document: dict[str, Any],
    head: dict[str, Any], path: Path,
) -> None:  # fmt: skip
    """Qualify the honest variants; rows that `document` has already stay.

    The document is written after each row, so that a part goes on where it was cut off.
    """
    part: dict[str, Any] = document.setdefault(name, {"time_s": 0.0, "rows": []})
    if part["rows"] and part["fingerprint"] != head["fingerprint"]:
        part["again"] = [*part.get("again", []), {key: part[key] for key in ("command", "fingerprint", "time_s")}]
    part |= head
    done = {(row["variant"], row["seed"]) for row in part["rows"]}
    cases = [(variant, seed) for seed in range(options.seeds) for variant in HONEST if (variant, seed) not in done]
    began, before_s = time.monotonic(), part["time_s"]
    with concurrent.futures.ThreadPoolExecutor(options.workers) as pool:
        asked = [pool.submit(ask, *case) for case in cases]
        for row in _shown(each.result() for each in concurrent.futures.as_completed(asked)):
            part["rows"].append(row)
            part["time_s"] = round(before_s + time.monotonic() - began, 1)
            write_json(path, document)


def clear_links(options: argparse.Namespace, document: dict[str, Any], head: dict[str, Any], path: Path) -> None:
    """Links, stability and a golden bundle on the honest variants."""
    with tempfile.TemporaryDirectory() as name:
        model, bundle = small_bundle(Path(name))
        named = named_exams(list(_LINKS_WEIGHTS))
        exams = tuple(dataclasses.replace(exam, weights={"smoke": _LINKS_WEIGHTS[exam.name]}) for exam in named)
        programme = {"exams": exams, "golden": bundle}

        def ask(variant: str, seed: int) -> dict[str, Any]:
            return clear(variant, seed, options.links_time, str(model), **programme)

        clear_all("honest-links", ask, options, document, head, path)


def small_bundle(directory: Path) -> tuple[Path, Path]:
    """A small model of the whole architecture with random weights, and its golden bundle from the CPU."""
    from crosschip.chips import find_chip
    from crosschip.golden.record import RecordPlan, record
    from crosschip.golden.training_curve import CurvePlan
    from crosschip.model import ModelConfig, Transformer, init_weights, save_model

    config = ModelConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=4, n_shared_experts=1, n_routed_experts=8, num_experts_per_tok=2, first_k_dense_replace=1,
        kv_lora_rank=32, q_lora_rank=None, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
        max_position_embeddings=130,
    )  # fmt: skip
    model = Transformer(config)
    init_weights(model, 0)
    save_model(model, directory / "model")
    plan = RecordPlan(reorderings=2, curve=CurvePlan(num_steps=6, length=32))
    record(directory / "model", find_chip("cpu"), directory / "bundle", plan=plan)
    return directory / "model", directory / "bundle"


def main() -> None:
    if sys.argv[1:2] == ["--count"]:
        count(sys.argv[2], sys.argv[3], cast(Role, sys.argv[4]))
        return
    from crosschip.chips import find_chip, fingerprint
    from crosschip.chips.faults import CATALOGUE

    options = arguments()
    os.environ |= {"OMP_NUM_THREADS": "1"}  # of the children; several run at a time
    path = options.out.with_suffix(".json")
    document: dict[str, Any] = read_json(path) if path.exists() else {}
    for part in ("honest", "honest-links") if options.anew else ():
        if options.part in ("all", part):
            document.pop(part, None)
    # The others are for benchmarks/handoff.py, and for the serving exam, which asks a server.
    on_chips = [row for row in CATALOGUE.values() if not row.acts_on_files and _exams_of(row)]
    rows = [row for row in on_chips if options.only is None or row.id in options.only]
    with concurrent.futures.ThreadPoolExecutor(options.workers) as pool:
        head = {
            "command": " ".join(["python", "benchmarks/qualify.py", *sys.argv[1:]]),
            "fingerprint": fingerprint(find_chip("cpu")),
        }
        if options.part in ("all", "faults"):
            began = time.monotonic()
            found = list(_shown(pool.map(lambda row: catch(row, options.subject), rows)))
            time_s = round(time.monotonic() - began, 1)
            part = {**head, "subject": Path(options.subject).name, "time_s": time_s, "rows": found}
            document["faults"] = part if options.only is None else _replaced(document.get("faults"), part)
        if options.part in ("all", "honest") and options.only is None:
            ask = lambda *case: clear(*case, options.honest_time)  # noqa: E731
            clear_all("honest", ask, options, document, {**head, "power": power_sentence()}, path)
        if options.part in ("all", "honest-links") and options.only is None:
            clear_links(options, document, head, path)
    write_json(path, document)
    write_text(path.with_suffix(".md"), table(document) + "\n")
    print(f"{path} and {path.with_suffix('.md')}")


def _replaced(before: dict[str, Any] | None, part: dict[str, Any]) -> dict[str, Any]:
    """`before` with the rows of `part` in the place of its own, and a word of who made them."""
    if before is None:
        return part
    again = {row["id"]: row for row in part["rows"]}
    told = {key: part[key] for key in ("command", "fingerprint", "time_s")}
    rows = [again.pop(row["id"], row) for row in before["rows"]] + list(again.values())
    return {**before, "rows": rows, "again": [*before.get("again", []), told]}


def power_sentence() -> str:
    """How often an operator with a given error ratio fails, over simulated sweeps of 100 operators."""
    from crosschip.qualify.judging.power import rejection_rate

    trials = 200
    found = {ratio: rejection_rate(ratio, num_trials=trials) for ratio in (1.0, 2.0, 2.5, 3.0, 4.0)}
    shown = ", ".join(f"{rate:.0%} at a ratio of {ratio:g}" for ratio, rate in found.items())
    return f"Share of {trials} simulated sweeps in which the one operator of 100 with that error ratio fails: {shown}."


def _shown(results: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for result in results:
        print(json.dumps(result), flush=True)
        yield result


if __name__ == "__main__":
    main()
