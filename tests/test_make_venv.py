"""The set-up script: which torch it takes, that the second call installs nothing, and that what broke is mended."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, set on an empty project. `calls` holds what it would have asked pip for; the environment is real."""
    specification = importlib.util.spec_from_file_location("make_venv", ROOT / "scripts" / "make_venv.py")
    assert specification is not None
    assert specification.loader is not None
    module: Any = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    venv = tmp_path / ".venv"
    module.ROOT, module.VENV = tmp_path, venv
    module.STAMP, module.PYTHON_IN_VENV = venv / "crosschip-setup.json", venv / "bin" / "python"
    module.calls = []
    monkeypatch.setattr(module, "pip", lambda *arguments: module.calls.append(" ".join(arguments)))
    monkeypatch.setattr(module, "install_torch", lambda: module.calls.append("torch"))
    monkeypatch.setattr(module, "torches_in_venv", lambda: ["2.13.0+cpu"])
    monkeypatch.setattr(module, "leave_virtual_environment", lambda: None)
    monkeypatch.setattr(module, "installed_version", lambda name: None)
    monkeypatch.setattr(module, "make_empty_venv", lambda keep: make_venv_without_pip(module, keep))
    monkeypatch.delenv("TORCH_INSTALL", raising=False)
    return module


def make_venv_without_pip(module: Any, keep: bool) -> None:
    """As the script's own, without the seconds that pip's installation takes."""
    module.VENV.mkdir()
    module.write_stamp({"unfinished": True})
    (module.VENV / "bin").mkdir()
    (module.VENV / "bin" / "python").symlink_to(sys.executable)
    module.calls.append("venv with the base's packages" if keep else "venv")


def call(script: Any, extra: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    script.calls.clear()
    monkeypatch.setattr(sys, "argv", ["make_venv.py", extra])
    script.main()
    return list(script.calls)


def installed(script: Any, extra: str = "") -> str:
    return f"--constraint {script.VENV / 'crosschip-constraints.txt'} --editable {script.ROOT}{extra}"


def test_the_range_is_that_of_the_package(script: Any) -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert script.TORCH_REQUIREMENT in dependencies
    bounds = [tuple(map(int, bound.split("."))) for bound in re.findall(r"\d+\.\d+", script.TORCH_REQUIREMENT)]
    assert tuple(bounds) == script.TORCH_RANGE
    assert script.torch_in_range(script.CPU_TORCH)


OUTSIDE = ["1.13.1", "2.10.9", "2.11.0a0+git1", "2.11.0rc1", "2.11.0.dev2026", "2.14.0a0", "2.14.0", "3.0"]
INSIDE = ["2.11.0", "2.11.0+cu130", "2.11.1a0", "2.12.0a0+nv", "2.13.0+metax3.3", "2.13.9"]


@pytest.mark.parametrize("version", [*OUTSIDE, *INSIDE])
def test_the_range_is_read_as_pip_reads_it(script: Any, version: str) -> None:
    specifiers = pytest.importorskip("packaging.specifiers")
    bounds = specifiers.SpecifierSet(script.TORCH_REQUIREMENT.removeprefix("torch"))
    assert script.torch_in_range(version) == bounds.contains(version, prereleases=True) == (version in INSIDE)


def test_the_second_call_installs_nothing(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(script, "run", monkeypatch) == ["venv", "torch", installed(script)]
    assert call(script, "run", monkeypatch) == []
    assert call(script, "dev", monkeypatch) == [installed(script, "[dev]")]
    assert call(script, "dev", monkeypatch) == []
    assert call(script, "run", monkeypatch) == []
    assert (script.VENV / "crosschip-constraints.txt").read_text() == "torch==2.13.0+cpu\n"


def test_a_changed_package_is_installed_again_in_place(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    call(script, "dev", monkeypatch)
    (script.ROOT / "pyproject.toml").write_text("[project]\nversion = '2'\n")
    assert call(script, "run", monkeypatch) == [installed(script)]
    assert call(script, "dev", monkeypatch) == [installed(script, "[dev]")]


@pytest.mark.parametrize(
    "broken", ["interrupted", "no python", "no stamp", "empty", "damaged stamp", "moved", "a file"]
)
def test_a_half_made_environment_is_mended(script: Any, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    call(script, "run", monkeypatch)
    stamp = json.loads(script.STAMP.read_text())
    if broken == "interrupted":
        script.write_stamp({**stamp, "unfinished": True})
    elif broken == "no python":
        (script.VENV / "bin" / "python").unlink()
    elif broken == "no stamp":
        script.STAMP.unlink()
    elif broken == "damaged stamp":
        script.STAMP.write_text("{")
    elif broken == "moved":
        script.write_stamp({**stamp, "made_by": ["elsewhere"]})
    else:
        script.shutil.rmtree(script.VENV)
        script.VENV.touch() if broken == "a file" else script.VENV.mkdir()
    assert call(script, "run", monkeypatch) == ["venv", "torch", installed(script)]
    assert call(script, "run", monkeypatch) == []


def test_an_environment_of_somebody_else_is_set_aside_and_not_deleted(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.VENV.mkdir()
    (script.VENV / "precious").touch()
    call(script, "run", monkeypatch)
    assert [path.name for path in script.ROOT.glob(".venv.aside-*/*")] == ["precious"]


def test_an_interruption_leaves_the_mark_and_a_failure_of_pip_leaves_what_worked(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(script, "run", monkeypatch)

    def fail(*_: str) -> None:
        raise script.SetupError("no network")

    def interrupt(*_: str) -> None:
        raise KeyboardInterrupt

    honest = script.pip
    monkeypatch.setattr(script, "pip", fail)
    with pytest.raises(script.SetupError):
        call(script, "dev", monkeypatch)
    assert call(script, "run", monkeypatch) == []
    monkeypatch.setattr(script, "pip", interrupt)
    with pytest.raises(KeyboardInterrupt):
        call(script, "dev", monkeypatch)
    monkeypatch.setattr(script, "pip", honest)
    assert call(script, "run", monkeypatch) == ["venv", "torch", installed(script)]


def test_a_torch_of_the_interpreter_is_kept(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "installed_version", lambda name: {"torch": "2.12.1+metax3"}.get(name))
    assert call(script, "run", monkeypatch) == ["venv with the base's packages", installed(script)]


def test_a_torch_out_of_range_is_left_alone(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "installed_version", lambda name: {"torch": "2.6.0"}.get(name))
    assert call(script, "run", monkeypatch) == ["venv", "torch", installed(script)]


def test_a_vendors_plug_in_with_an_old_torch_is_an_error(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.6.0", "torch_npu": "2.6.0"}
    monkeypatch.setattr(script, "installed_version", versions.get)
    with pytest.raises(script.SetupError, match=r"torch_npu is installed beside torch 2\.6\.0"):
        call(script, "run", monkeypatch)


def test_two_torches_are_refused(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "torches_in_venv", lambda: ["2.13.0+cpu", "2.12.0"])
    with pytest.raises(script.SetupError, match="sees 2 installations of torch"):
        call(script, "run", monkeypatch)


def test_an_old_interpreter_is_told(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "LOWEST_PYTHON", (99, 0))
    with pytest.raises(script.SetupError, match=r"is too old(?s:.)*make PYTHON="):
        call(script, "run", monkeypatch)
