"""Two real ranks train the small subject with FSDP2: an operator without a sharding rule is named, honest ones pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from crosschip.chips import find_chip
from crosschip.chips.simulated import activate, plant
from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.rehearsal.sharded import rehearse_sharded, train_sharded
from crosschip.qualify.finding import ExamRecord
from crosschip.qualify.journal import Journal, read_journal
from crosschip.qualify.subjects.subject import load_subject
from crosschip.qualify.tracing.trace import Trace
from tests.qualify.rehearsed import RehearsedSubject

FIRST = str(Path(__file__).parent.parent.parent.parent / "recipes" / "first.toml")


def rehearsed(tmp_path: Path, chip: str, subject: object = None, budget_s: float = 600.0) -> ExamRecord:
    """The record of the rehearsal with FSDP2 on `chip`, whose faults are planted in its ranks alone."""
    activate("sim")
    plant([])
    journal = tmp_path / "journal.jsonl"
    context = ExamContext(
        exam="rehearsal",
        chip=find_chip("sim"),
        chip_spec=chip,
        role="train",
        tier="smoke",
        subject=subject or load_subject(FIRST),  # type: ignore[arg-type]
        trace=Trace("first", "train", "float32", []),
        journal=Journal(journal),
        budget_s=budget_s,
        reproducers=tmp_path / "reproducers",
    )
    rehearse_sharded(context)
    return read_journal(journal, "rehearsal").record


def test_an_operator_without_a_sharding_rule_is_named(tmp_path: Path) -> None:
    (finding,) = rehearsed(tmp_path, "sim:W4").findings
    assert finding.verdict == "FAIL"
    assert "_fused_adamw_" in finding.subject
    assert f"DTensor has no sharding rule for {finding.subject}" in finding.message
    assert "NotImplementedError" in finding.message


def test_ranks_on_an_honest_chip_get_the_losses_of_ranks_on_cpus() -> None:
    chip, cpus = (train_sharded([name, name], FIRST, "float32", 0) for name in ("sim", "cpu"))
    assert chip == cpus
    assert all(len(answer["losses"]) == 3 for answer in chip)


def test_a_rank_that_dies_is_told_with_its_last_words(tmp_path: Path) -> None:
    (finding,) = rehearsed(tmp_path, "sim:no-such-fault").findings
    assert "knows no fault 'no-such-fault'" in finding.message


@pytest.mark.parametrize(
    ("subject", "budget_s", "told"), [(RehearsedSubject(), 600.0, "own transformer"), (None, 1.0, "there was no time")]
)
def test_what_is_not_rehearsed_is_said(tmp_path: Path, subject: object, budget_s: float, told: str) -> None:
    record = rehearsed(tmp_path, "sim", subject, budget_s)
    assert not record.findings
    (line,) = record.not_covered
    assert told in line


@pytest.mark.parametrize(("on_cpus", "told"), [("late", "too busy"), ("losses", "it hangs: no answer")])
def test_a_hang_is_the_chips_only_where_cpus_get_there(tmp_path: Path, monkeypatch, on_cpus: str, told: str) -> None:
    answers = {"late": [{"late": True}] * 2, "losses": [{"losses": [1.0]}] * 2}

    def train(chips: list[str], *rest: object) -> list[dict[str, object]]:
        return answers[on_cpus if chips == ["cpu", "cpu"] else "late"]  # type: ignore[return-value]

    monkeypatch.setattr("crosschip.qualify.exams.rehearsal.sharded.train_sharded", train)
    record = rehearsed(tmp_path, "sim")
    assert told in (record.findings[0].message if record.findings else record.not_covered[0])
    assert bool(record.findings) == (on_cpus == "losses")


def test_what_fails_on_cpus_as_well_is_our_defect(tmp_path: Path, monkeypatch) -> None:
    wrong = [{"raised": "ValueError", "message": "x", "place": "y"}] * 2
    monkeypatch.setattr("crosschip.qualify.exams.rehearsal.sharded.train_sharded", lambda *_: wrong)
    with pytest.raises(RuntimeError, match="fails on CPUs, too: ValueError"):
        rehearsed(tmp_path, "sim")
