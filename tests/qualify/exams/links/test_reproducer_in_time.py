from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest

from crosschip.qualify.exams.links import exam as links


class FakeExam:
    """An exam with so many looks at the clock until its time is up."""

    def __init__(self, looks: int) -> None:
        self.looks, self.num_ranks, self.announced = looks, 3, []
        self.context = self

    @property
    def remaining_s(self) -> float:
        self.looks -= 1
        return float(self.looks)

    def announce(self, part: str) -> None:
        self.announced.append(part)


def in_time(exam: FakeExam) -> str | None:
    defect = SimpleNamespace(check="collective conformance", call="all_to_all float32")
    return links._reproducer_in_time(cast(Any, exam), cast(Any, defect))


def test_a_reproducer_that_takes_long_is_waited_for_with_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    exam, may_end = FakeExam(looks=100), threading.Event()

    def slow(context: Any, defect: Any, num_ranks: int) -> str:
        may_end.wait()
        return "file.py"

    def announce(part: str) -> None:
        exam.announced.append(part)
        if len(exam.announced) == 3:
            may_end.set()

    monkeypatch.setattr(links, "write_collective_reproducer", slow)
    monkeypatch.setattr(exam, "announce", announce)
    assert in_time(exam) == "file.py"
    assert len(exam.announced) >= 3


def test_one_that_never_comes_does_not_cost_the_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    monkeypatch.setattr(links, "write_collective_reproducer", lambda *args: never.wait())
    assert in_time(FakeExam(looks=-60)) is None
    never.set()


def test_what_does_not_show_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "write_collective_reproducer", lambda *args: None)
    assert in_time(FakeExam(looks=100)) is None


def test_a_defect_of_its_own_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(context: Any, defect: Any, num_ranks: int) -> str:
        raise KeyError("rows")

    monkeypatch.setattr(links, "write_collective_reproducer", broken)
    with pytest.raises(KeyError, match="rows"):
        in_time(FakeExam(looks=100))
