"""A small directory with a certificate that was written by hand, so that no test here needs torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from crosschip.certificate.document import seal_of, write_certificate
from crosschip.certificate.files import files_of, hash_files
from crosschip.certificate.signing import make_key, sign

CHIP = "cpu (Intel, Xeon)"

Certified = Callable[..., Path]


def replay_of(**changes: Any) -> dict[str, Any]:
    limit = {"what": "mean KL", "value": 1e-7, "limit": 1e-6, "limit_source": "stated"}
    return {
        "verdict": "PASS",
        "engine": {"name": "native"},
        "chip": "cpu",
        "chip_kind": CHIP,
        "dtype": "float32",
        "message": "",
        "subject": None,
        "views": [{"name": "all", "positions": 7, "measures": [limit]}],
        "not_covered": [],
        **changes,
    }


def document_of(directory: Path, **changes: Any) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "made_at": "2026-01-01T00:00:00+0000",
        "verdict": "PASS",
        "target": {"name": "hf", "dtype": "float32", "computed_in": "float32"},
        "source": {"kind": "run"},
        "files": [asdict(each) for each in hash_files(directory, files_of(directory))],
        "golden": {"seal": "s"},
        "gates": [{"name": "tensor manifest", "verdict": changes.get("verdict", "PASS"), "message": "all there"}],
        "replays": [replay_of()],
        "not_covered": [],
        **changes,
    }


@pytest.fixture
def certified(tmp_path: Path) -> Certified:
    """A directory of two files with a certificate; `key` signs it, other keywords replace its fields."""

    def make(key: Path | None = None, **changes: Any) -> Path:
        directory = tmp_path / "model"
        (directory / "sub").mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text("{}")
        (directory / "sub" / "model.safetensors").write_bytes(bytes(range(256)) * 8)
        document = document_of(directory, **changes)
        if key is not None:
            document["signature"] = sign(document, key)
        document["seal"] = seal_of(document)
        write_certificate(directory, document)
        return directory

    return make


@pytest.fixture
def key(tmp_path: Path) -> Path:
    make_key(tmp_path / "key")
    return tmp_path / "key"
