"""The tokenizer inside of a GGUF file: what llama.cpp would use, without llama.cpp."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from crosschip.data import train_tokenizer
from crosschip.handoff.certificate.gate import Gate
from crosschip.handoff.certificate.inside import gguf_tokenizer_gate, tokenizer_files_of
from crosschip.handoff.certificate.tokenizers import both
from crosschip.handoff.handing_off import certify_directory, hand_off
from crosschip.handoff.source import ModelSource, open_source
from tests.handoff.gguf.conftest import LLAMA_3_ROPE, TEXT, VOCAB, save_dense, with_tokenizer
from tests.handoff.gguf.test_round_trip import as_llama_cpp_writes


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    place = tmp_path_factory.mktemp("inside")
    train_tokenizer(TEXT, VOCAB).save(place / "tokenizer")
    return open_source(with_tokenizer(save_dense(place / "model", "llama"), place / "tokenizer"))


@pytest.fixture(scope="module")
def handed_off(source: ModelSource) -> Path:
    """With its bundle beside it."""
    out = source.directory.with_name("out")
    return hand_off(source.directory, "gguf", out=out, engines=["transformers"], chip="cpu").directory


@pytest.fixture
def directory(handed_off: Path, tmp_path: Path) -> Path:
    """Files to change, with nothing that vouches for them."""
    shutil.copytree(handed_off, tmp_path / "moved")
    (tmp_path / "moved" / "certificate.json").unlink()
    return tmp_path / "moved"


def change(file: Path, key: str, how: Callable[[Any], Any]) -> None:
    """Write the value of a key anew in its place, with as many bytes."""
    part = GGUFReader(file, "r+").fields[key].parts[-1]
    part[:] = how(part).copy()


def backwards(part: Any) -> Any:
    return part[::-1]


def certified(directory: Path, golden: Path) -> tuple[int, dict[str, Any]]:
    made = certify_directory(directory, golden, engines=["transformers"], chip="cpu")
    gates = {each["name"]: each for each in made.certificate.document["gates"]}
    return made.exit_code, gates["tokenizer and chat template"]


@pytest.mark.parametrize(
    ("key", "how"),
    [("tokenizer.chat_template", backwards), ("tokenizer.ggml.eos_token_id", lambda part: part + 1)],
)
def test_a_key_that_was_changed_fails_by_its_name(
    directory: Path, source: ModelSource, key: str, how: Callable[[Any], Any]
) -> None:
    file = directory / "model.gguf"
    assert gguf_tokenizer_gate(file, source).verdict == "PASS"
    change(file, key, how)
    for at_hand in (source, None):
        gate = gguf_tokenizer_gate(file, at_hand)
        assert (gate.verdict, gate.subject) == ("FAIL", key)
        assert "the model means" in gate.message


def test_a_certificate_of_the_files_alone_sees_it(directory: Path, handed_off: Path) -> None:
    golden = handed_off.with_name("out-golden")
    code, gate = certified(directory, golden)
    assert (code, gate["verdict"]) == (0, "PASS")
    assert "the source has no tokenizer, or is not at hand" in gate["not_covered"]
    change(directory / "model.gguf", "tokenizer.chat_template", backwards)
    code, gate = certified(directory, golden)
    assert (code, gate["verdict"], gate["subject"]) == (1, "FAIL", "tokenizer.chat_template")


def test_what_an_earlier_certificate_saw_of_the_source_is_kept(handed_off: Path, tmp_path: Path) -> None:
    shutil.copytree(handed_off, tmp_path / "moved")
    code, gate = certified(tmp_path / "moved", handed_off.with_name("out-golden"))
    assert (code, "files are the source's, byte for byte" in gate["message"]) == (0, True)


def test_where_the_keys_cannot_be_held_against_anything_nothing_is_covered(directory: Path) -> None:
    file = directory / "model.gguf"
    change(file, "general.quantized_by", backwards)
    gate = gguf_tokenizer_gate(file, None)
    assert (gate.verdict, "wrote it" in gate.message) == ("NOT COVERED", True)
    change(file, "general.quantized_by", backwards)
    (directory / "tokenizer.json").unlink()
    gate = gguf_tokenizer_gate(file, None)
    assert (gate.verdict, "tokenizer.json is missing" in gate.message) == ("NOT COVERED", True)


def test_llama_cpps_own_file_of_llama_3_is_certified(source: ModelSource, tmp_path: Path) -> None:
    directory = save_dense(tmp_path / "llama3", "llama", rope_parameters=LLAMA_3_ROPE)
    with_tokenizer(directory, source.directory.with_name("tokenizer"))
    out = hand_off(directory, "gguf", out=tmp_path / "out", engines=["transformers"], chip="cpu").directory
    for name in ("certificate.json", "handoff.json", "COMPLETE"):
        (out / name).unlink()
    as_llama_cpp_writes(out / "model.gguf").replace(out / "model.gguf")
    result = certify_directory(out, tmp_path / "out-golden", engines=["transformers"], chip="cpu")
    assert result.exit_code == 0, [each["message"] for each in result.certificate.document["gates"]]


def test_the_files_beside_the_model_stand_for_a_source_that_is_not_at_hand(
    handed_off: Path, source: ModelSource
) -> None:
    assert tokenizer_files_of(handed_off, source) == source.tokenizer_files
    beside = tokenizer_files_of(handed_off, None)
    assert beside == [handed_off / path.name for path in source.tokenizer_files]


def test_what_one_of_two_looks_left_out_is_kept() -> None:
    seen, unseen = Gate("t", "PASS", "right", not_covered=["bytes"]), Gate("t", "NOT COVERED", "no source")
    assert both(unseen, seen).not_covered == both(seen, unseen).not_covered == ["bytes", "no source"]
    assert both(unseen, seen).verdict == "PASS"
