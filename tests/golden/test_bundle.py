"""A bundle is written whole or not at all, and one that was cut, altered or made by a newer crosschip is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from crosschip.errors import GoldenError
from crosschip.golden.bundle import ARRAYS_FILE, MANIFEST_FILE, load_bundle, write_bundle
from crosschip.rundir import COMPLETE, sha256_of


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


def reseal(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and seal it anew, as whoever can read this code can."""
    manifest = json.loads((path / MANIFEST_FILE).read_text())
    change(manifest)
    if manifest.get("sha256"):
        manifest["sha256"] = {ARRAYS_FILE: sha256_of(path / ARRAYS_FILE)}
    sealed = {key: value for key, value in manifest.items() if key != "seal"}
    text = json.dumps(sealed, sort_keys=True, ensure_ascii=False).encode(errors="surrogatepass")
    (path / MANIFEST_FILE).write_text(json.dumps({**sealed, "seal": hashlib.sha256(text).hexdigest()}))


@pytest.fixture
def copy(bundle_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle_dir, tmp_path / "bundle"))


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def test_a_bundle_that_is_sealed_anew_and_has_its_form_is_taken(copy: Path) -> None:
    """What a seal is not for: the checks of the form alone refuse what follows."""
    reseal(copy, lambda manifest: manifest["noise_floor"].update(mean_kl=1.0))
    assert load_bundle(copy).floor["mean_kl"] == 1.0
    reseal(copy, lambda manifest: [each.pop("projections") for each in manifest["weights"].values()])
    assert load_bundle(copy).weights  # as older ones are


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.update(source="\ud800"), "cannot be sealed"),
        (lambda m: m["config"].update(x=nested(200)), "nested over 32 deep"),
        (lambda m: m.pop("sha256"), "manifest has no sha256"),
        (lambda m: m.update(sha256=None), "manifest.sha256 is None, not an object"),
        (lambda m: m.update(sha256={}), "no SHA-256 of golden.safetensors"),
        (lambda m: m.pop("noise_floor"), "manifest has no noise_floor"),
        (lambda m: m["noise_floor"].pop("without_choices"), "manifest.noise_floor has no without_choices"),
        (lambda m: m["noise_floor"].update(mean_kl="0"), "manifest.noise_floor.mean_kl is '0', not a number"),
        (lambda m: m["noise_floor"].update(mean_kl=10**400), "not a number"),
        (lambda m: m["noise_floor"]["points"].update(norm=None), "points.norm is None, not an object"),
        (lambda m: m.update(seed=True), "manifest.seed is True, not a whole number"),
        (lambda m: m.update(rows=[5]), "manifest.rows[0] is 5, not an object"),
        (lambda m: m["rows"].pop(), "other lengths than the manifest says"),
        (lambda m: m.update(curve=[]), "manifest.curve is a list, not an object"),
        (lambda m: m["curve"]["loss"].pop(), "the training curve has 5 losses and 6 norms, not 6"),
        (lambda m: m["curve_plan"].update(x=1), "curve_plan has a field 'x'"),
        (lambda m: m.update(config=[]), "manifest.config is a list, not an object"),
        (lambda m: next(iter(m["weights"].values())).update({"projections?": []}), "has a field 'projections?'"),
        (lambda m: m["weights"].update({"a.weight": {}}), "manifest.weights.a.weight has no dtype"),
        (lambda m: next(iter(m["weights"].values())).update(x=1), "has a field 'x'"),
        (lambda m: next(iter(m["weights"].values())).update(projections=3), "projections is 3, not a list"),
        (lambda m: m.update(top_k=3), "topk_ids has a width of 20, and top_k is 3"),
        (lambda m: m.update(vocab_size=5), "beyond the vocabulary of 5"),
    ],
)
def test_a_manifest_of_another_form_is_refused_though_its_seal_fits(
    copy: Path, change: Callable[[dict[str, Any]], object], reason: str
) -> None:
    reseal(copy, change)
    with pytest.raises(GoldenError) as refused:
        load_bundle(copy)
    assert reason in refused.value.problem


@pytest.mark.parametrize(
    "content",
    [
        b'{"schema_version": ' + b"[" * 100_000,
        b'{"schema_version": ' + b"1" * 5000 + b"}",
        b'{"schema_version": 1, "x": "\\ud800"}',
    ],
)
def test_a_hostile_manifest_is_refused(copy: Path, content: bytes) -> None:
    (copy / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(GoldenError):
        load_bundle(copy)


def cut_ids(arrays: dict[str, Any]) -> None:
    arrays["input_ids"] = arrays["input_ids"][:-1]


def strange_point(arrays: dict[str, Any]) -> None:
    arrays["sketch/layers.x"], arrays["norm/layers.x"] = arrays["sketch/norm"], arrays["norm/norm"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (cut_ids, "token ids"),
        (lambda a: a.update(lengths=a["lengths"] * 0), "the rows have 0 positions"),
        (lambda a: a.update(lengths=a["lengths"][:0]), "the rows have 0 positions"),
        (lambda a: a.update(lengths=a["lengths"].astype(np.float32)), "the array lengths is float32"),
        (lambda a: a.update(lengths=a["lengths"][::-1].copy()), "other lengths than the manifest says"),
        (lambda a: a.update(top1_id=a["top1_id"][:-1]), "the array top1_id has"),
        (lambda a: a.update(input_ids=a["input_ids"] + 90), "beyond the vocabulary of 97"),
        (lambda a: a.update(input_ids=a["input_ids"] - 90), "beyond the vocabulary of 97"),
        (lambda a: a.pop("target_logprob"), "the array target_logprob is missing"),
        (lambda a: a.pop("norm/lm_head"), "the array norm/lm_head is missing"),
        (lambda a: a.update({"sketch/norm": a["sketch/norm"][:, :3].copy()}), "sketch/norm has a width of 3"),
        (strange_point, "layers.x is float32"),
    ],
)
def test_arrays_of_another_form_are_refused_though_hash_and_seal_fit(
    copy: Path, change: Callable[[dict[str, Any]], object], reason: str
) -> None:
    arrays = load_file(copy / ARRAYS_FILE)
    change(arrays)
    save_file(arrays, copy / ARRAYS_FILE)
    reseal(copy, lambda manifest: None)
    with pytest.raises(GoldenError) as refused:
        load_bundle(copy)
    assert reason in refused.value.problem


def test_what_holds_no_arrays_is_refused_though_hash_and_seal_fit(copy: Path) -> None:
    (copy / ARRAYS_FILE).write_bytes(b"no tensors at all")
    reseal(copy, lambda manifest: None)
    with pytest.raises(GoldenError, match="holds no arrays: SafetensorError"):
        load_bundle(copy)
