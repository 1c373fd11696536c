"""Whether a certificate speaks about what is about to be served: this engine, on this chip, in this dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosschip.certificate.document import CERTIFICATE_FILE, PASSED, Certificate
from crosschip.certificate.verifying import verify

__all__ = ["CERTIFIED", "UNCERTIFIED", "Serving", "Status", "chip_kind", "status_of"]

CERTIFIED, UNCERTIFIED = "CERTIFIED", "UNCERTIFIED"


@dataclass(frozen=True)
class Serving:
    """What is about to answer: the engine's name, the kind of chip (see `chip_kind`), the dtype of the arithmetic."""

    engine: str
    chip: str
    dtype: str


@dataclass(frozen=True)
class Status:
    """CERTIFIED, or UNCERTIFIED with the reason in words; `problem` is None for the former."""

    word: str
    problem: str | None = None

    @property
    def is_certified(self) -> bool:
        """Whether the model may be served where a certificate is required."""
        return self.word == CERTIFIED


def chip_kind(name: str, vendor: str, model_name: str | None) -> str:
    """What two chips must have in common for a replay on one to speak about the other: device type, vendor, model.

    `name` is as torch numbers it (`cuda:1`); the number is dropped. A simulated chip keeps its planted faults.
    """
    kind = name if name.startswith("sim") else name.partition(":")[0]
    return f"{kind} ({vendor}, {model_name or 'model unknown'})"


def status_of(
    directory: Path,
    serving: Callable[[Certificate], Serving],
    tell: Callable[[str], None] = lambda line: None,
    public_key: bytes | None = None,
) -> Status:
    """Verify the directory and hold its certificate's replays against what is about to be served.

    `serving` is asked only for a certificate that is valid as such; it is given the certificate. With `public_key` (32
    bytes, ed25519) only a certificate that this key signed is valid; without, anybody's is, signed or not.
    """
    if not (directory / CERTIFICATE_FILE).exists():
        return Status(UNCERTIFIED, f"no certificate: {directory} has no {CERTIFICATE_FILE}")
    verification = verify(directory, public_key, tell)
    certificate = verification.certificate
    if certificate is None or not verification.is_intact:
        others = f" (and {len(verification.problems) - 1} more)" if len(verification.problems) > 1 else ""
        return Status(UNCERTIFIED, f"the certificate does not hold: {verification.problems[0]}{others}")
    if certificate.verdict not in PASSED:
        return Status(UNCERTIFIED, f"the certificate's verdict is {certificate.verdict}{_why(certificate)}")
    return _of_coverage(certificate, serving(certificate))


def _why(certificate: Certificate) -> str:
    """The first gate that explains the verdict."""
    parts: list[dict[str, Any]] = [*certificate.document["gates"], *certificate.replays]
    first = next((each for each in parts if each["verdict"] == certificate.verdict), {})
    return f": {first['message']}" if isinstance(first.get("message"), str) and first["message"] else ""


def _of_coverage(certificate: Certificate, wanted: Serving) -> Status:
    passed = [_of_replay(each) for each in certificate.replays if each["verdict"] in PASSED]
    if wanted in passed:
        return Status(CERTIFIED)
    of_engine = [each for each in passed if each.engine == wanted.engine]
    if not of_engine:
        covered = ", ".join(dict.fromkeys(each.engine for each in passed)) or "no engine"
        return Status(UNCERTIFIED, f"the certificate covers {covered}, not the engine {wanted.engine!r}")
    of_chip = [each for each in of_engine if each.chip == wanted.chip]
    if not of_chip:
        covered = ", ".join(dict.fromkeys(each.chip for each in of_engine))
        return Status(UNCERTIFIED, f"the certificate covers the chip {covered}, not {wanted.chip}")
    covered = ", ".join(dict.fromkeys(each.dtype for each in of_chip))
    return Status(UNCERTIFIED, f"the certificate covers arithmetic in {covered}, not in {wanted.dtype}")


def _of_replay(replay: dict[str, Any]) -> Serving:
    return Serving(replay["engine"]["name"], str(replay["chip_kind"]), replay["dtype"])
