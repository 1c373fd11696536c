"""What is made of an exam whose process has ended, and of the files that it wrote beforehand."""

from __future__ import annotations

from pathlib import Path

import pytest

from crosschip.qualify.journal import Journal, part_of, read_journal
from crosschip.qualify.losses import drop_unused, loss_finding, names_a_call
from crosschip.qualify.proctor import Ended


@pytest.mark.parametrize(
    ("now", "is_named"),
    [("soak: mm (c0012)", True), ("burst: 4 steps, in aten.mm.default", True), ("burst: 4 prompts of 512", False)],
)
def test_what_ended_is_told_by_its_call_or_operator(now: str, is_named: bool) -> None:
    assert names_a_call(now) == is_named


def test_only_the_file_that_a_finding_names_stays(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    for part in ("long prompts", "longer prompts"):
        journal.ready(part, f"{part}.py")
        (tmp_path / f"{part}.py").touch()
    state = read_journal(tmp_path / "journal.jsonl", "stability")
    ready = state.ready[part_of("longer prompts, in aten.mm.default")]
    state.record.findings.append(loss_finding("stability", Ended("crash", "SIGABRT", "longer prompts"), ready))
    drop_unused(tmp_path, state)
    assert [path.name for path in tmp_path.glob("*.py")] == ["longer prompts.py"]
