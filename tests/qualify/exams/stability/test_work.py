"""Fixed work gives the same bits each time, and the odd one out is found wherever it lies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from crosschip.chips.faults import faults_from
from crosschip.chips.simulated import plant
from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.stability.memory import read_memory
from crosschip.qualify.exams.stability.memory_slope import LEAST_GROWTH_BYTES
from crosschip.qualify.exams.stability.work import Repeats, Work, call_works, step_work, timed_step
from crosschip.qualify.subjects.subject import load_subject
from tests.qualify.conftest import FIRST

Contexts = Callable[..., ExamContext]


def repeated(*values: float) -> Repeats:
    work = Work("soak: it", "it", dict)
    repeats = Repeats.begun(work, {"output": torch.tensor([values[0], 7.0])})
    for value in values[1:]:
        repeats.take({"output": torch.tensor([value, 7.0])}, 0.5)
    return repeats


def test_one_odd_repeat_is_counted_and_shown() -> None:
    repeats = repeated(1.0, 1.0, 1.5, 1.0)
    assert (repeats.number, repeats.mismatches, repeats.first_odd, repeats.time_s) == (4, 1, 3, 1.5)
    difference = repeats.difference()
    assert difference is not None
    assert (difference.expected, difference.got, difference.place) == (1.0, 1.5, (0,))


def test_the_first_may_be_the_odd_one_out() -> None:
    repeats = repeated(1.5, *[1.0] * 9)
    assert repeats.mismatches == 1
    difference = repeats.difference()
    assert difference is not None
    assert (difference.expected, difference.got) == (1.0, 1.5)


def test_equal_repeats_have_no_mismatch() -> None:
    repeats = repeated(*[float("nan")] * 5)
    assert (repeats.mismatches, repeats.difference()) == (0, None)


def test_each_repeat_other_bits() -> None:
    assert repeated(*[float(each) for each in range(10)]).mismatches == 9


def test_results_too_large_to_be_kept_are_refused() -> None:
    with pytest.raises(ValueError, match="257 MiB"):
        Repeats.begun(Work("soak: it", "it", dict), {"output": torch.empty(257 << 20, dtype=torch.uint8)})


@pytest.mark.parametrize("chip", ["sim", "cpu"])
@pytest.mark.parametrize("role", ["train", "serve"])
@pytest.mark.parametrize("largest", [False, True])
def test_fixed_work_gives_the_same_bits(context_on: Contexts, chip: str, role: str, largest: bool) -> None:
    context = context_on(chip, role=role)
    works = [*call_works(context, largest), step_work(context)]
    assert len({work.part for work in works}) == len(works) > 8
    for work in works:
        repeats = Repeats.begun(work, work.run())
        for _ in range(3):
            repeats.take(work.run(), 0.0)
        assert repeats.mismatches == 0, work.part
    assert sum(work.share for work in works) == pytest.approx(1.0, abs=0.35)  # views and random numbers are left out


def test_what_a_call_writes_into_is_as_before_each_time(context_on: Contexts) -> None:
    """AdamW writes into weights and moments; without that care each repeat would go on from the last."""
    works = [work for work in call_works(context_on(), False) if work.call and "adamw" in work.call.operator]
    assert works
    for work in works:
        first, again = work.run(), work.run()
        assert all(torch.equal(first[name].cpu(), again[name].cpu()) for name in first)


@pytest.mark.parametrize("learns", [False, True])
def test_timed_steps_keep_no_code_for_new_shapes(context_on: Contexts, learns: bool) -> None:
    """The control: as weights learn, experts get other numbers of tokens; oneDNN compiles for each and keeps it."""
    if learns and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN compiles no code for bf16 on this CPU, so the control would show nothing")
    context = context_on("cpu")
    subject = load_subject(FIRST)
    context = replace(context, subject=subject, trace=replace(context.trace, compute_dtype="bfloat16"))
    step = timed_step(context)
    workload = subject.workload(context.chip.device, torch.bfloat16, small=True)

    def once(number: int) -> None:
        if learns:
            workload.train_step(number)
        else:
            step.ready()
            step.run()

    for number in range(3):
        once(number)
    before = read_memory(context.chip.device).allocated
    if before is None:
        pytest.skip("this C library does not tell what it has handed out")
    for number in range(3, 9):
        once(number)
    after = read_memory(context.chip.device).allocated
    assert after is not None
    assert (after - before > LEAST_GROWTH_BYTES) == learns


def test_a_step_on_a_chip_that_flips_bits_differs(context_on: Contexts) -> None:
    """The control of the step's hash."""
    work = step_work(context_on())
    repeats = Repeats.begun(work, work.run())
    plant(faults_from("sim:S15,every=20"))
    try:
        repeats.take(work.run(), 0.0)
    finally:
        plant([])
    assert repeats.mismatches == 1
