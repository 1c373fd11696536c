"""What a gate of the handoff says: its verdict, each number with its limit and the limit's source, what it left out."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from crosschip.certificate.document import NOT_COVERED
from crosschip.errors import printable

__all__ = ["GATES", "NOT_COVERED", "Gate", "Measure", "gate_of", "not_covered", "plain"]

# In the order of docs/handoff.md: cheap and certain ones first, since each explains failures of those behind it.
GATES = (
    "tensor manifest",
    "configuration fields",
    "golden replay",
    "answer-level scores",
    "generation health",
    "overwrite",
    "write-read",
    "tokenizer and chat template",
)


@dataclass(frozen=True)
class Measure:
    """One number. `limit` None: it is reported and not judged."""

    what: str
    value: float | int | str
    limit: float | int | str | None = None
    limit_source: str = ""

    def document(self) -> dict[str, Any]:
        """The number for JSON, which has no infinity."""
        return {key: plain(value) for key, value in asdict(self).items()}


@dataclass(frozen=True)
class Gate:
    """One gate. `subject` is the tensor, field, file or layer that explains a failure."""

    name: str
    verdict: str  # one of crosschip.certificate.document.VERDICTS, or NOT COVERED
    message: str
    subject: str | None = None
    measures: list[Measure] = field(default_factory=list)
    not_covered: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """The gate for JSON."""
        return {
            "name": self.name,
            "verdict": self.verdict,
            "message": self.message,
            "subject": self.subject,
            "measures": [measure.document() for measure in self.measures],
            "not_covered": self.not_covered,
        }


def gate_of(document: dict[str, Any]) -> Gate:
    """Read a gate of a certificate back."""
    measures = [Measure(**measure) for measure in document["measures"]]
    return Gate(**{**document, "measures": measures, "not_covered": [str(each) for each in document["not_covered"]]})


def not_covered(name: str, why: str) -> Gate:
    """A gate that nobody went through, and why."""
    return Gate(name, NOT_COVERED, why)


def plain(value: Any) -> Any:
    """Numbers that are not finite as words, and no half of a character: JSON has neither, and others read it."""
    if isinstance(value, dict):
        return {printable(str(key)): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, str):
        return printable(value)
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
