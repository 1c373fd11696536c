"""The journal of an exam: what it says is written at once, one JSON line each.

So nothing is lost when the chip takes the process down; `now` names what is about to run, so that a crash or a hang has
a name.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from crosschip.qualify.finding import LEAST_COVERAGE, Coverage, ExamRecord, Finding

__all__ = ["IN_OPERATOR", "Journal", "JournalReader", "JournalState", "part_of", "read_journal"]

IN_OPERATOR = ", in "  # between a part and the operator that stands still in it


class Journal:
    """The lines an exam writes: `now`, `ready`, `done`, `finding`, `checked`, `measured`, `covered`, `not_covered`."""

    def __init__(self, path: Path) -> None:
        self._file: TextIO = path.open("a", encoding="utf-8", buffering=1)

    def begun(self) -> None:
        """Mark that a process begins: what an earlier one was about to run is no longer running.

        A line in which that one was killed is ended.
        """
        self._file.write("\n")
        self._write({"begun": time.time()})

    def now(self, what: str) -> None:
        """Name what is about to run on the chip: an operator call, a step. Each must take seconds at most."""
        self._write({"now": what, "at": time.monotonic()})

    def ready(self, what: str, reproducer: str) -> None:
        """Name the file that does a part again, written before the part, which may end the process."""
        self._write({"ready": what, "reproducer": reproducer})

    def done(self, what: str) -> None:
        """Say that a part of the exam is finished; after a crash the exam goes on with the parts that are not."""
        self._write({"done": what})

    def finding(self, finding: Finding) -> None:
        """Report something that is not a plain pass."""
        self._write({"finding": {**finding.document(), "found_at": time.time()}})

    def checked(self, check: str, number: int = 1) -> None:
        """Count checks that were made, whatever came out."""
        self._write({"checked": check, "number": number})

    def measured(self, **measurement: Any) -> None:
        """Keep a number for pages and comparisons, such as an operator's error ratio with its bounds."""
        self._write({"measured": measurement})

    def covered(self, what: str, made: int, planned: int, least: float = LEAST_COVERAGE) -> None:
        """Say how much of a plan was reached in the time; with a smaller share than `least` the exam is inconclusive.

        A later line about the same plan replaces an earlier one.
        """
        self._write({"covered": what, "made": made, "planned": planned, "least": least})

    def not_covered(self, what: str) -> None:
        """Say what the exam did not look at, and why."""
        self._write({"not_covered": what})

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")


@dataclass
class JournalState:
    """What a journal says so far: the record, the parts that are done, and what was last begun, with its time.

    `ready` has the file for each part that had one beforehand.
    """

    record: ExamRecord
    done: set[str] = field(default_factory=set)
    now: str | None = None
    now_at: float | None = None
    ready: dict[str, str] = field(default_factory=dict)


class JournalReader:
    """Follows a journal while it is being written; a last line without its end waits for the rest."""

    def __init__(self, path: Path, exam: str) -> None:
        self._path, self._position = path, 0
        self.state = JournalState(ExamRecord(exam))

    def read(self) -> JournalState:
        """Take in what was written since the last call."""
        if not self._path.exists():
            return self.state
        with self._path.open("rb") as file:
            file.seek(self._position)
            written = file.read()  # once: the writer may be in the middle of a line, and go on while this reads
        whole = written[: written.rfind(b"\n") + 1]
        self._position += len(whole)
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):  # cut off when its writer was killed, or empty
                _take(self.state, json.loads(line))
        return self.state


def part_of(now: str) -> str:
    """The part of an exam, without the operator in which it stands still."""
    return now.partition(IN_OPERATOR)[0]


def read_journal(path: Path, exam: str) -> JournalState:
    """What a journal says."""
    return JournalReader(path, exam).read()


def _take(state: JournalState, line: dict[str, Any]) -> None:
    record = state.record
    if "now" in line:
        state.now, state.now_at = line["now"], line["at"]
    elif "begun" in line:
        state.now = None
    elif "ready" in line:
        state.ready[line["ready"]] = line["reproducer"]
    elif "done" in line:
        state.done.add(line["done"])
        state.now = None
    elif "finding" in line:
        record.findings.append(Finding.from_document(line["finding"]))
    elif "checked" in line:
        record.num_checks[line["checked"]] = record.num_checks.get(line["checked"], 0) + line["number"]
    elif "measured" in line:
        record.measurements.append(line["measured"])
    elif "covered" in line:
        record.coverage[line["covered"]] = Coverage(line["made"], line["planned"], line["least"])
    elif "not_covered" in line:
        record.not_covered.append(line["not_covered"])
