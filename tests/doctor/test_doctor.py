"""The doctor on real environments: real entry points, real children that fail, crash and hang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from crosschip.doctor.environment import gather_environment
from crosschip.doctor.importing import _try
from crosschip.doctor.report import Finding, Report, print_report

ROOT = Path(__file__).parent.parent.parent


def make_distribution(site: Path, name: str, version: str, entry_points: str = "", requires: str = "") -> None:
    """A `dist-info` directory as pip leaves it."""
    directory = site / f"{name.replace('-', '_')}-{version}.dist-info"
    directory.mkdir(parents=True)
    required = "".join(f"Requires-Dist: {line}\n" for line in requires.splitlines())
    (directory / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{required}")
    if entry_points:
        (directory / "entry_points.txt").write_text(entry_points)


def make_plugin(site: Path, name: str, body: str) -> None:
    """An installed plug-in that torch loads at the end of its own import."""
    module = name.replace("-", "_")
    make_distribution(site, name, "1.0", f"[torch.backends]\n{module} = {module}:load\n")
    (site / f"{module}.py").write_text(f"import os, sys, time\ndef load():\n    {body}\n")


def run_doctor(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}", "COLUMNS": "200"}
    environment.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)
    command = [sys.executable, "-m", "crosschip", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def findings_of(site: Path) -> tuple[int, list[dict[str, Any]]]:
    ended = run_doctor(site, "--json")
    document = json.loads(ended.stdout)
    assert document["healthy"] == (ended.returncode == 0)
    return ended.returncode, document["findings"]


def about_import(findings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [finding for finding in findings if finding["subject"] == "import torch"]


def test_this_environment_imports_torch(tmp_path: Path) -> None:
    _, findings = findings_of(tmp_path)
    assert [finding["state"] for finding in about_import(findings)] == ["ok"]


def test_a_plug_in_that_breaks_the_import_is_named(tmp_path: Path) -> None:
    make_plugin(tmp_path, "torch-nova", "raise ImportError('libnova_hal.so: cannot open shared object file')")
    make_plugin(tmp_path, "torch-fine", "pass")
    exit_code, findings = findings_of(tmp_path)
    problem, note = about_import(findings)
    assert exit_code == 1
    assert problem["state"] == "problem"
    assert "is broken by the plug-in 'torch_nova' of torch-nova 1.0" in problem["detail"]
    assert "libnova_hal.so: cannot open shared object file" in problem["detail"]
    assert "pip uninstall torch-nova" in problem["remedy"]
    assert "torch-fine" not in problem["detail"]
    assert note["detail"].startswith("works with TORCH_DEVICE_BACKEND_AUTOLOAD=0: torch 2.")


def test_a_plug_in_that_crashes_the_process_is_named(tmp_path: Path) -> None:
    make_plugin(tmp_path, "torch-nova", "os.kill(os.getpid(), 11)")
    ended = run_doctor(tmp_path)
    assert ended.returncode == 1
    assert "the plug-in 'torch_nova' of torch-nova 1.0: the process was ended by SIGSEGV" in ended.stdout
    assert "what to do: mend what it needs" in ended.stdout


def test_a_torch_that_is_broken_itself_is_told(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libtorch_cpu.so: undefined symbol')")
    make_distribution(tmp_path, "torch", "2.13.0")
    exit_code, findings = findings_of(tmp_path)
    (problem,) = about_import(findings)
    assert exit_code == 1
    assert "fails even without plug-ins: OSError: libtorch_cpu.so: undefined symbol" in problem["detail"]


def test_what_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    code = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(4); open({str(marker)!r}, 'w')"])
time.sleep(60)
"""
    assert _try(code, deadline_s=2).failure == "it did not end within 2 s"
    time.sleep(3)
    assert not marker.exists()


