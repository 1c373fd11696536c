"""The serving exam from beginning to end: who answers, its own noise, then probe after probe; always a report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crosschip.errors import ModelError, QualifyError
from crosschip.qualify.finding import ExamRecord, Finding, Tier
from crosschip.qualify.report_document import ReportHead, report_document, reproducers_of
from crosschip.qualify.serving.client import EngineClient, EngineFault
from crosschip.qualify.serving.ending import examine_reasoning, examine_stopping
from crosschip.qualify.serving.identity import EngineIdentity, identify_engine
from crosschip.qualify.serving.judge import Noise, limits_from
from crosschip.qualify.serving.ladder import examine_ladder, measure_limits
from crosschip.qualify.serving.prompts import QUESTIONS, Prompts, make_prompts
from crosschip.qualify.serving.repeating import examine_batching, examine_determinism, examine_prefix_cache
from crosschip.qualify.serving.sitting import Sitting, UnreachableError
from crosschip.qualify.serving.streaming import examine_streaming, examine_utf8
from crosschip.rundir import write_json

__all__ = ["PROBES", "EngineRequest", "examine_engine"]

ServingProbe = Callable[[Sitting], None]

# In this order: what is asked first is what every later probe relies on. The number is the share of the time.
PROBES: dict[str, tuple[ServingProbe, float]] = {
    "serving_determinism": (examine_determinism, 10),
    "serving_ladder": (examine_ladder, 40),
    "serving_batching": (examine_batching, 15),
    "serving_prefix_cache": (examine_prefix_cache, 10),
    "serving_streaming": (examine_streaming, 8),
    "serving_stopping": (examine_stopping, 8),
    "serving_utf8": (examine_utf8, 8),
    "serving_reasoning": (examine_reasoning, 20),
}
TIME_S: dict[Tier, float] = {"smoke": 120.0, "standard": 900.0, "soak": 1800.0}
_GOLDEN_WEIGHT = 40.0
_DEFAULT_LENGTH = 4096  # where the engine does not say how long a prompt may be
_GRACE_S = 30.0  # beyond the time, for the request under way


@dataclass(frozen=True)
class EngineRequest:
    """What is to be examined. `model` is the directory of the served model, `golden` a golden bundle's directory.

    `random_weights`: no answer can be expected to end. `silence_s` and `total_s` limit one request.
    """

    url: str
    report: Path = Path("qualify-engine.json")
    model: Path | None = None
    golden: Path | None = None
    tier: Tier = "smoke"
    seed: int = 0
    random_weights: bool = False
    questions: tuple[str, ...] = QUESTIONS
    max_answer_tokens: int = 512
    probes: tuple[str, ...] = tuple(PROBES)
    time_s: float | None = None
    max_length: int | None = None  # instead of what the engine says
    api_key: str | None = None
    silence_s: float = 120.0  # a request that waits behind others is silent as well
    total_s: float = 300.0

    @property
    def limit_s(self) -> float:
        """Wall time of the whole exam."""
        return self.time_s or TIME_S[self.tier]


def examine_engine(request: EngineRequest, tell: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Examine the engine, write the report to `request.report`, reproducers beside it; return the report.

    The document is that of `crosschip qualify`: role `serve`, the chip is the engine's address and name.

    Raises:
        QualifyError: an address that makes no sense, leads elsewhere or lists no model; an engine that wants a key.
        GoldenError: a golden bundle that was cut, altered or made for other weights than `model`.
    """
    for name in request.probes:
        if name not in PROBES:
            raise QualifyError(f"there is no serving probe {name!r}", f"choose among {', '.join(PROBES)}")
    replay = _open_bundle(request)  # before anything is asked: a bundle that is no good is refused at once
    client = EngineClient(request.url, api_key=request.api_key, silence_s=request.silence_s, total_s=request.total_s)
    going = _Going(request, client, tell, replay)
    try:
        tell(f"asking {request.url} who it is")
        going.identity = identify_engine(client)
        _take_probes(going)
        going.complete = True
    except EngineFault as fault:
        going.records.append(_unusable(request, fault))
        going.complete = True
    finally:
        client.close()
        going.write()
    return going.document()


@dataclass
class _Going:
    """An exam under way, and its report so far, which is written anew after each part."""

    request: EngineRequest
    client: EngineClient
    tell: Callable[[str], None]
    replay: ServingProbe | None
    identity: EngineIdentity | None = None
    records: list[ExamRecord] = field(default_factory=list)
    began_at: float = field(default_factory=time.time)
    complete: bool = False

    def document(self) -> dict[str, Any]:
        head = _head(self.request, self.identity, self.began_at)
        return report_document(head, self.records, time.time() - self.began_at, self.complete)

    def write(self) -> None:
        if self.records:
            write_json(self.request.report, self.document())


