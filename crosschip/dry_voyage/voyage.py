"""The dry voyage from recipe to report: export, start the engine, compare its log-probs with our own model's."""

from __future__ import annotations

import math
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crosschip.dry_voyage.planned import MOST_PARAMETERS, PlannedModel, export_planned, load_planned
from crosschip.dry_voyage.refusals import Refusal, explain_refusal
from crosschip.dry_voyage.sensitivity import sensitivities
from crosschip.engines import STILL_STARTING, EngineCommand, RunningEngine, engine_command, running_engine
from crosschip.errors import QualifyError
from crosschip.qualify.finding import LEAST_COVERAGE, Coverage, ExamRecord, Finding, Verdict
from crosschip.qualify.report_document import ReportHead, report_document
from crosschip.qualify.serving.answers import Answer, impossible_scores, read_answer
from crosschip.qualify.serving.client import EngineClient, EngineFault
from crosschip.qualify.serving.identity import EngineIdentity, identify_engine
from crosschip.qualify.serving.judge import Limits, ScoreComparison, compare_scores
from crosschip.qualify.serving.reference import reference_scores
from crosschip.rundir import read_json, write_json

__all__ = ["DryVoyageRequest", "dry_voyage"]

EXAM = "dry_voyage"
Scores = list[float | None]
_ALIKE = 5.0  # two changes of log-probs within this factor may have the same cause
_NUM_LINES = 12  # of a log that a report shows
_PROMPT_LENGTHS = (2, 17, 64, 129, 300)
_LONGEST = 1024  # tokens of a context: more would cost memory and show nothing
_NUM_NEW = 16  # tokens that an engine adds where it does not score prompts
# fp32 engines sum in other orders and some use fast exponentials; bf16 has 8 bits, and random weights forgive nothing.
_LIMITS = {
    "float32": Limits(1e-3, 0.05, "fp32 on both sides: rounding stays far under a thousandth of a nat"),
    "bfloat16": Limits(0.1, 1.0, "an engine that computes in bf16, against fp32, with random weights"),
}


@dataclass(frozen=True)
class DryVoyageRequest:
    """What is rehearsed. `origin` is a recipe or a model directory; `engine` one of `ENGINES`.

    `engine_python` is the interpreter of the engine's environment, `engine_command` a command with `{model}` and
    `{port}` in it; `environment` is added to the engine's.
    """

    origin: str
    engine: str = "native"
    report: Path = Path("dry-voyage.json")
    engine_python: Path | None = None
    engine_command: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    seed: int = 0
    chip: str = "auto"  # of the native engine
    start_s: float = 300.0
    most_parameters: int = MOST_PARAMETERS
    keep: Path | None = None  # where the exported model and the log stay; else they go


