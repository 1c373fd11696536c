"""Certificates on the run's page and in the summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from crosschip.certificate.document import seal_of, write_certificate
from crosschip.certificate.signing import make_key, sign
from crosschip.report.certificates import view_certificate
from tests.certificate.conftest import replay_of


def document(verdict: str = "PASS") -> dict[str, Any]:
    written: dict[str, Any] = {
        "schema_version": 1,
        "made_at": "2026-01-01T00:00:00+0000",
        "verdict": verdict,
        "target": {"name": "hf", "dtype": "float32", "computed_in": "float32"},
        "source": {},
        "files": [{"name": "model.safetensors", "bytes": 8, "sha256": "0" * 64}],
        "golden": {},
        "gates": [
            {"name": "generation health", "verdict": "NOT COVERED", "message": "not examined"},
            {"name": "tensor manifest", "verdict": verdict, "message": "all 3 tensors"},
        ],
        "replays": [replay_of(verdict=verdict, message="within")],
        "not_covered": [],
    }
    return written | {"seal": seal_of(written)}


@pytest.mark.parametrize(
    ("verdict", "state"),
    [("PASS", "good"), ("PASS WITH LIMITS", "good"), ("INCONCLUSIVE", "warn"), ("FAIL", "bad")],
)
def test_verdict_gates_and_replays_are_shown(tmp_path: Path, verdict: str, state: str) -> None:
    write_certificate(tmp_path, document(verdict))
    view = view_certificate(tmp_path)
    assert (view.verdict, view.state) == (verdict, state)
    assert view.sentence == f"certificate {verdict}, not signed"
    assert [row[0] for row in view.rows] == [
        "tensor manifest", "generation health", "replay through native on cpu in float32"
    ]  # fmt: skip


def test_who_signed_is_shown(tmp_path: Path) -> None:
    make_key(tmp_path / "key")
    (tmp_path / "files").mkdir()
    signed = document()
    write_certificate(tmp_path / "files", signed | {"signature": sign(signed, tmp_path / "key")})
    assert "signed by " in view_certificate(tmp_path / "files").sentence
    assert "not signed" not in view_certificate(tmp_path / "files").sentence


def test_files_without_a_certificate_or_with_an_altered_one_are_uncertified(tmp_path: Path) -> None:
    assert view_certificate(tmp_path).verdict == "UNCERTIFIED"
    write_certificate(tmp_path, document() | {"verdict": "PASS WITH LIMITS"})
    view = view_certificate(tmp_path)
    assert (view.verdict, view.state) == ("UNCERTIFIED", "bad")
    assert "altered" in view.rows[0][2]
