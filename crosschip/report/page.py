"""The run as one page: a single HTML file without scripts and without anything fetched from elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from crosschip.report.answers import view_agreement, view_evaluation
from crosschip.report.certificates import CertificateView, view_certificate
from crosschip.report.documents import Document, RunDocuments, objects, read_run
from crosschip.report.figures import bytes_text, count, duration
from crosschip.report.stages import StageView, view_stage
from crosschip.report.templating import render
from crosschip.rundir import RunDirectory, write_text

__all__ = ["write_run_page"]


def write_run_page(run: RunDirectory) -> Path:
    """Write `index.html` of `run` from the documents that are there, and return its path.

    A missing or damaged document is said on the page and never an error, so a run in progress or one that failed has
    a page, too. Only a run directory that cannot be written raises (`OSError`).
    """
    documents = read_run(run)
    page = render("run.html", _view(documents))
    write_text(run.index_page, page)
    return run.index_page


def _view(documents: RunDocuments) -> dict[str, Any]:
    stages = [view_stage(stage) for stage in documents.stages]
    evaluation = view_evaluation(documents.evaluation)
    agreement = view_agreement(documents.voyage)
    steps = _steps(documents.voyage)
    return {
        "name": documents.name,
        "state": _state(documents, stages, steps),
        "tiles": _tiles(documents, stages, evaluation, agreement),
        "steps": steps,
        "stages": stages,
        "evaluation": evaluation,
        "agreement": agreement,
        "handoffs": _handoffs(documents),
        "chips": _chips(documents.voyage),
        "qualifications": _qualifications(documents),
        "recipe": _recipe_tables(documents.recipe),
        "gaps": _gaps(documents, stages, evaluation is None, agreement is None),
        "notes": [*documents.notes, *(note for stage in stages for note in stage.notes)],
        "chat_target": _chat_target(documents),
    }


def _qualifications(documents: RunDocuments) -> list[dict[str, str]]:
    """The examinations of chips: what was asked, the verdict, and the page beside the report where there is one."""
    found = []
    for name, report in documents.qualifications.items():
        page = f"qualify/{Path(name).with_suffix('.html')}"
        found.append(
            {
                "asked": f"{report.get('chip', '?')} to {report.get('role', '?')}, {report.get('tier', '?')} tier",
                "verdict": str(report.get("verdict", "?")),
                "state": "good"
                if report.get("verdict") == "PASS"
                else "bad"
                if report.get("verdict") == "FAIL"
                else "",
                "page": page if (documents.path / page).exists() else "",
            }
        )
    return found


def _steps(voyage: Document | None) -> list[Document]:
    """The voyage's steps as (name, title, outcome, time, state); a field that is missing becomes a dash."""
    steps = []
    for step in objects(voyage, "steps"):
        seconds = step.get("seconds")
        steps.append(
            {
                "title": str(step.get("title", step.get("name", "?"))),
                "outcome": str(step.get("outcome", "")),
                "time": duration(seconds) if isinstance(seconds, int | float) else "–",
                "state": str(step.get("state", "finished")),
            }
        )
    return steps


def _state(documents: RunDocuments, stages: list[StageView], steps: list[Document]) -> tuple[str, str]:
    """(CSS class, sentence) for the top of the page."""
    for step in steps:
        if step["state"] == "failed":
            return "bad", f"Stopped in step “{step['title']}”: {step['outcome']}"
        if step["state"] == "interrupted":
            return "open", f"Interrupted in step “{step['title']}”; the same command goes on from there"
    if documents.voyage is not None and documents.voyage.get("finished"):
        return "good", "Every step finished"
    if documents.voyage is not None:
        return "open", f"In progress: {count(len(steps))} steps finished so far"
    open_stages = [f"{stage.title}, {stage.state}" for stage in stages if stage.state != "finished"]
    if open_stages:
        return "open", "In progress or interrupted: " + "; ".join(open_stages)
    return ("good", "Every stage finished") if stages else ("open", "Nothing has been trained yet")


