"""What stands still has a name, and what died is not begun again."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from crosschip.chips.simulated import plant
from crosschip.qualify.exams import operator_watch
from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.operator_watch import OperatorWatch
from crosschip.qualify.journal import JournalState

Said = Callable[[], JournalState]


class Slow:
    """One operator takes a second."""

    name = "slow"

    def operator(self, op: object, args: tuple[object, ...], kwargs: dict[str, object], compute: object) -> object:
        if str(op).startswith("aten.sigmoid"):
            time.sleep(1.0)
        return compute(*args, **kwargs)  # type: ignore[operator]


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator_watch, "STANDS_STILL_S", 0.3)
    monkeypatch.setattr(operator_watch, "_LOOK_S", 0.05)


@pytest.mark.usefixtures("soon")
def test_an_operator_that_stands_still_is_named(context_on: Callable[..., ExamContext], said: Said) -> None:
    context = context_on()
    x = torch.ones(4).to("sim")
    plant([Slow()])
    context.journal.now("a step")
    with OperatorWatch(context.journal, "a step") as watch, watch.mode():
        x + x
        x.sigmoid()
    plant([])
    assert said().now == "a step, in aten.sigmoid.default"
    assert not context_on(skip=frozenset([said().now or ""])).wants("a step")


@pytest.mark.usefixtures("soon")
def test_what_goes_on_is_not_named(context_on: Callable[..., ExamContext], said: Said) -> None:
    context = context_on()
    x = torch.ones(4).to("sim")
    context.journal.now("a step")
    with OperatorWatch(context.journal, "a step") as watch, watch.mode():
        until = time.monotonic() + 0.6
        while time.monotonic() < until:
            x.sigmoid()
        time.sleep(0.4)  # the host's own work
    assert said().now == "a step"


def test_parts_that_were_done_or_died_in_are_left_out(context_on: Callable[..., ExamContext]) -> None:
    skip = frozenset(["burst: 4 at once, in aten.mm.default", "soak: mm (c0001)"])
    context = context_on(skip=skip)
    assert not context.wants("burst: 4 at once")
    assert not context.wants("soak: mm (c0001)")
    assert context.wants("soak: mm (c00012)")
    assert context.wants("burst: 4")
    alone = context_on(only="burst: 4 at once, in aten.mm.default")
    assert alone.wants("burst: 4 at once")
    assert not alone.wants("soak: mm (c0001)")
