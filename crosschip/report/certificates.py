"""Certificates of handed-off models as a run's page and the end of a voyage show them."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

from crosschip.certificate.document import NOT_COVERED, PASSED, Certificate, read_certificate
from crosschip.certificate.signing import key_id
from crosschip.errors import CrosschipError

__all__ = ["CertificateView", "view_certificate"]


@dataclass(frozen=True)
class CertificateView:
    """`state` is good, warn or bad, for the page; `rows` are gates and replays: what, verdict, words."""

    verdict: str
    state: str
    made_at: str
    signed_by: str
    rows: list[tuple[str, str, str]]

    @property
    def sentence(self) -> str:
        """One line."""
        signed = f"signed by {self.signed_by}" if self.signed_by else "not signed"
        return f"certificate {self.verdict}, {signed}"


def view_certificate(directory: Path) -> CertificateView:
    """The certificate beside handed-off files; where there is none that can be read, the reason.

    Only what it says is shown; whether the files are still those, `crosschip handoff verify` finds out.
    """
    try:
        certificate = read_certificate(directory)
    except CrosschipError as error:
        return CertificateView("UNCERTIFIED", "bad", "", "", [("certificate", "UNCERTIFIED", error.problem)])
    verdict = certificate.verdict
    state = "good" if verdict in PASSED else "bad" if verdict == "FAIL" else "warn"
    signed_by = _signed_by(certificate)
    return CertificateView(verdict, state, str(certificate.document["made_at"]), signed_by, _rows(certificate))


def _signed_by(certificate: Certificate) -> str:
    if certificate.signature is None:
        return ""
    try:
        return key_id(base64.b64decode(str(certificate.signature.get("public_key"))))
    except ValueError:
        return "a key that cannot be read"


def _rows(certificate: Certificate) -> list[tuple[str, str, str]]:
    gates = [each for each in certificate.document["gates"] if isinstance(each, dict)]
    gates.sort(key=lambda each: each.get("verdict") == NOT_COVERED)
    rows = [(str(each.get("name")), str(each.get("verdict")), str(each.get("message"))) for each in gates]
    for replay in certificate.replays:
        engine = replay.get("engine", {})
        where = f"replay through {engine.get('name')} on {replay.get('chip') or 'an unknown chip'}"
        rows.append((f"{where} in {replay.get('dtype')}", str(replay.get("verdict")), str(replay.get("message"))))
    return rows
