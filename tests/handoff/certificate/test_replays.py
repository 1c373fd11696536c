"""What a replay says in the certificate: whom it blames of quantised files, and what it says where it was not made."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from crosschip.errors import HandoffError
from crosschip.handoff.certificate import engines
from crosschip.handoff.certificate.replays import Replayed, replay_document
from crosschip.handoff.handing_off import certify_directory
from tests.golden.test_quantised_diagnosis import LIMIT, compared

GOOD, BAD = LIMIT.mean_kl / 10, 10 * LIMIT.mean_kl


def replayed(route: Literal["model", "http"], kl: float) -> Replayed:
    return Replayed("native" if route == "http" else "model", compared(route, kl))


@pytest.mark.parametrize(
    ("beside", "blame"), [([], None), ([GOOD], "engine"), ([BAD], "files"), ([BAD, GOOD], "engine")]
)
def test_an_engine_is_blamed_for_quantised_files_where_they_are_right_here(
    beside: list[float], blame: str | None
) -> None:
    engine = replayed("http", BAD)
    made = [engine, *(replayed("model", kl) for kl in beside)]
    assert replay_document(engine, made)["blame"] == blame
    for each, kl in zip(made[1:], beside, strict=True):
        assert replay_document(each, made)["blame"] == (None if kl == GOOD else "files")


@pytest.mark.parametrize("error", [HandoffError("8 B free, 9 needed", "make room"), OSError(28, "No space left")])
def test_files_that_there_is_no_room_to_multiply_out_are_not_replayed_and_the_certificate_says_so(
    exported: Callable[[str], Path],
    bundle_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr(engines, "write_multiplied_out", full)
    shutil.copytree(exported("w8a8"), tmp_path / "w8a8")
    made = certify_directory(tmp_path / "w8a8", bundle_dir, engines=["model"], chip="cpu")
    (replay,) = made.certificate.replays
    assert (made.exit_code, replay["verdict"], replay["blame"], replay["views"]) == (3, "INCONCLUSIVE", None, [])
    assert "0 of" in replay["message"]
    words = next(each for each in made.certificate.document["not_covered"] if "multiplied out" in each)
    assert ("9 needed" if isinstance(error, HandoffError) else "No space left") in words
