"""What is right alone has to be right in company."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from crosschip.chips.simulated import plant
from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.stability.burst import AT_ONCE, Burst, burst_attention, burst_serving
from crosschip.qualify.exams.stability.burst_findings import report_bursts
from crosschip.qualify.finding import ExamRecord
from crosschip.qualify.journal import JournalState
from tests.qualify.exams.stability.broken import FailsInCompany, OtherBitsInCompany

Contexts = Callable[..., ExamContext]
SHORTEST = f"burst: attention of {AT_ONCE} prompts of 512 tokens"


def burst(context: ExamContext, fault: object | None, limit_s: float = 1.0) -> list[Burst]:
    plant([] if fault is None else [fault])
    try:
        found = burst_attention(context, limit_s)
        report_bursts(context, found)
    finally:
        plant([])
    return found


def test_an_honest_chip_gives_the_same_bits_in_company(
    context_on: Contexts, record_of: Callable[[], ExamRecord]
) -> None:
    found = burst(context_on(), None, limit_s=4.0)
    assert found[-1].part.endswith(f"{AT_ONCE} at once")
    assert found[-1].num_done >= AT_ONCE
    assert record_of().findings == []
    assert [each["check"] for each in record_of().measurements] == ["burst"] * len(found)


def test_serving_steps_at_once(context_on: Contexts, record_of: Callable[[], ExamRecord]) -> None:
    context = context_on(role="serve")
    report_bursts(context, burst_serving(context, 1.0))
    assert record_of().findings == []
    assert record_of().num_checks["burst"] >= AT_ONCE


@pytest.mark.parametrize(("fault", "words"), [(FailsInCompany, "vector core exception"), (OtherBitsInCompany, "bits")])
def test_what_goes_wrong_in_company_only_is_named(
    context_on: Contexts, record_of: Callable[[], ExamRecord], fault: Callable[[], object], words: str
) -> None:
    burst(context_on(), fault(), limit_s=3.0)
    (finding,) = record_of().findings
    assert (finding.verdict, finding.critical) == ("FAIL", True)
    assert finding.subject.endswith(f"{AT_ONCE} at once")
    assert words in finding.message


class LimitedTo:
    """Attention over more than so many queries raises."""

    name = "limited"

    def __init__(self, queries: int, error: Exception) -> None:
        self.queries, self.error = queries, error

    def operator(self, op: object, args: tuple[object, ...], kwargs: dict[str, object], compute: object) -> object:
        tensors = [each for each in args if isinstance(each, torch.Tensor)]
        if "attention" in str(op) and tensors[0].shape[-2] > self.queries:
            raise self.error
        return compute(*args, **kwargs)  # type: ignore[operator]


def test_prompts_longer_than_the_subjects_are_a_limit(
    context_on: Contexts, record_of: Callable[[], ExamRecord]
) -> None:
    found = burst(context_on(), LimitedTo(512, RuntimeError("too long")), limit_s=6.0)
    (finding,) = record_of().findings
    assert finding.verdict == "PASS WITH LIMITS"
    assert finding.subject == f"attention of {AT_ONCE} prompts of 1024 tokens"
    assert found[-1].part == f"{SHORTEST}, {AT_ONCE} at once", "what works is tried several times at once"


@pytest.mark.parametrize("queries", [0, 512])
def test_want_of_memory_or_of_attention_is_not_this_exams_business(
    context_on: Contexts, record_of: Callable[[], ExamRecord], queries: int
) -> None:
    error = torch.OutOfMemoryError("out of memory") if queries else RuntimeError("no attention")
    burst(context_on(), LimitedTo(queries, error), limit_s=6.0)
    assert record_of().findings == []
    assert any(str(error) in each for each in record_of().not_covered)


def test_after_a_death_the_part_is_left_out(context_on: Contexts) -> None:
    context = context_on(skip=frozenset([SHORTEST]))
    assert burst(context, None) == []


def test_one_part_alone_is_taken_for_the_control(context_on: Contexts, said: Callable[[], JournalState]) -> None:
    part = f"burst: attention of {AT_ONCE} prompts of 1024 tokens, {AT_ONCE} at once"
    found = burst(context_on(only=f"{part}, in aten.scaled_dot_product_attention.default"), None)
    assert [each.part for each in found] == [part]
    assert said().done == {part}
