"""A certificate covers what was replayed, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from crosschip.certificate import Serving, Status, chip_kind, status_of
from crosschip.certificate.signing import make_key, read_public_key
from crosschip.certificate.verifying import verify
from tests.certificate.conftest import CHIP, Certified, replay_of

NATIVE = Serving("native", CHIP, "float32")


def status(directory: Path, serving: Serving = NATIVE) -> Status:
    return status_of(directory, lambda certificate: serving)


def test_what_was_replayed_is_certified(certified: Certified) -> None:
    assert status(certified()) == Status("CERTIFIED", None)


@pytest.mark.parametrize(
    ("serving", "words"),
    [
        (Serving("vllm", CHIP, "float32"), "covers native, not the engine 'vllm'"),
        (Serving("native", "npu (Huawei, 910B)", "float32"), f"covers the chip {CHIP}, not npu (Huawei, 910B)"),
        (Serving("native", CHIP, "bfloat16"), "covers arithmetic in float32, not in bfloat16"),
    ],
)
def test_what_was_not_replayed_is_not(certified: Certified, serving: Serving, words: str) -> None:
    found = status(certified(), serving)
    assert not found.is_certified
    assert words in str(found.problem)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"verdict": "INCONCLUSIVE"}, "the certificate's verdict is INCONCLUSIVE"),
        ({"verdict": "FAIL", "gates": [{"verdict": "FAIL", "message": "lm_head is missing"}]}, "FAIL: lm_head is miss"),
        ({"replays": []}, "covers no engine"),
        ({"replays": [replay_of(verdict="FAIL")]}, "covers no engine"),
        ({"replays": [replay_of(chip_kind=None)]}, "covers the chip None"),
        ({"replays": [replay_of(engine="native")]}, "is no certificate: a replay's engine is 'native'"),
    ],
)
def test_a_verdict_or_replay_that_is_no_pass_does_not_count(
    certified: Certified, changes: dict[str, Any], words: str
) -> None:
    assert words in str(status(certified(**changes)).problem)


def test_a_changed_file_takes_the_certificate_away(certified: Certified) -> None:
    directory = certified()
    assert verify(directory).is_valid
    (directory / "config.json").write_text("[]")
    assert str(status(directory).problem) == (
        "the certificate does not hold: config.json holds other bytes than the certified ones"
    )


def test_with_a_public_key_only_what_its_owner_signed_is_certified(
    certified: Certified, key: Path, tmp_path: Path
) -> None:
    team, forger = read_public_key(Path(f"{key}.pub")), make_key(tmp_path / "forger").with_suffix("")

    def word(signed_with: Path | None) -> str:
        found = status_of(certified(signed_with), lambda _: NATIVE, public_key=team)
        return f"{found.word}: {found.problem}"

    assert word(key) == "CERTIFIED: None"
    assert "UNCERTIFIED: the certificate does not hold: certificate.json: it is not signed" in word(None)
    assert "it is signed with another key" in word(forger)


def test_without_a_certificate_the_chip_is_not_asked_for(tmp_path: Path) -> None:
    def never(certificate: Any) -> Serving:
        raise AssertionError("asked")

    assert str(status_of(tmp_path, never).problem).startswith("no certificate: ")


def test_the_kind_of_a_chip_drops_its_number_and_keeps_planted_faults() -> None:
    assert chip_kind("cuda:1", "NVIDIA", "H100") == chip_kind("cuda:0", "NVIDIA", "H100") == "cuda (NVIDIA, H100)"
    assert chip_kind("cuda:0", "NVIDIA", "H100") != chip_kind("cuda:0", "NVIDIA", "A100")
    assert chip_kind("sim:N2", "crosschip", "simulated") != chip_kind("sim", "crosschip", "simulated")
