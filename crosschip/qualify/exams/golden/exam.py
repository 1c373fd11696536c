"""The golden bundle that another chip recorded, replayed on this one: do the same weights answer the same?

The weights are those of the subject. A recipe that names none has those that the bundle was recorded from, if they are
still at their place and the recipe's model is the one that was recorded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crosschip.errors import CrosschipError, GoldenError
from crosschip.golden.bundle import Bundle, load_bundle
from crosschip.golden.comparison import Comparison
from crosschip.golden.config_fields import compare_fields
from crosschip.golden.files import FileCheck, check_files, fields_in
from crosschip.golden.judge import Judgement, judge
from crosschip.golden.record import model_directory_of
from crosschip.golden.replay import replay
from crosschip.golden.transformers_replay import replay_through_transformers
from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.finding import Finding, Kind
from crosschip.qualify.subjects.recipe_subject import TransformerSubject, load_recipe_subject
from crosschip.rundir import read_json

__all__ = ["check_bundle", "examine"]

_FILES = ("conversion", "config field")  # causes that lie in what was handed over, not in the chip
_SHOWN = 3  # fields that a message names


def check_bundle(origin: str, path: Path) -> dict[str, Any]:
    """Hold the bundle against the files of the subject, before anything is examined; what differs, for JSON.

    Raises:
        GoldenError: the bundle was cut, altered, or made for other weights, or there are no weights to replay it with.
        ModelError: there are no files to compare.
    """
    bundle = load_bundle(path)
    return check_files(bundle, _weights_of(origin, bundle)).document()


def examine(context: ExamContext) -> None:
    """Replay `context.golden` on the chip and report where it differs, why, and what was not looked at."""
    assert context.golden is not None, "the exam is in the programme only if a bundle is given"
    bundle = load_bundle(context.golden)
    context.part("golden replay", lambda: _replay(context, bundle))


def _replay(context: ExamContext, bundle: Bundle) -> None:
    journal = context.journal
    try:
        directory = _weights_of(context.subject.origin, bundle)
        comparison = _compare(context, bundle, directory)
    except CrosschipError as error:
        journal.checked("golden bundle is of these weights")
        journal.finding(_refused(context, error))
        return
    judgement = judge(comparison)
    for check in judgement.checks:
        journal.checked(check)
    for each in judgement.findings:
        journal.finding(_finding(context, judgement, each, directory))
    if comparison.broke is None:
        journal.covered("rows of the golden bundle", comparison.rows_made, comparison.rows_planned)
    for words in judgement.not_covered:
        journal.not_covered(f"golden bundle: {words}")
    journal.measured(check="golden weights", words=f"replayed the weights in {directory}")
    if not _has_weights(context):
        journal.not_covered(f"golden bundle: the recipe has no weights yet: replayed the weights in {directory}")
    for measurement in _measurements(comparison):
        journal.measured(**measurement)


def _has_weights(context: ExamContext) -> bool:
    """Whether the subject's own weights were replayed: those of a directory, or those that a recipe starts from."""
    subject = context.subject
    return Path(subject.origin).is_dir() or (isinstance(subject, TransformerSubject) and subject.weights is not None)


def _compare(context: ExamContext, bundle: Bundle, directory: Path) -> Comparison:
    """Through what ran the model when it was recorded."""
    settings: dict[str, Any] = {
        "files": _files_of(context),
        "has_time": lambda share: context.remaining_s > (1 - share) * context.budget_s,
        "tell": context.journal.now,
    }
    if bundle.route == "transformers":
        return replay_through_transformers(bundle, directory, context.chip, **settings)
    return replay(bundle, directory, context.chip, with_curve=context.role == "train", **settings)


def _files_of(context: ExamContext) -> FileCheck | None:
    """What was found before the exams, if that came to an end."""
    path = context.golden_files
    return FileCheck.from_document(read_json(path)) if path is not None and path.is_file() else None


def _weights_of(origin: str, bundle: Bundle) -> Path:
    """The model directory to replay.

    Raises:
        GoldenError: the subject has no weights and is not known to be the recorded model, or those of the recording are
            not here.
    """
    path = Path(origin)
    if path.is_dir():
        return model_directory_of(path)[0]
    if path.suffix != ".toml":
        raise GoldenError(
            f"{origin} is a function: whether its model is the one that {bundle.path} was recorded from cannot be told",
            "give the model directory that the bundle was recorded from as the subject: --model DIR",
        )
    subject = load_recipe_subject(path, origin)
    if subject.weights is not None:
        return subject.weights
    _refuse_another_model(subject, bundle)
    return model_directory_of(_recorded_from(bundle, origin))[0]


def _refuse_another_model(subject: TransformerSubject, bundle: Bundle) -> None:
    """Whatever weights a recipe's model will have, numbers of another configuration say nothing about it."""
    recorded = bundle.manifest["config"]
    differing = compare_fields(recorded, fields_in(subject.config.to_hf(), bundle.route))
    if differing:
        named = ", ".join(each.words for each in differing[:_SHOWN])
        more = f" and {len(differing) - _SHOWN} more fields" if len(differing) > _SHOWN else ""
        raise GoldenError(
            f"the model of {subject.origin} is not the one that {bundle.path} was recorded from: {named}{more}",
            "give the bundle of this recipe's run, or the directory that the bundle was recorded from: --model DIR",
        )


def _recorded_from(bundle: Bundle, origin: str) -> Path:
    """Where the recorded weights are. Older bundles name them as they were typed, mostly somewhere above the bundle."""
    source = Path(bundle.manifest["source"])
    places = (source, *(above / source for above in bundle.path.resolve().parents))
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        raise GoldenError(
            f"{origin} has no weights, and {source}, which the bundle was recorded from, is not here",
            "give the model directory or the run as the subject: --model DIR",
        )
    return found


def _finding(context: ExamContext, judgement: Judgement, each: dict[str, Any], directory: Path) -> Finding:
    kind: Kind = "handoff" if judgement.diagnosis.cause in _FILES else "numerics"
    chip = context.chip_spec
    again = f"crosschip golden replay {context.golden} --model {directory} --chip {chip}"
    details = {**each["details"], "again": again}
    return Finding(exam=context.exam, kind=kind, **{**each, "details": details})


def _refused(context: ExamContext, error: CrosschipError) -> Finding:
    """The bundle says nothing about this subject: that is no failure of the chip."""
    return Finding(
        exam=context.exam,
        kind="handoff",
        verdict="INCONCLUSIVE",
        subject=str(context.golden),
        check="golden bundle is of these weights",
        message=f"the bundle is refused: {error.problem}",
        measured="refused",
        limit="replayed",
        limit_source="a bundle speaks about the weights it was recorded from",
        critical=True,
        details={"remedy": error.remedy},
    )


def _measurements(comparison: Comparison) -> list[dict[str, Any]]:
    """Numbers for pages: each view's answers and points, the training curves."""
    kept = ("name", "kl", "points", "num_flips")
    views = comparison.document()["views"]
    found = [{"check": "golden replay", **{key: view[key] for key in kept}} for view in views]
    if comparison.curve is not None:
        found.append({"check": "golden training curve", **comparison.document()["curve"]})
    return found
