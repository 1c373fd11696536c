"""What an exam found, and how findings roll up into a verdict. Documents only: no torch.

The rules are those of every report: any FAIL makes the role FAIL; otherwise it is INCONCLUSIVE only if a critical
operator or a whole exam is; otherwise PASS or PASS WITH LIMITS.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from crosschip.errors import EXIT_FAIL, EXIT_INCONCLUSIVE, EXIT_OK

__all__ = [
    "EXIT_CODES",
    "LEAST_COVERAGE",
    "Coverage",
    "ExamRecord",
    "Finding",
    "Kind",
    "Role",
    "Tier",
    "Verdict",
    "roll_up",
    "worst_first",
]

Verdict = Literal["PASS", "PASS WITH LIMITS", "FAIL", "INCONCLUSIVE"]
Kind = Literal["software", "numerics", "stability", "links", "handoff", "serving"]
Role = Literal["train", "serve"]
Tier = Literal["smoke", "standard", "soak"]

EXIT_CODES: dict[Verdict, int] = {
    "PASS": EXIT_OK,
    "PASS WITH LIMITS": EXIT_OK,
    "FAIL": EXIT_FAIL,
    "INCONCLUSIVE": EXIT_INCONCLUSIVE,
}
_RANK: dict[Verdict, int] = {"FAIL": 0, "INCONCLUSIVE": 1, "PASS WITH LIMITS": 2, "PASS": 3}


@dataclass(frozen=True)
class Finding:
    """One thing that an exam has to say about one subject: an operator, a shape, a layer, a dtype.

    `measured` and `limit` are numbers or short words in the same unit, `limit_source` says where the limit comes from,
    `severity` orders findings of one verdict (for a ratio: measured over limit; larger is worse), `reproducer` is the
    name of a file in the report's directory of reproducers; in a report it is the whole path.
    """

    exam: str
    kind: Kind
    verdict: Verdict
    subject: str
    check: str
    message: str
    measured: float | str | None = None
    limit: float | str | None = None
    limit_source: str = ""
    critical: bool = False
    severity: float = 1.0
    reproducer: str | None = None
    not_covered: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    found_at: float | None = None  # seconds since the epoch; in a report `found_after_s`, since its beginning

    def document(self) -> dict[str, Any]:
        """The finding for JSON."""
        return asdict(self)

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> Finding:
        """Read a finding back."""
        return cls(**document)


LEAST_COVERAGE = 0.5


@dataclass(frozen=True)
class Coverage:
    """How much of a plan an exam reached within its time, and the share that its verdict needs."""

    made: int
    planned: int
    least: float

    @property
    def is_enough(self) -> bool:
        """Whether the share suffices for a verdict."""
        return self.made >= self.least * self.planned

    def sentence(self, what: str) -> str:
        """What is missing, in words."""
        needed = (
            ""
            if self.is_enough
            else f"; a verdict needs {self.least:.0%}: give it more time (--minutes, a longer tier)"
        )
        return f"{what}: {self.planned - self.made} of {self.planned}, for lack of time{needed}"


@dataclass
class ExamRecord:
    """What is known of one exam, also when it ended early: `ended` is `complete`, `budget`, `crash`, `hang`, ..."""

    exam: str
    findings: list[Finding] = field(default_factory=list)
    num_checks: dict[str, int] = field(default_factory=dict)  # checks made, by check
    measurements: list[dict[str, Any]] = field(default_factory=list)  # for pages and comparisons
    not_covered: list[str] = field(default_factory=list)
    coverage: dict[str, Coverage] = field(default_factory=dict)  # by plan
    ended: str = "complete"
    time_s: float = 0.0

    @property
    def verdict(self) -> Verdict:
        """The exam's own verdict: one that checked nothing or too little, or did not end, is at best inconclusive."""
        verdict = roll_up(self.findings)
        too_little = any(not each.is_enough for each in self.coverage.values())
        unfinished = self.ended != "complete" or too_little or not (self.num_checks or self.findings)
        return "INCONCLUSIVE" if unfinished and verdict != "FAIL" else verdict

    def _cut(self) -> list[str]:
        """What the time cut, in words; what makes the exam inconclusive first."""
        cut = [(what, each) for what, each in self.coverage.items() if each.made < each.planned]
        return [each.sentence(what) for what, each in sorted(cut, key=lambda pair: pair[1].is_enough)]

    def document(self) -> dict[str, Any]:
        """The exam for JSON, without its findings, which the report lists together."""
        return {
            "exam": self.exam,
            "verdict": self.verdict,
            "ended": self.ended,
            "time_s": round(self.time_s, 3),
            "num_checks": dict(sorted(self.num_checks.items())),
            "coverage": {what: asdict(each) for what, each in self.coverage.items()},
            "not_covered": [*self._cut(), *self.not_covered],
            "measurements": self.measurements,
        }


def roll_up(findings: Iterable[Finding], exams: Iterable[ExamRecord] = ()) -> Verdict:
    """The verdict over findings and, for a role, over its exams."""
    found = list(findings)
    verdicts = {finding.verdict for finding in found}
    if "FAIL" in verdicts:
        return "FAIL"
    if any(finding.verdict == "INCONCLUSIVE" and finding.critical for finding in found):
        return "INCONCLUSIVE"
    if any(exam.verdict == "INCONCLUSIVE" for exam in exams):
        return "INCONCLUSIVE"
    return "PASS WITH LIMITS" if verdicts & {"PASS WITH LIMITS", "INCONCLUSIVE"} else "PASS"


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Findings by verdict, critical ones first within one, then by severity."""

    def order(finding: Finding) -> tuple[int, bool, float]:
        severity = math.inf if math.isnan(finding.severity) else finding.severity
        return _RANK[finding.verdict], not finding.critical, -severity

    return sorted(findings, key=order)
