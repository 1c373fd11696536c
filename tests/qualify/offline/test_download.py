"""Downloading with pip: what cannot be had is said in words; the real wheel, where the package index has it."""

from __future__ import annotations

import http.server
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crosschip.errors import QualifyError
from crosschip.qualify.offline.download import download_wheel
from crosschip.qualify.offline.lists import read_operator_list
from tests.qualify.offline.lists_made import make_wheel

REAL = "torch-npu==2.13.0"


class _Index(http.server.BaseHTTPRequestHandler):
    """A package index that has one version of one project, as a broken link."""

    def do_GET(self) -> None:
        known = self.path.strip("/").split("/")[-1] == "torch-npu"
        page = b'<a href="/torch_npu-9.8.7-py3-none-any.whl">torch_npu-9.8.7-py3-none-any.whl</a>' if known else b""
        self.send_response(200 if known else 404)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def index() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Index) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def refused(requirement: str, cache: Path, index: str) -> QualifyError:
    with pytest.raises(QualifyError) as caught:
        download_wheel(requirement, cache, index=index)
    return caught.value


def test_without_a_network_the_remedy_is_another_machine(tmp_path: Path) -> None:
    error = refused(REAL, tmp_path, "http://127.0.0.1:1")
    assert "the package index cannot be reached" in error.problem
    assert "give the wheel's path" in error.remedy


def test_a_version_that_is_not_there_names_those_that_are(tmp_path: Path, index: str) -> None:
    error = refused(REAL, tmp_path, index)
    assert f"no wheel of {REAL}" in error.problem
    assert "9.8.7" in error.remedy


def test_a_link_that_leads_nowhere_is_an_error_and_leaves_nothing(tmp_path: Path, index: str) -> None:
    assert "cannot be downloaded" in refused("torch-npu==9.8.7", tmp_path, index).problem
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("requirement", ["torch-npu", "torch-npu>=2", "--pre==1", "torch-npu==", "a==1 b==2"])
def test_a_version_must_be_named(tmp_path: Path, requirement: str) -> None:
    assert "names no version" in refused(requirement, tmp_path, "http://127.0.0.1:1").problem


def test_a_wheel_that_is_there_is_not_downloaded_again(tmp_path: Path) -> None:
    kept = make_wheel(tmp_path / "torch_npu-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl")
    assert download_wheel(REAL, tmp_path, index="http://127.0.0.1:1") == kept


@pytest.mark.parametrize("requirement", ["torch_npu==2.13", "Torch.NPU==2.13.0.0"])
def test_a_version_is_the_same_however_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, requirement: str
) -> None:
    nothing = subprocess.CompletedProcess([], 1, "", "nothing was kept")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: nothing)
    kept = make_wheel(tmp_path / "torch_npu-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl")
    assert download_wheel(requirement, tmp_path, index="http://127.0.0.1:1") == kept
    for other in ("torch-npu==2.1", "torch-npu==2.13.0.1", "torch-npu==2.13.0.post1", "torch==2.13.0"):
        assert "nothing was kept" in refused(other, tmp_path, "").problem


@pytest.mark.parametrize("ends_well", [True, False])
def test_a_wheel_lies_in_the_cache_when_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends_well: bool
) -> None:
    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        place = next(Path(word.removeprefix("--dest=")) for word in command if word.startswith("--dest="))
        make_wheel(place / "torch_npu-2.13.0-py3-none-any.whl")
        assert list(tmp_path.glob("*.whl")) == []
        return subprocess.CompletedProcess(command, 0 if ends_well else 1, "", "ERROR: No space left on device")

    monkeypatch.setattr(subprocess, "run", pip)
    if ends_well:
        assert download_wheel("torch-npu==2.13", tmp_path) == tmp_path / "torch_npu-2.13.0-py3-none-any.whl"
    else:
        with pytest.raises(QualifyError, match="No space left on device"):
            download_wheel("torch-npu==2.13", tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["torch_npu-2.13.0-py3-none-any.whl"] * ends_well


@pytest.mark.slow
def test_the_real_wheel(tmp_path: Path) -> None:
    """Forty megabytes; the counts are those of the file, read once by eye."""
    try:
        wheel = download_wheel(REAL, tmp_path)
    except QualifyError as error:
        pytest.skip(str(error))
    listed = read_operator_list(wheel)
    assert (listed.form, listed.version) == ("torch_npu", "2.13.0")
    assert {each.name.rpartition("/")[2]: each.num_entries for each in listed.files} == {
        "npu_native_functions.yaml": 65,
        "npu_native_functions_by_codegen.yaml": 1535,
    }
    assert "aten::mm" in listed
    assert "aten::nextafter" not in listed