def _tiles(
    documents: RunDocuments, stages: list[StageView], evaluation: Any, agreement: Any
) -> list[tuple[str, str, str]]:
    """The figures at the top: (value, what it is, a line below)."""
    tiles = []
    if evaluation is not None:
        asked = evaluation.num_right + evaluation.num_wrong
        tiles.append(
            (evaluation.score, "held-out problems right", f"of {count(asked)}; 95 % interval {evaluation.interval}")
        )
    if agreement is not None:
        tiles.append(
            (
                agreement.share,
                "answers unchanged by the handoff",
                f"greedy, compared {agreement.unit} by {agreement.unit}",
            )
        )
    parameters = (documents.voyage or {}).get("num_parameters")
    if isinstance(parameters, int):
        tiles.append((count(parameters), "parameters", "DeepSeek-V3 architecture"))
    for stage in (stage for stage in stages if stage.started):
        row = dict(stage.row)
        tiles.append((row["time"], stage.title.lower(), f"{row['steps']} steps, {row['tokens']} tokens"))
    return tiles


def _handoffs(documents: RunDocuments) -> list[tuple[str, list[tuple[str, str]], CertificateView]]:
    """(target, its files with their sizes, its certificate)."""
    return [
        (
            target,
            [(name, bytes_text(size)) for name, size in files if name != "COMPLETE"],
            view_certificate(documents.path / "handoff" / target),
        )
        for target, files in documents.handoffs.items()
    ]


def _flat(document: Any, prefix: str = "") -> list[tuple[str, str]]:
    """A nested document as (dotted key, text) rows; what is empty is left out."""
    if isinstance(document, dict) and document:
        return [
            row for key, value in document.items() for row in _flat(value, f"{prefix}.{key}" if prefix else str(key))
        ]
    if document is None or document in ({}, []):
        return []
    return [(prefix, document if isinstance(document, str) else json.dumps(document, ensure_ascii=False))]


def _chips(voyage: Document | None) -> list[tuple[str, str, str, list[tuple[str, str]]]]:
    """(what it does, its name, why this chip, fingerprint rows) for each role."""
    chips = (voyage or {}).get("chips")
    if not isinstance(chips, dict):
        return []
    verbs: dict[Any, str] = {"train": "Trained", "serve": "Served"}
    return [
        (verbs.get(role, str(role)), _chip_name(chip), str(chip.get("reason", "")), _flat(chip.get("fingerprint", {})))
        for role, chip in chips.items()
        if isinstance(chip, dict)
    ]


def _chip_name(chip: Document) -> str:
    fingerprint = chip.get("fingerprint")
    known = fingerprint.get("chip") if isinstance(fingerprint, dict) else None
    model = known.get("model_name") if isinstance(known, dict) else None
    return f"{chip.get('name', '?')} ({model})" if model else str(chip.get("name", "?"))


def _recipe_tables(recipe: Document | None) -> list[tuple[str, str]]:
    """The resolved recipe, keys without a value left out."""
    return _flat(recipe)


def _chat_target(documents: RunDocuments) -> str | None:
    files = {name for name, _ in documents.handoffs.get("hf", [])}
    return str(documents.path / "handoff" / "hf") if "config.json" in files else None


def _gaps(documents: RunDocuments, stages: list[StageView], no_evaluation: bool, no_agreement: bool) -> list[str]:
    """What this run does not show, in words."""
    gaps = [f"{stage.title} has not started." for stage in stages if not stage.started]
    if not any(stage.name == "sft" for stage in stages):
        gaps.append("There was no fine-tuning stage, so the model was not taught to answer in turns.")
    if no_evaluation:
        gaps.append("The model was not asked held-out problems, so there is no score.")
    if not documents.handoffs:
        gaps.append("The model was not handed off, so no serving engine can load it yet.")
    if no_agreement:
        gaps.append("Answers before and after the handoff were not compared.")
    else:
        gaps.append("The comparison of answers covers the held-out questions and greedy decoding.")
    if not _chips(documents.voyage):
        gaps.append("The chips were not recorded, because this run was not made by crosschip run.")
    if not _qualifications(documents):
        gaps.append(
            "The chips were not qualified: nothing here says that their arithmetic is right, only what came out of it."
        )
    if not any(stage.name == "rl" for stage in stages):
        gaps.append("There was no reinforcement learning.")
    return gaps
