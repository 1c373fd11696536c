"""What every probe is given: the engine, prompts, limits, the record it writes into, and the time that is left."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crosschip.qualify.finding import LEAST_COVERAGE, Coverage, ExamRecord, Finding, Tier, Verdict
from crosschip.qualify.serving.answers import Answer, impossible_scores, read_answer, read_stream
from crosschip.qualify.serving.client import EngineClient, EngineFault, EngineRefusal, patiently
from crosschip.qualify.serving.identity import EngineIdentity
from crosschip.qualify.serving.judge import Limits
from crosschip.qualify.serving.prompts import Prompts
from crosschip.qualify.serving.reproducer import Reproduction, write_serving_reproducer

__all__ = ["Sitting", "UnreachableError"]

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
_FAULT_WORDS = {
    "unreachable": "nobody answers",
    "time-out": "the answer does not come to its end",
    "cut off": "the connection is cut off in the middle",
    "status": "the request ends in a server error",
    "redirect": "the request is sent elsewhere",
    "garbage": "the answer makes no sense",
}
_PARTS = "parts"


class UnreachableError(Exception):
    """The engine has gone: nothing more can be asked."""


@dataclass
class Sitting:
    """One exam of one engine under way; `record` is the present exam's."""

    client: EngineClient
    identity: EngineIdentity
    prompts: Prompts
    tier: Tier
    reproducers: Path
    limits: Limits
    record: ExamRecord
    until: float  # by time.monotonic
    questions: tuple[str, ...] = ()
    random_weights: bool = False
    max_answer_tokens: int = 512
    max_length: int = 4096
    reference: Callable[[list[int]], list[float | None]] | None = None  # scores of a prompt by a known model
    faults: set[tuple[str, str]] = field(default_factory=set)
    _counting: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def remaining_s(self) -> float:
        """Seconds that are left for the present exam."""
        return self.until - time.monotonic()

    def limits_document(self) -> dict[str, float]:
        """The limits as parameters of a reproducer's check."""
        return {"mean": self.limits.mean, "point": self.limits.point}

    def generation_body(self, ids: list[int], num_new: int, **more: Any) -> dict[str, Any]:
        """A greedy completion of token ids that does not end early, with log-probs where the engine gives them."""
        scored = {"logprobs": 5, "return_tokens_as_token_ids": True} if self.identity.gives_scores else {}
        asked = {"max_tokens": num_new, "temperature": 0, "ignore_eos": True}
        return {"model": self.identity.model, "prompt": ids, **asked, **scored, **more}

    def score_body(self, ids: list[int], num_new: int = 1, **more: Any) -> dict[str, Any]:
        """The same with the prompt's own log-probs before it."""
        return self.generation_body(ids, num_new, echo=True, **{"logprobs": 2, **more})

    def ask(self, body: dict[str, Any], path: str = COMPLETIONS) -> Answer:
        """A whole answer; scores that no distribution can have are a fault of kind `garbage`.

        Raises:
            EngineFault: no answer came, or an impossible one.
        """
        answer = read_answer(patiently(lambda: self.client.post(path, body)), path, body)
        impossible = impossible_scores(answer.tokens)
        if impossible is not None:
            raise EngineFault("garbage", impossible, path, body)
        self.checked("answers")
        return answer

    def ask_stream(self, body: dict[str, Any], path: str = COMPLETIONS) -> Answer:
        """The same answer, streamed, with the usage at its end."""
        asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
        return read_stream(patiently(lambda: self.client.stream(path, asked)), path, asked)

    def checked(self, check: str, number: int = 1) -> None:
        """Count checks."""
        if number == 0:  # an exam that checked nothing must not look as if it had
            return
        with self._counting:  # answers may come in several threads
            self.record.num_checks[check] = self.record.num_checks.get(check, 0) + number

    def measured(self, **measurement: Any) -> None:
        """Keep a number for pages."""
        self.record.measurements.append({name: _in_json(value) for name, value in measurement.items()})

    def found(
        self,
        verdict: Verdict,
        subject: str,
        check: str,
        message: str,
        *,
        measured: float | str | None = None,
        limit: float | str | None = None,
        limit_source: str = "",
        reproduction: Reproduction | None = None,
        details: dict[str, Any] | None = None,
        severity: float | None = None,
    ) -> None:
        """Report a finding, with a file that shows it where the engine shows it again.

        `severity` is the ratio of the two numbers, where it is not given.
        """
        reproducer = None
        shown = any(each.check == check and each.reproducer for each in self.record.findings)
        if reproduction is not None and not shown:  # one file for each kind of failure is enough
            slug = f"{self.record.exam}-{subject}-{check}"
            reproducer = write_serving_reproducer(
                self.reproducers, slug, f"{subject}: {message}", self.identity.chip, self.client.url, reproduction
            )
        self.record.findings.append(
            Finding(
                exam=self.record.exam,
                kind="serving",
                verdict=verdict,
                subject=subject,
                check=check,
                message=message,
                measured=_in_json(measured),
                limit=limit,
                limit_source=limit_source,
                critical=verdict in ("FAIL", "INCONCLUSIVE"),
                severity=_severity(measured, limit) if severity is None else severity,
                reproducer=reproducer,
                details={name: _in_json(value) for name, value in (details or {}).items()},
                found_at=time.time(),
            )
        )

    def part(self, subject: str, run: Callable[[], None]) -> None:
        """Run a part of an exam; a request without a proper answer becomes a finding, and the exam goes on.

        A part for which no time is left is not begun; the exam's coverage says how many were.

        Raises:
            UnreachableError: nobody is there any more.
        """
        so_far = self.record.coverage.get(_PARTS, Coverage(0, 0, LEAST_COVERAGE))
        in_time = self.remaining_s > 0
        self.record.coverage[_PARTS] = Coverage(so_far.made + in_time, so_far.planned + 1, LEAST_COVERAGE)
        if not in_time:
            self.record.not_covered.append(f"{subject}: the time was over")
            return
        try:
            run()
        except EngineRefusal as refusal:
            self.record.not_covered.append(f"{subject}: the engine refuses it: {refusal.detail}")
        except EngineFault as fault:
            self._found_fault(subject, fault)
            if fault.kind == "unreachable":
                raise UnreachableError(fault.detail) from None

    def _found_fault(self, subject: str, fault: EngineFault) -> None:
        if self.client.deadline is not None and time.monotonic() > self.client.deadline and fault.kind == "time-out":
            self.record.not_covered.append(f"{subject}: the time was over")
            self.record.ended = "budget"
            return
        seen = (fault.kind, fault.detail[:60])
        if seen in self.faults:  # the same fault again: one finding is enough
            self.record.not_covered.append(f"{subject}: {fault}")
            return
        self.faults.add(seen)
        proper = fault.body is not None
        self.found(
            "FAIL",
            subject,
            fault.kind,
            f"{_FAULT_WORDS[fault.kind]}: {fault.detail}",
            measured=fault.kind,
            limit="a proper answer",
            limit_source="every request of the exam is one that the API's documentation allows",
            reproduction=Reproduction.answered(fault.path, fault.body, self.client.total_s) if proper else None,
        )


def _in_json(value: Any) -> Any:
    """JSON has no infinity and nothing that is not a number: words stand for them."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _severity(measured: float | str | None, limit: float | str | None) -> float:
    if not (isinstance(measured, float) and isinstance(limit, float) and limit > 0):
        return 1.0
    return min(measured / limit, 1e12) if not math.isnan(measured) else 1e12
