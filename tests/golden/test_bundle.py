"""A bundle is written whole or not at all, and one that was cut, altered or made by a newer crosschip is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from crosschip.errors import GoldenError
from crosschip.golden.bundle import ARRAYS_FILE, MANIFEST_FILE, load_bundle, write_bundle
from crosschip.rundir import COMPLETE


def truncate(path: Path) -> None:
    file = path / ARRAYS_FILE
    file.write_bytes(file.read_bytes()[:-1000])


def flip_a_byte(path: Path) -> None:
    file = path / ARRAYS_FILE
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def edit_a_number(path: Path) -> None:
    manifest = json.loads((path / MANIFEST_FILE).read_text())
    manifest["noise_floor"]["mean_kl"] = 1.0
    (path / MANIFEST_FILE).write_text(json.dumps(manifest))


def make_newer(path: Path) -> None:
    manifest = json.loads((path / MANIFEST_FILE).read_text())
    (path / MANIFEST_FILE).write_text(json.dumps({**manifest, "schema_version": 99}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "was cut or altered: its SHA-256"),
        (flip_a_byte, "was cut or altered: its SHA-256"),
        (lambda path: (path / ARRAYS_FILE).unlink(), f"{ARRAYS_FILE} is missing"),
        (lambda path: (path / MANIFEST_FILE).unlink(), f"{MANIFEST_FILE} is missing"),
        (lambda path: (path / MANIFEST_FILE).write_text("{"), "is not JSON"),
        (lambda path: (path / MANIFEST_FILE).write_text("[]"), "is no manifest"),
        (lambda path: (path / COMPLETE).unlink(), "has no COMPLETE"),
        (edit_a_number, "its seal does not fit"),
        (make_newer, "has schema version 99, this crosschip reads up to 1"),
        (shutil.rmtree, "there is no golden bundle"),
    ],
)
def test_a_damaged_bundle_is_refused_with_the_reason(
    bundle_dir: Path, tmp_path: Path, damage: Callable[[Path], object], reason: str
) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle_dir, copy)
    load_bundle(copy)  # a whole copy is taken
    damage(copy)
    with pytest.raises(GoldenError) as refused:
        load_bundle(copy)
    assert reason in refused.value.problem


def test_what_is_not_a_bundle_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("all my work")
    with pytest.raises(GoldenError, match="is not a golden bundle"):
        write_bundle(tmp_path / "thesis", {}, {"a": np.zeros(1)})
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "all my work"


def test_a_failed_recording_leaves_the_older_bundle(bundle_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle_dir, copy)
    with pytest.raises(TypeError):
        write_bundle(copy, {"not JSON": object()}, {"a": np.zeros(1)})
    assert load_bundle(copy).manifest == load_bundle(bundle_dir).manifest
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_rows_can_be_taken_out(bundle_dir: Path) -> None:
    whole = load_bundle(bundle_dir)
    part = whole.of_rows([4, 1])
    assert part.rows == [whole.rows[1], whole.rows[4]]
    start = sum(whole.lengths[:4])
    own = whole.arrays["topk_logprobs"][start : start + whole.lengths[4]]
    assert np.array_equal(part.arrays["topk_logprobs"][part.lengths[0] :], own)
