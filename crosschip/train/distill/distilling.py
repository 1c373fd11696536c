"""The whole distillation: ask, judge, keep, write the rows and the manifest beside them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from crosschip.data import ChatTokenizer
from crosschip.data.rows import digest_of
from crosschip.errors import DataError, RunDirectoryError
from crosschip.recipe.distilling import DistillSettings
from crosschip.rundir import sha256_of, write_json, write_text
from crosschip.train.distill.journal import Journal
from crosschip.train.distill.sampling import Answers, Here, Manner, Place
from crosschip.train.distill.selecting import REASONS, Sampled, as_row, select
from crosschip.train.evaluate.checking import DEFAULT_TIMEOUT_S, opened_checker
from crosschip.train.evaluate.questions import Question
from crosschip.train.evaluate.subject import weights_sha256
from crosschip.train.evaluate.telling import AnswersTold, Tell

__all__ = ["DistillReport", "asked_for", "distill", "manifest_path"]

MANIFEST_SCHEMA = 1


@dataclass(frozen=True)
class Counts:
    """Answers of one level, or of all. `right` and `closed` count every answer, `kept` those that were written.
    `first_failure` is why the first answer of those that failed is none."""

    num_problems: int = 0
    num_problems_kept: int = 0  # with at least one answer that was kept
    asked: int = 0
    right: int = 0
    closed: int = 0
    finished: int = 0
    kept: int = 0
    reasons: dict[str, int] = field(default_factory=dict)  # what became of every answer; adds up to `asked`
    first_failure: str | None = None


@dataclass(frozen=True)
class DistillReport:
    """What came out: the file of rows, its manifest, and the counts over everything and by level."""

    path: Path
    manifest: Path
    counts: Counts
    by_level: dict[str, Counts]


def manifest_path(out: Path) -> Path:
    """The manifest of the rows in `out`: `NAME.manifest.json` beside it."""
    return out.with_name(f"{out.stem}.manifest.json")


def distill(
    model_directory: Path,
    tokenizer: ChatTokenizer,
    problems: Sequence[Question],
    settings: DistillSettings,
    out: Path,
    tell: Tell,
    *,
    seed: int = 0,
    answers: Answers | None = None,
    chip: str = "auto",
    beat: Callable[[], None] | None = None,
    force: bool = False,
    checker_timeout_s: float = DEFAULT_TIMEOUT_S,
) -> DistillReport:
    """Answer `problems` with the model, and write the right answers to `out` as chats with their reasoning.

    The rows are what `[data] source = "files"` reads, in the problems' order. Rows and manifest are written whole or
    not at all, the manifest last; an interrupted call goes on from its journal when it is made again.

    Args:
        answers: what answers; None is the model of `model_directory` in this process, on `chip`, which calls `beat`
            with each token. It is called with each file of weights that is read for its sum, too.
        force: replace what an earlier call wrote.
        checker_timeout_s: of one answer; a checker that takes longer has failed.

    Raises:
        RunDirectoryError: `out` is there already, or another call is making it.
        DataError: no answer could be kept.
        RecipeError: the checker is not known.
        EngineError: the engine that was to answer is gone.
    """
    _check_free(out, force)
    if out.suffix != ".jsonl":
        raise DataError(f"{out} does not end in .jsonl", "name it so: the rows are read by their ending")
    answers = answers or Here(model_directory, tokenizer, chip, beat)
    model = {"directory": str(model_directory), "weights_sha256": weights_sha256(model_directory, beat)}
    identity = {"model": model, "answers": answers.told, **asked_for(problems, settings, seed)}
    with Journal(out.with_name(f".{out.name}.journal"), identity) as journal:
        _check_free(out, force)  # another call may have ended since
        _ask_all(journal, answers, problems, settings, seed, tell, checker_timeout_s)
        rows, report = _chosen(journal.answered, problems, settings, out, seed)
        if not rows:
            journal.remove()  # nothing can be chosen from these answers, whatever `keep` is
            raise _nothing_kept(report.counts)
        manifest_path(out).unlink(missing_ok=True)  # never an old one beside new rows
        write_text(out, "".join(f"{row}\n" for row in rows))
        write_json(report.manifest, _manifest(identity, report, settings))
        journal.remove()
    tell(f"{report.counts.kept} rows in {out}; {_told(report.counts)}")
    return report


def _check_free(out: Path, force: bool) -> None:
    if out.exists() and not force:
        raise RunDirectoryError(f"{out} is there already", "give another --out, or --force to replace it")


def asked_for(problems: Sequence[Question], settings: DistillSettings, seed: int) -> dict[str, Any]:
    """What is asked, and how, as the manifest has it. `keep` and `choose` are not among it: they choose from the same
    answers."""
    asked = [(problem.expected, *(message.content for message in problem.messages)) for problem in problems]
    return {
        "problems_sha256": digest_of(asked),
        "num_problems": len(problems),
        "samples": settings.samples,
        "max_new_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "checker": settings.checker,
        "seed": seed,
    }


def _ask_all(
    journal: Journal,
    answers: Answers,
    problems: Sequence[Question],
    settings: DistillSettings,
    seed: int,
    tell: Tell,
    checker_timeout_s: float,
) -> None:
    """Ask what the journal does not hold yet, and add each problem to it when all its answers are there."""
    missing = [number for number in range(len(problems)) if number not in journal.answered]
    if len(missing) < len(problems):
        tell(f"going on after {len(problems) - len(missing)} of {len(problems)} problems")
    places: list[Place] = [(number, sample) for number in missing for sample in range(settings.samples)]
    partly: dict[int, dict[int, Sampled]] = {}
    told, has_failed = AnswersTold(len(places), tell), False
    with opened_checker(settings.checker, checker_timeout_s) as checker:
        manner = Manner(settings.max_new_tokens, settings.temperature, seed, checker)
        for (number, sample), sampled in answers.ask(problems, places, manner):
            partly.setdefault(number, {})[sample] = sampled
            told.count(sampled.right)
            if sampled.failure is not None and not has_failed:
                has_failed = True
                tell(f"an answer to {problems[number].text[:60]!r} failed: {sampled.failure}; others are counted")
            if len(partly[number]) == settings.samples:
                of_problem = partly.pop(number)
                journal.add(number, [of_problem[place] for place in range(settings.samples)])


def _chosen(
    answered: dict[int, list[Sampled]],
    problems: Sequence[Question],
    settings: DistillSettings,
    out: Path,
    seed: int,
) -> tuple[list[str], DistillReport]:
    """The rows to write, and the report about them."""
    rows: list[str] = []
    outcomes: list[tuple[Question, list[Sampled], list[str]]] = []
    for number, problem in enumerate(problems):
        samples = answered[number]
        reasons = select(samples, settings.keep, settings.choose, ("distill", seed, problem.text))
        outcomes.append((problem, samples, list(reasons)))
        rows += [
            json.dumps(as_row(problem, sample), ensure_ascii=False)
            for sample, reason in zip(samples, reasons, strict=True)
            if reason == "kept"
        ]
    levels = sorted({problem.level for problem in problems if problem.level is not None})
    by_level = {
        str(level): _counted([outcome for outcome in outcomes if outcome[0].level == level]) for level in levels
    }
    return rows, DistillReport(out, manifest_path(out), _counted(outcomes), by_level)


def _counted(outcomes: Sequence[tuple[Question, list[Sampled], list[str]]]) -> Counts:
    samples = [sample for _, of_problem, _ in outcomes for sample in of_problem]
    reasons = Counter(reason for _, _, of_problem in outcomes for reason in of_problem)
    return Counts(
        num_problems=len(outcomes),
        num_problems_kept=sum("kept" in of_problem for _, _, of_problem in outcomes),
        asked=len(samples),
        right=sum(sample.right for sample in samples),
        closed=sum(sample.closed for sample in samples),
        finished=sum(sample.finished for sample in samples),
        kept=reasons["kept"],
        reasons={reason: reasons[reason] for reason in REASONS},
        first_failure=next((sample.failure for sample in samples if sample.failure is not None), None),
    )


def _manifest(identity: dict[str, Any], report: DistillReport, settings: DistillSettings) -> dict[str, Any]:
    return {
        "schema_version": MANIFEST_SCHEMA,
        "kind": "distillation",
        "rows": {"file": report.path.name, "sha256": sha256_of(report.path), "num_rows": report.counts.kept},
        **identity,
        "keep": settings.keep,
        "choose": settings.choose,
        "counts": asdict(report.counts),
        "by_level": {level: asdict(counts) for level, counts in report.by_level.items()},
    }


def _told(counts: Counts) -> str:
    reasons = ", ".join(f"{name} {number}" for name, number in counts.reasons.items() if number)
    problems = f"{counts.num_problems_kept} of {counts.num_problems} problems have a row"
    failed = "" if counts.first_failure is None else f"; the first that failed: {counts.first_failure}"
    return f"{counts.right} of {counts.asked} answers right, {problems} ({reasons}){failed}"


def _nothing_kept(counts: Counts) -> DataError:
    remedy = "take a model that solves some of the problems, easier ones, more samples or a larger max_new_tokens"
    if counts.reasons["failed"]:
        remedy = f"mend what the failure names, the checker, its rows or the engine; else {remedy}"
    return DataError(f"none of {counts.asked} answers is right and whole: {_told(counts)}", remedy)