def _open_bundle(request: EngineRequest) -> ServingProbe | None:
    """How the golden bundle is replayed, if one is given; reading it needs torch, which only then is loaded."""
    if request.golden is None:
        return None
    from crosschip.qualify.serving.golden_bundle import open_replay

    return open_replay(request.golden, request.model, request.api_key).examine


def _head(request: EngineRequest, identity: EngineIdentity | None, began_at: float) -> ReportHead:
    """Engines serve one model under different names; its directory, where it is given, names it as it does for chips.

    The name that the engine serves it under stands in the fingerprint.
    """
    served = identity.model if identity else "unknown model"
    return ReportHead(
        chip=identity.chip if identity else request.url,
        role="serve",
        tier=request.tier,
        subject=request.model.resolve().name if request.model else served,
        origin=str(request.model or request.url),
        report=request.report,
        began_at=began_at,
        seed=request.seed,
        fingerprint={"engine": identity.document()} if identity else None,
    )


def _unusable(request: EngineRequest, fault: EngineFault) -> ExamRecord:
    """The engine could not even be asked: nobody there or a busy one is inconclusive, one that fails is a failure."""
    is_open = fault.kind == "unreachable" or fault.is_busy
    finding = Finding(
        exam="serving",
        kind="serving",
        verdict="INCONCLUSIVE" if is_open else "FAIL",
        subject=f"engine {request.url}",
        check=fault.kind,
        message=f"the engine cannot be asked: {fault}" + ("; wait until it is ready" if fault.is_busy else ""),
        measured=fault.kind,
        limit="a list of models and a first answer",
        limit_source="without them nothing can be examined",
        critical=True,
        found_at=time.time(),
    )
    return ExamRecord("serving", [finding], {"answers": 0}, not_covered=["everything else"], ended="crash")


def _take_probes(going: _Going) -> None:
    request, client, identity = going.request, going.client, going.identity
    assert identity is not None
    until = time.monotonic() + request.limit_s
    client.deadline = until + _GRACE_S
    prompts = make_prompts(client, identity, request.seed)
    sitting = _sitting(request, client, identity, prompts, ExamRecord("serving_noise"), until)
    going.records.append(sitting.record)
    programme = [(name, *PROBES[name]) for name in request.probes]
    if going.replay is not None:
        programme.append(("serving_golden", going.replay, _GOLDEN_WEIGHT))
    try:
        _prepare(sitting, request)
        for place, (name, probe, weight) in enumerate(programme):
            share = weight / sum(each[2] for each in programme[place:])
            _take_probe(going, sitting, name, probe, share * (until - time.monotonic()))
    except UnreachableError:
        sitting.record.ended = "crash"
        sitting.record.not_covered.append("all that would have followed: nobody answers any more")


def _sitting(
    request: EngineRequest,
    client: EngineClient,
    identity: EngineIdentity,
    prompts: Prompts,
    record: ExamRecord,
    until: float,
) -> Sitting:
    return Sitting(
        client=client,
        identity=identity,
        prompts=prompts,
        tier=request.tier,
        reproducers=reproducers_of(request.report),
        limits=limits_from(Noise(0.0, 0.0, 0)),
        record=record,
        until=until,
        questions=request.questions,
        random_weights=request.random_weights,
        max_answer_tokens=min(request.max_answer_tokens, (identity.max_length or _DEFAULT_LENGTH) // 2),
        max_length=request.max_length or identity.max_length or _DEFAULT_LENGTH,
    )


def _prepare(sitting: Sitting, request: EngineRequest) -> None:
    """Measure the engine's noise, and load the model where it is at hand."""
    began = time.monotonic()

    def measure() -> None:
        sitting.limits = measure_limits(sitting)
        sitting.checked("noise")

    sitting.part("short prompts, for the noise", measure)
    if not sitting.identity.takes_ids:
        sitting.record.not_covered.append("prompts of token ids: the engine takes none")
    if request.model is not None:
        from crosschip.qualify.serving.reference import reference_scores  # torch, only where a model is given

        try:
            sitting.reference = reference_scores(request.model)
        except ModelError as error:
            sitting.record.not_covered.append(f"the model's own log-probs: {error.problem}")
    sitting.record.time_s = time.monotonic() - began


def _take_probe(going: _Going, sitting: Sitting, name: str, probe: ServingProbe, budget_s: float) -> None:
    going.tell(f"{name} (up to {max(0.0, budget_s):.0f} s)")
    began = time.monotonic()
    sitting.record, sitting.until = ExamRecord(name), began + budget_s
    going.records.append(sitting.record)
    try:
        probe(sitting)
    finally:
        sitting.record.time_s = time.monotonic() - began
        going.write()
