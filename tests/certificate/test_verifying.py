"""What a certificate's reader notices: a changed byte, a missing or extra file, another key, another form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crosschip.certificate import CERTIFICATE_FILE, Serving, status_of, verify
from crosschip.certificate.document import seal_of
from crosschip.certificate.signing import make_key, read_public_key
from crosschip.errors import HandoffError
from tests.certificate.conftest import CHIP, Certified, replay_of


def edit(directory: Path, how: Callable[[dict[str, Any]], None], sealed: bool = True) -> None:
    path = directory / CERTIFICATE_FILE
    document = json.loads(path.read_text())
    how(document)
    if sealed:
        document["seal"] = seal_of(document)
    path.write_text(json.dumps(document))


def test_what_was_certified_is_verified(certified: Certified, key: Path) -> None:
    found = verify(certified(key), read_public_key(Path(f"{key}.pub")))
    assert (found.problems, found.is_valid, found.exit_code) == ([], True, 0)
    assert found.signed_by is not None
    assert found.lines()[0].startswith("VERIFIED: ")


def test_without_a_signature_it_holds_and_says_so(certified: Certified) -> None:
    found = verify(certified())
    assert found.is_valid
    assert "not signed" in found.lines()[0]


@pytest.mark.parametrize(("verdict", "code"), [("PASS WITH LIMITS", 0), ("FAIL", 1), ("INCONCLUSIVE", 3)])
def test_the_exit_code_is_that_of_the_verdict(certified: Certified, verdict: str, code: int) -> None:
    found = verify(certified(verdict=verdict))
    assert (found.is_intact, found.exit_code) == (True, code)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 2047), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found_and_its_file_named(certified: Certified, place: int, bit: int) -> None:
    directory = certified()
    file = directory / "sub" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[place] ^= 1 << bit
    file.write_bytes(data)
    found = verify(directory)
    assert found.problems == ["sub/model.safetensors holds other bytes than the certified ones"]
    assert found.exit_code == 1


def test_missing_extra_and_cut_files_are_named(certified: Certified) -> None:
    directory = certified()
    (directory / "config.json").unlink()
    (directory / "adapter_config.json").write_text("{}")
    (directory / "sub" / "model.safetensors").write_bytes(b"x")
    assert verify(directory).problems == [
        "adapter_config.json is not among the certified files",
        "config.json is missing",
        "sub/model.safetensors has 1 B, certified 2048 B",
    ]


def test_hidden_files_and_the_marker_are_nobodys_business(certified: Certified) -> None:
    directory = certified()
    (directory / "COMPLETE").touch()
    (directory / ".gitattributes").touch()
    (directory / ".cache").mkdir()
    (directory / ".cache" / "x").touch()
    assert verify(directory).is_valid


def test_links_and_pipes_are_refused_and_not_read(certified: Certified, tmp_path: Path) -> None:
    directory = certified()
    os.mkfifo(directory / "pipe")
    assert "no regular file" in verify(_with_pipe_certified(directory)).problems[0]
    (directory / "pipe").unlink()
    (directory / "shards").symlink_to(tmp_path)
    assert "a link to a directory" in verify(directory).problems[0]


def _with_pipe_certified(directory: Path) -> Path:
    edit(directory, lambda document: document["files"].append({"name": "pipe", "bytes": 0, "sha256": ""}))
    return directory


def test_the_certificate_of_other_files_is_told(certified: Certified) -> None:
    directory = certified()
    for file in (directory / "config.json", directory / "sub" / "model.safetensors"):
        file.write_text("another model")
    assert verify(directory).problems[0] == "no file is a certified one: this is the certificate of other files"


def test_a_path_out_of_the_directory_is_never_opened(certified: Certified) -> None:
    directory = certified()
    outside = directory.parent / "secret"
    outside.write_text("x")
    edit(directory, lambda document: document["files"].append({"name": "../secret", "bytes": 1, "sha256": ""}))
    assert verify(directory).problems == ["../secret is missing"]


def test_an_edited_certificate_is_found_by_its_seal(certified: Certified) -> None:
    directory = certified(verdict="FAIL")
    edit(directory, lambda document: document.update(verdict="PASS"), sealed=False)
    assert "cut or altered: its seal does not fit" in verify(directory).problems[0]


def test_an_edited_and_sealed_certificate_is_found_by_its_signature(certified: Certified, key: Path) -> None:
    directory = certified(key, verdict="FAIL")
    gates = [{"name": "tensor manifest", "verdict": "PASS", "message": ""}]
    edit(directory, lambda document: document.update(verdict="PASS", gates=gates))
    assert verify(directory).problems == ["certificate.json: its signature does not fit what it says"]


def test_a_verdict_that_the_gates_do_not_give_is_refused_whoever_sealed_it(certified: Certified) -> None:
    directory = certified(verdict="FAIL")
    edit(directory, lambda document: document.update(verdict="PASS"))
    assert "it says PASS, its gates say FAIL" in verify(directory).problems[0]


def test_a_signature_that_was_taken_off_is_missed_where_a_key_is_given(certified: Certified, key: Path) -> None:
    directory = certified(key)
    edit(directory, lambda document: document.pop("signature"))
    assert verify(directory).is_valid, "without a key nobody knows that it was signed"
    found = verify(directory, read_public_key(Path(f"{key}.pub")))
    assert found.problems == ["certificate.json: it is not signed, and a public key was given"]


def test_another_key_is_told_from_the_given_one(certified: Certified, key: Path, tmp_path: Path) -> None:
    other = read_public_key(make_key(tmp_path / "other"))
    found = verify(certified(key), other)
    assert "is signed with another key" in found.problems[0]
    assert found.signed_by is None


@pytest.mark.parametrize(
    "signature",
    [
        {},
        {"algorithm": "rsa"},
        {"algorithm": "ed25519", "public_key": "AA==", "value": "AA=="},
        {"algorithm": "ed25519", "public_key": 7, "value": None},
        {"algorithm": "ed25519", "public_key": "é" * 44, "value": "!" * 88},
        {"algorithm": "ed25519", "public_key": "/" * 43 + "=", "value": "A" * 86 + "=="},
    ],
)
def test_a_signature_of_another_form_is_a_problem(certified: Certified, signature: dict[str, Any]) -> None:
    directory = certified()
    edit(directory, lambda document: document.update(signature=signature))
    assert verify(directory).problems[0].startswith("certificate.json: its signature")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not JSON"),
        ("[]", "holds a list, not a certificate"),
        ("[" * 100_000, "is not JSON"),
        ('{"schema_version": 1, "schema_version": 1}', "comes twice"),
        ('{"schema_version": NaN}', "NaN is no JSON"),
        ('{"schema_version": 1, "z": 1e999}', "1e999 is larger than any number"),
        ('{"schema_version": 1, "z": -1e999}', "larger than any number"),
        ('{"z": ' + "[" * 100 + "]" * 100 + "}", "more than 64 deep"),
        ('{"z": ' + '{"a": ' * 990 + "1" + "}" * 991, "is not JSON"),
        ('{"z": "\\ud800"}', "surrogates not allowed"),
        ('{"\\udfff": 1}', "surrogates not allowed"),
        ('{"schema_version": true}', "schema_version is True"),
        ('{"schema_version": 2}', "reads up to 1"),
        ('{"schema_version": 1}', "made_at is None"),
    ],
)
def test_what_is_no_certificate_is_told(certified: Certified, text: str, words: str) -> None:
    directory = certified()
    (directory / CERTIFICATE_FILE).write_text(text)
    found = verify(directory)
    assert (found.certificate, found.exit_code) == (None, 1)
    assert words in found.problems[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"verdict": "FINE"},
        {"gates": [7]},
        {"replays": [{"verdict": "NOT COVERED"}]},
        {"files": [{"name": 7, "bytes": 1, "sha256": ""}]},
        {"files": "all"},
        {"files": []},
        {"target": {}},
        {"target": {"name": "hf", "dtype": "float32", "computed_in": None}},
        {"replays": [replay_of(engine={})]},
        {"replays": [replay_of(engine="native")]},
        {"replays": [{key: value for key, value in replay_of().items() if key != "chip_kind"}]},
        {"replays": [replay_of(views=["x"])]},
        {"replays": [replay_of(views=[{"name": "all", "positions": 7, "measures": []}])]},
        {"replays": [replay_of(views=[{"name": "all", "positions": 7, "measures": ["x"]}])]},
        {"replays": [replay_of(views=[{"name": "all", "positions": 7, "measures": [{"what": "mean KL"}]}])]},
    ],
)
def test_a_form_that_is_not_ours_is_told(certified: Certified, changes: dict[str, Any]) -> None:
    directory = certified()
    edit(directory, lambda document: document.update(changes))
    assert "is no certificate" in verify(directory).problems[0]


@pytest.mark.parametrize("depth", [970, 985, 988, 989, 990, 991, 992])
@pytest.mark.parametrize("surplus", ['"z": 1e999', '"z": "\\ud800"', "deep"])
def test_a_certificate_that_nobody_could_seal_is_refused_and_its_result_printed(
    certified: Certified, surplus: str, depth: int
) -> None:
    directory = certified()
    text = (directory / CERTIFICATE_FILE).read_text().rstrip().removesuffix("}")
    surplus = surplus if surplus != "deep" else '"z": ' + "[" * depth + "]" * depth
    (directory / CERTIFICATE_FILE).write_text(f"{text}, {surplus}}}")
    found = verify(directory)
    assert (found.certificate, found.exit_code) == (None, 1)
    assert "is not JSON" in "\n".join(found.lines()).encode().decode()
    status = status_of(directory, lambda certificate: Serving("native", CHIP, "float32"))
    assert (status.word, "does not hold" in str(status.problem)) == ("UNCERTIFIED", True)


def test_a_file_name_that_is_no_text_is_told_and_can_be_printed(certified: Certified) -> None:
    directory = certified()
    (directory / os.fsdecode(b"model-\xff.safetensors")).touch()
    found = verify(directory)
    assert found.exit_code == 1
    assert "whose name is no UTF-8: 'model-\\udcff.safetensors'" in "\n".join(found.lines()).encode().decode()


def test_bytes_that_are_no_text_are_told(certified: Certified) -> None:
    directory = certified()
    (directory / CERTIFICATE_FILE).write_bytes(b"\xff\xfe")
    assert "is not JSON" in verify(directory).problems[0]


def test_a_directory_that_is_not_there_is_bad_usage(tmp_path: Path) -> None:
    with pytest.raises(HandoffError, match="there is no directory"):
        verify(tmp_path / "none")


def test_an_empty_directory_has_no_certificate(tmp_path: Path) -> None:
    assert verify(tmp_path).problems == [f"{tmp_path} has no certificate.json"]


def test_verifying_needs_no_torch(certified: Certified, key: Path) -> None:
    directory = certified(key)
    code = (
        "import sys; from pathlib import Path; from crosschip.certificate import verify\n"
        f"print(verify(Path({str(directory)!r})).is_valid, [n for n in ('torch', 'numpy') if n in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("True []\n", "")
