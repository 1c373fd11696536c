"""Exams whose process did not end well: what that is as a finding, and the files that were written beforehand."""

from __future__ import annotations

import re
import time
from pathlib import Path

from crosschip.qualify.finding import Finding
from crosschip.qualify.journal import IN_OPERATOR, JournalState
from crosschip.qualify.proctor import Ended

__all__ = ["CALL_ID", "drop_unused", "loss_finding", "names_a_call"]

CALL_ID = re.compile(r"\bc\d{4,}\b")  # of a traced call, in the name of a part
_WORDS = {"hang": "hangs", "crash": "takes the process down", "budget": "the exam did not end in time"}


def loss_finding(exam: str, ended: Ended, reproducer: str | None) -> Finding:
    """A child that did not end well, as a finding about the chip."""
    return Finding(
        exam=exam,
        kind="software" if ended.how in ("raised", "refused") else "stability",
        verdict="INCONCLUSIVE" if ended.how == "budget" else "FAIL",
        subject=ended.now or "before its first part",
        check=ended.how,
        message=f"{_WORDS.get(ended.how, 'raises')}: {ended.detail}",
        measured=ended.how,
        limit="ends by itself",
        limit_source="every part of an exam takes seconds on the CPU",
        critical=True,
        severity=100.0,
        reproducer=reproducer,
        details={"traceback": ended.result.get("raised", {}).get("traceback", "")},
        found_at=time.time(),
    )


def names_a_call(now: str) -> bool:
    """Whether the name of what was going on holds a traced call, or an operator."""
    return IN_OPERATOR in now or CALL_ID.search(now) is not None


def drop_unused(directory: Path, state: JournalState) -> None:
    """Remove the files that were ready for parts about which no finding came: they would accuse the chip."""
    named = {finding.reproducer for finding in state.record.findings}
    for reproducer in state.ready.values():
        if reproducer not in named:
            (directory / reproducer).unlink(missing_ok=True)
