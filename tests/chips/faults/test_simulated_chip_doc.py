"""docs/simulated-chip.md: its code runs as it stands there, its tables are the package's."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from crosschip.chips.faults import CATALOGUE, VARIANTS, faults_from
from crosschip.chips.simulated import plant

DOC = Path(__file__).parents[3] / "docs" / "simulated-chip.md"


def code(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOC.read_text(encoding="utf-8"), flags=re.DOTALL)


def rows(first: str) -> dict[str, list[str]]:
    """First cell -> the other cells, of the table whose first heading is `first`."""
    table = re.search(rf"\| {first} \|.*\n\| ---.*\n((?:\|.*\n)+)", DOC.read_text(encoding="utf-8"))
    assert table is not None
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.group(1).splitlines()]
    return {line[0].strip("`"): line[1:] for line in lines}


def shown(parameters: dict[str, Any]) -> str:
    texts = {name: str(value).lower() if isinstance(value, bool) else value for name, value in parameters.items()}
    return ", ".join(f"`{name}={text}`" for name, text in texts.items())


def test_table_of_faults_is_the_catalogue() -> None:
    written = rows("fault")
    assert written == {
        row.id: [row.title, row.seen, shown(row.parameters), ", ".join(row.caught_by)] for row in CATALOGUE.values()
    }
    assert all(name in written for name in re.findall(r"\b[NW]\d+\b", DOC.read_text(encoding="utf-8")))


def test_table_of_variants_is_the_packages() -> None:
    written = rows("variant")
    assert set(written) == set(VARIANTS)
    for name, (_, parameters, _) in written.items():
        (variant,) = faults_from(f"sim:{name}")
        assert parameters == ("`seed=0`" if hasattr(variant, "seed") else "")


def test_fault_in_ten_lines_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = [block for block in code("python") if "class " in block]
    assert len([line for line in text.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    (tmp_path / "my_faults.py").write_text(text, encoding="utf-8")
    (spec,) = re.findall(r"--chip (sim:my_faults\S+)", DOC.read_text(encoding="utf-8"))
    plant(faults_from(spec))
    x = torch.ones(2, 2).to("sim")
    assert (x @ x).cpu().tolist() == [[2.0, 2.0], [1.0, 1.0]]
    assert (x + x).cpu().tolist() == [[2.0, 2.0], [2.0, 2.0]]


def test_python_of_the_page_prints_what_it_says() -> None:
    (text,) = [block for block in code("python") if "activate(" in block]
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, cwd=DOC.parents[1], check=False)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    promised = re.findall(r"^print.*  # (.*)$", text, flags=re.MULTILINE)
    assert len(printed) == len(promised)
    for line, words in zip(printed, promised, strict=True):
        assert all(part in line for part in words.split(", ...,")), (line, words)


def test_every_chip_named_on_the_page_is_one() -> None:
    named = set(re.findall(r"`(sim(?::[^`]+)?)`", DOC.read_text(encoding="utf-8")))
    named |= set(re.findall(r"(?:--chip |CROSSCHIP_SIM=)(sim\S*)", DOC.read_text(encoding="utf-8")))
    outside = {name for name in named if re.search(r"\w:\w+:|some\.module", name)}
    assert len(named - outside) >= 6
    for name in named - outside:
        faults_from(name)