def test_what_a_plug_in_leaves_running_holds_nothing_up_and_is_ended(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    code = f"""
import subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(4); open({str(marker)!r}, 'w')"])
print("crosschip-doctor:{{}}")
"""
    began = time.monotonic()
    assert _try(code, deadline_s=3).failure is None  # the helper has the child's output, too
    assert time.monotonic() - began < 3
    time.sleep(5)
    assert not marker.exists()


def test_a_failure_without_words_is_a_failure() -> None:
    assert _try("import sys; sys.exit(3)", 30).failure == "it ended with an error and said nothing"
    assert _try("pass", 30).failure is None


def test_distributions_are_read_without_importing_them(tmp_path: Path) -> None:
    make_distribution(tmp_path, "torch", "2.13.0", requires="filelock")
    make_distribution(tmp_path / "second", "torch", "2.12.0")
    make_distribution(tmp_path, "torchvision", "0.28.0+cpu", requires="torch==2.13.0")
    make_plugin(tmp_path, "torch-nova", "pass")
    make_distribution(tmp_path, "vllm_ascend", "0.12", "[vllm.platform_plugins]\nascend = vllm_ascend:register\n")
    (tmp_path / "half-1.0.dist-info").mkdir()
    (tmp_path / "torch").mkdir()
    lines = (
        "from typing import Optional\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\ngit_version = 'abc'\n"
    )
    (tmp_path / "torch" / "version.py").write_text(lines)
    environment = gather_environment([str(tmp_path), str(tmp_path / "second")])
    assert environment.versions["torch"] == "2.13.0"
    assert environment.copies == {"torch": [str(tmp_path), str(tmp_path / "second")]}
    assert environment.torch_build == {"cuda": "13.0"}
    assert environment.requirements["torchvision"] == ["torch==2.13.0"]
    assert [(entry.name, entry.distribution) for entry in environment.autoload] == [("torch_nova", "torch-nova")]
    assert environment.vllm_platforms == ("ascend",)


def test_one_place_under_two_names_is_one_copy(tmp_path: Path) -> None:
    make_distribution(tmp_path / "lib", "torch", "2.13.0")
    (tmp_path / "lib64").symlink_to("lib")
    assert gather_environment([str(tmp_path / "lib64"), str(tmp_path / "lib")]).copies == {}


def test_a_distribution_that_is_damaged_hides_no_other(tmp_path: Path) -> None:
    make_distribution(tmp_path, "broken", "1.0")
    (tmp_path / "broken-1.0.dist-info" / "METADATA").write_bytes(b"Name: broken\nVersion: 1.0\nAuthor: M\xfcller\n")
    make_distribution(tmp_path, "cut", "1.0", "[torch.backends]\ncut = cut:load\ncu")
    make_distribution(tmp_path, "nameless", "")
    make_distribution(tmp_path, "torch", "2.13.0")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_bytes(b"cuda = '13.0' # \xfc")
    make_distribution(tmp_path, "whole", "1.0")
    environment = gather_environment([str(tmp_path)])
    assert environment.versions == {"cut": "1.0", "torch": "2.13.0", "whole": "1.0"}
    names = ["broken-1.0.dist-info", "cut-1.0.dist-info", "nameless-.dist-info", "torch-2.13.0.dist-info"]
    assert sorted(environment.damaged) == [str(tmp_path / name) for name in names]


def test_the_simulated_chip_is_a_plug_in_only_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = "[torch.backends]\ncrosschip = crosschip.torch_plugin:load\n"
    make_distribution(tmp_path, "crosschip", "0.1.0", entry)
    monkeypatch.delenv("CROSSCHIP_SIM", raising=False)
    assert gather_environment([str(tmp_path)]).autoload == ()
    monkeypatch.setenv("CROSSCHIP_SIM", "sim")
    assert [entry.name for entry in gather_environment([str(tmp_path)]).autoload] == ["crosschip"]


def test_the_report_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report([Finding("ok", "python", "3.11"), Finding("problem", "torch[x]", "two [of] them", "keep one")])
    print_report(report)
    printed = capsys.readouterr().out
    assert "torch[x]: two [of] them\n  what to do: keep one\n\n1 problem found\n" in printed
    assert report.exit_code == 1
    print_report(Report([Finding("ok", "python", "3.11"), Finding("note", "x", "y")]))
    assert capsys.readouterr().out.endswith("all fine\n")
