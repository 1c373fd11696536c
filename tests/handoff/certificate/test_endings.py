"""End tokens and default sampling are held against the source, the certificate or the bundle, or said to be unseen."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from crosschip.certificate.document import seal_of, write_certificate
from crosschip.certificate.files import files_of, hash_files
from crosschip.golden.bundle import Bundle
from crosschip.handoff.certificate.endings import tokenizer_and_endings_gate
from crosschip.handoff.certificate.gate import Gate
from crosschip.handoff.source import open_source
from tests.certificate.conftest import document_of

CONFIG, GENERATION = "config.json", "generation_config.json"
CHANGES = [
    (CONFIG, "eos_token_id", 7),
    (CONFIG, "bos_token_id", 7),
    (CONFIG, "pad_token_id", 7),
    (GENERATION, "eos_token_id", [1, 7]),
    (GENERATION, "temperature", 5.0),
]


def edit(file: Path, field: str, value: object) -> None:
    document = json.loads(file.read_text())
    assert document.get(field) != value
    file.write_text(json.dumps({**document, field: value}))


def certify(directory: Path) -> None:
    files = [asdict(each) for each in hash_files(directory, files_of(directory))]
    document = document_of(directory, files=files)
    write_certificate(directory, {**document, "seal": seal_of(document)})


def older(bundle: Bundle) -> Bundle:
    return replace(bundle, manifest={k: v for k, v in bundle.manifest.items() if k != "special_tokens"})


def told(gate: Gate) -> str:
    return f"{gate.verdict}: {gate.message}"


@pytest.mark.parametrize(("file", "field", "value"), CHANGES)
def test_against_the_source(
    copied: Callable[[str], Path], model_dir: Path, bundle: Bundle, file: str, field: str, value: object
) -> None:
    directory, source = copied("hf"), open_source(model_dir)
    assert tokenizer_and_endings_gate(directory, source, bundle).verdict == "PASS"
    edit(directory / file, field, value)
    gate = tokenizer_and_endings_gate(directory, source, bundle)
    assert (gate.verdict, gate.subject) == ("FAIL", file)
    assert f"{file}: {field} = {value!r}, the source's" in gate.message


@pytest.mark.parametrize(("file", "field", "value"), CHANGES)
def test_against_what_was_certified_or_recorded(
    copied: Callable[[str], Path], bundle: Bundle, file: str, field: str, value: object
) -> None:
    directory = copied("hf")
    certify(directory)
    gate = tokenizer_and_endings_gate(directory, None, bundle)
    assert (gate.verdict, gate.not_covered) == ("NOT COVERED", []), "nothing to say against it, and nothing unseen"
    edit(directory / file, field, value)
    gate = tokenizer_and_endings_gate(directory, None, bundle)
    assert (gate.verdict, gate.subject, gate.message.startswith(f"{file}: ")) == ("FAIL", file, True), told(gate)


def test_a_certified_config_json_is_believed_whatever_the_bundle_recorded(
    copied: Callable[[str], Path], bundle: Bundle
) -> None:
    directory = copied("hf")
    edit(directory / CONFIG, "eos_token_id", 7)
    certify(directory)
    assert tokenizer_and_endings_gate(directory, None, bundle).verdict == "NOT COVERED"


def test_without_a_certificate_the_bundle_tells_and_the_rest_is_said_to_be_unseen(
    copied: Callable[[str], Path], bundle: Bundle
) -> None:
    directory = copied("hf")
    gate = tokenizer_and_endings_gate(directory, None, bundle)
    assert gate.verdict == "NOT COVERED"
    assert [words.partition(",")[0] for words in gate.not_covered] == [GENERATION]
    edit(directory / CONFIG, "eos_token_id", 7)
    gate = tokenizer_and_endings_gate(directory, None, bundle)
    assert (gate.verdict, gate.subject) == ("FAIL", CONFIG)
    gate = tokenizer_and_endings_gate(directory, None, older(bundle))
    assert gate.verdict == "NOT COVERED"
    assert "the end tokens of config.json" in gate.not_covered[-1]


def test_a_list_of_one_is_the_one_and_what_is_no_json_is_told(
    copied: Callable[[str], Path], model_dir: Path, bundle: Bundle
) -> None:
    directory, source = copied("hf"), open_source(model_dir)
    eos = json.loads((directory / CONFIG).read_text())["eos_token_id"]
    edit(directory / CONFIG, "eos_token_id", [eos])
    assert tokenizer_and_endings_gate(directory, source, bundle).verdict == "PASS"
    (directory / GENERATION).write_text("{")
    assert "is unreadable" in tokenizer_and_endings_gate(directory, source, bundle).message
    (directory / GENERATION).unlink()
    assert "is not there" in tokenizer_and_endings_gate(directory, source, bundle).message
