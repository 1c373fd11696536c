"""What a resume reads out of logs whose last lines may be cut or long."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from crosschip.train.guard.run_files import last_logged_step


def line(step: int, length: int) -> str:
    return json.dumps({"step": step, "engines": "x" * length}) + "\n"


@pytest.mark.parametrize("length", [0, 3_000, 5_000, 20_000])
@pytest.mark.parametrize("torn", ["", '{"step": 9, "eng', "{" + "y" * 9_000])
def test_the_last_whole_line_counts_however_long_it_is(tmp_path: Path, length: int, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(line(step, length) for step in (6, 7, 8)) + torn)
    assert last_logged_step(path) == 8


def test_no_line_is_step_zero(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_logged_step(path) == 0
    path.write_text('{"step": 1')
    assert last_logged_step(path) == 0


@pytest.mark.parametrize(
    "spoilt",
    [
        b"\xff\xfe\n",
        b'{"stfp": 8}\n',
        b'{"step": 8, "loss": 1..0}\n',
        b"8\n",
        b"\0" * 5000 + b"\n",
        b"[" * 100_000 + b"\n",
    ],
)
def test_a_line_that_cannot_be_read_is_passed_over(tmp_path: Path, spoilt: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes((line(6, 10) + line(7, 10)).encode() + spoilt)
    assert last_logged_step(path) == 7