def dry_voyage(request: DryVoyageRequest, tell: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Rehearse, write the report to `request.report`, and return it; the document is that of a qualification.

    Raises:
        CrosschipError: the recipe cannot be read or exported, or the engine's command cannot be started.
    """
    began = time.time()
    planned = load_planned(request.origin, request.most_parameters)
    command = _command(request, planned)  # before the export: what cannot be started is told at once
    record = ExamRecord(EXAM)
    with tempfile.TemporaryDirectory(prefix="crosschip-dry-") as temporary:
        directory = request.keep or Path(temporary)
        tell("exporting random weights in the planned architecture")
        model = export_planned(planned, directory, request.seed)
        record.not_covered += [f"cut to be small: {cut}" for cut in planned.cuts]
        record.num_checks["export"] = 1
        identity = _rehearse(request, command, planned, model, directory / "engine.log", record, tell)
    record.time_s = time.time() - began
    head = ReportHead(
        chip=identity.chip if identity else request.engine,
        role="serve",
        tier="smoke",
        subject=f"{planned.recipe.name} with random weights",
        origin=request.origin,
        report=request.report,
        began_at=began,
        seed=request.seed,
        compute_dtype=planned.recipe.handoff.dtype,
        fingerprint={"engine": identity.document()} if identity else None,
    )
    report = report_document(head, [record], record.time_s)
    write_json(request.report, report)
    return report


def _command(request: DryVoyageRequest, planned: PlannedModel) -> EngineCommand:
    return engine_command(
        request.engine,
        request.engine_python,
        request.engine_command,
        chip=request.chip,
        max_length=min(_LONGEST, planned.config.max_position_embeddings),
        dtype=planned.recipe.handoff.dtype,
    )


def _rehearse(
    request: DryVoyageRequest,
    command: EngineCommand,
    planned: PlannedModel,
    model: Path,
    log: Path,
    record: ExamRecord,
    tell: Callable[[str], None],
) -> EngineIdentity | None:
    tell(f"starting {request.engine}")
    environment = {"CROSSCHIP_CONVERTER": f"{shlex.quote(sys.executable)} -m crosschip.handoff.gguf"}
    with running_engine(command, model, log, request.start_s, {**environment, **request.environment}) as engine:
        record.num_checks["engine starts"] = 1
        config = read_json(model / "config.json")
        if engine.ended.startswith(STILL_STARTING):
            _still_starting(record, request, engine)
            return None
        if not engine.is_up:
            _refused(record, request.engine, engine.ended, explain_refusal(engine.read_log(), config))
            return None
        client = EngineClient(engine.url, silence_s=60, total_s=120)
        try:
            tell("comparing log-probs")
            identity = identify_engine(client)
            _compare(client, identity, planned, model, request.seed, record)
        except (EngineFault, QualifyError) as fault:
            _failed_in_use(record, request.engine, fault, engine, config)
            return None
        finally:
            client.close()
        return identity


def _still_starting(record: ExamRecord, request: DryVoyageRequest, engine: RunningEngine) -> None:
    """Neither up nor refused: a compilation may take that long, or it hangs."""
    said = [line for line in engine.read_log().splitlines() if line.strip()][-_NUM_LINES:]
    record.findings.append(
        _finding(
            "INCONCLUSIVE",
            "model",
            "engine starts",
            f"{engine.ended}; the last it said: {said[-1][:300] if said else 'nothing'}",
            measured=request.start_s,
            limit="serves the model",
            limit_source="give it more time, or start it without compilation",
            details={"log": said},
        )
    )


def _refused(record: ExamRecord, engine: str, ended: str, refusal: Refusal) -> None:
    record.findings.append(
        _finding(
            "FAIL",
            next(iter(refusal.fields), "model"),
            "engine starts",
            f"{ended}: {refusal.sentence}; to do: {refusal.advice}",
            measured="refused",
            limit="serves the model",
            limit_source=f"the target engine is {engine}",
            details={"fields": refusal.fields, "log": refusal.lines},
        )
    )


def _failed_in_use(
    record: ExamRecord, engine: str, fault: EngineFault | QualifyError, running: RunningEngine, config: dict[str, Any]
) -> None:
    """It started and then failed: what its log says is worth as much as the answer."""
    refusal = explain_refusal(running.read_log(), config)
    why = str(fault) if isinstance(fault, EngineFault) else fault.problem
    record.findings.append(
        _finding(
            "FAIL",
            next(iter(refusal.fields), "first requests"),
            "engine answers",
            f"the engine starts and then fails: {why}; its log: {refusal.sentence}; to do: {refusal.advice}",
            measured=fault.kind if isinstance(fault, EngineFault) else "no model",
            limit="answers",
            limit_source=f"the target engine is {engine}",
            details={"fields": refusal.fields, "log": refusal.lines},
        )
    )


def _compare(
    client: EngineClient,
    identity: EngineIdentity,
    planned: PlannedModel,
    model: Path,
    seed: int,
    record: ExamRecord,
) -> None:
    limits, truth = _LIMITS[planned.recipe.handoff.dtype], reference_scores(model)
    if not identity.scores_prompts:
        record.not_covered.append(f"log-probs of prompts: {identity.score_refusal or 'the engine gives none'}")
    rng, longest = random.Random(seed), identity.max_length or planned.config.max_position_embeddings
    lengths = [length for length in _PROMPT_LENGTHS if length + _NUM_NEW < longest]
    if not identity.gives_scores:
        record.not_covered.append("whether it computes the same: the engine gives no log-probs at all")
        record.coverage["prompts compared"] = Coverage(0, len(lengths), LEAST_COVERAGE)
        return
    worst: tuple[list[int], ScoreComparison] | None = None
    made = 0
    for length in lengths:
        ids = _random_ids(rng, planned.config.vocab_size, length)
        compared = compare_scores(*_both_scores(client, identity, ids, truth), limits)
        made += compared.num > 0
        record.num_checks["log-probs"] = record.num_checks.get("log-probs", 0) + compared.num
        record.measurements.append(
            {"what": "dry voyage", "length": length, "mean": compared.mean, "largest": compared.largest}
        )
        if compared.verdict == "FAIL" and (worst is None or compared.mean > worst[1].mean):
            worst = ids, compared
    record.coverage["prompts compared"] = Coverage(made, max(1, len(lengths)), LEAST_COVERAGE)
    # On the very prompt that differs: what a change does depends on the length.
    seen = sensitivities(model, worst[0] if worst else _random_ids(rng, planned.config.vocab_size, 64))
    record.measurements.append({"what": "sensitivity", "limit": limits.mean, **seen})
    record.not_covered += [
        f"{part}: random weights do not show it ({mean:.2g} nats when it is changed)"
        for part, mean in seen.items()
        if mean <= limits.mean
    ]
    if worst is not None:
        _scores_differ(record, len(worst[0]), worst[1], limits, seen)


def _random_ids(rng: random.Random, vocab_size: int, length: int) -> list[int]:
    return [rng.randrange(4, min(256, vocab_size)) for _ in range(length)]


def _both_scores(
    client: EngineClient, identity: EngineIdentity, ids: list[int], truth: Callable[[list[int]], Scores]
) -> tuple[Scores, Scores]:
    """The model's log-probs and the engine's: of the prompt, or, where engines score none, of tokens that they add.

    Raises:
        EngineFault: no answer, one with log-probs that none can be, or with tokens that the model does not have.
    """
    if identity.scores_prompts:
        return truth(ids), _ask(client, identity, ids, 1, echo=True).logprobs[: len(ids)]
    answer = _ask(client, identity, ids, _NUM_NEW)
    if len(answer.ids) == _NUM_NEW:
        return _expected(truth, ids + answer.ids)[len(ids) :], answer.logprobs
    # llama.cpp leaves out tokens that are parts of a character, so that none has a place: each is asked for by itself.
    expected, scores = list[float | None](), list[float | None]()
    for end in range(max(1, len(ids) - _NUM_NEW + 1), len(ids) + 1):
        single = _ask(client, identity, ids[:end], 1)
        if len(single.ids) == 1:
            expected.append(_expected(truth, ids[:end] + single.ids)[-1])
            scores += single.logprobs
    return expected, scores


def _expected(truth: Callable[[list[int]], Scores], ids: list[int]) -> Scores:
    try:
        return truth(ids)
    except QualifyError as error:  # it chose a token that the model does not have
        raise EngineFault("garbage", error.problem) from None


def _ask(client: EngineClient, identity: EngineIdentity, ids: list[int], num_new: int, **more: Any) -> Answer:
    asked = {"logprobs": 1, "max_tokens": num_new, "temperature": 0, "ignore_eos": True, **more}
    body = {"model": identity.model, "prompt": ids, **asked, "return_tokens_as_token_ids": True}
    answer = read_answer(client.post("/v1/completions", body), "/v1/completions", body)
    strange = impossible_scores(answer.tokens)
    if strange is not None:
        raise EngineFault("garbage", strange, "/v1/completions", body)
    return answer


def _scores_differ(
    record: ExamRecord, length: int, compared: ScoreComparison, limits: Limits, seen: dict[str, float]
) -> None:
    alike = [part for part in seen if compared.mean / _ALIKE <= seen[part] <= compared.mean * _ALIKE]
    alike.sort(key=lambda part: abs(math.log(seen[part] / compared.mean)))
    suspects = (
        f"Changes of about this size come, for one, from: {', '.join(alike[:3])}"
        if alike and math.isfinite(compared.mean)
        else "No single field of those that were tried changes as much: its arithmetic, its cache or a weight may"
    )
    record.findings.append(
        _finding(
            "FAIL",
            f"prompt of {length} tokens",
            "log-probs",
            f"the engine loads the model and computes something else: {compared.mean:.3g} nats off on the average, "
            f"{compared.largest:.3g} at most. {suspects}",
            measured=compared.mean,
            limit=limits.mean,
            limit_source=limits.source,
            details={"largest": compared.largest, "sensitivities": seen, "suspects": alike[:3]},
        )
    )


def _finding(verdict: Verdict, subject: str, check: str, message: str, **more: Any) -> Finding:
    return Finding(EXAM, "serving", verdict, subject, check, message, critical=True, found_at=time.time(), **more)
