"""The rehearsal on the simulated chip: faults that training or serving shows, and honest chips that it must pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from crosschip.chips import find_chip
from crosschip.chips.faults import faults_from
from crosschip.chips.faults.variants import VARIANTS
from crosschip.chips.simulated import activate, plant
from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.rehearsal import exam as rehearsal
from crosschip.qualify.exams.rehearsal.run import SeedRun
from crosschip.qualify.finding import ExamRecord, Role, Tier
from crosschip.qualify.journal import Journal, read_journal
from crosschip.qualify.subjects.subject import StepMeasure, load_subject
from crosschip.qualify.tracing.trace import Trace
from tests.qualify.planted import On
from tests.qualify.rehearsed import RehearsedSubject

FIRST = str(Path(__file__).parent.parent.parent.parent / "recipes" / "first.toml")
Rehearse = Callable[..., ExamRecord]


@pytest.fixture
def rehearse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rehearse:
    """Rehearse the small subject with faults planted; the journals are left in `tmp_path`.

    So many seeds and steps whatever the time: what a busy machine finds must be what an idle one does.
    """
    number = 0
    monkeypatch.setattr(rehearsal, "_STEPS", 16)
    monkeypatch.setattr(rehearsal, "_SIZES", {"smoke": rehearsal._Size(2, 5), "standard": rehearsal._Size(3, 5)})

    def run(
        *faults: Any,
        dtype: str = "float32",
        role: Role = "train",
        tier: Tier = "smoke",
        chip: str = "sim",
        seed: int = 0,
        budget_s: float = 300.0,
        skip: frozenset[str] = frozenset(),
        subject: Any = None,
    ) -> ExamRecord:
        nonlocal number
        number += 1
        activate("sim")
        plant([])
        journal = tmp_path / f"journal-{number}.jsonl"
        context = ExamContext(
            exam="rehearsal",
            chip=find_chip(chip),
            chip_spec=chip,
            role=role,
            tier=tier,
            subject=subject or RehearsedSubject(),
            trace=Trace("rehearsed", role, dtype, []),
            journal=Journal(journal),
            budget_s=budget_s,
            reproducers=tmp_path / "reproducers",
            seed=seed,
            skip=skip,
        )
        plant(list(faults))
        try:
            rehearsal.examine(context)
        finally:
            plant([])
        return read_journal(journal, "rehearsal").record

    return run


def at_call(count: int) -> Callable[[int], bool]:
    return lambda number: number == count


def from_call(count: int) -> Callable[[int], bool]:
    return lambda number: number >= count


def losing_a_row(args: Any) -> torch.Tensor:
    return torch.index_add(args[0], args[1], args[2][:-1], args[3][:-1])


def refuse(result: Any) -> Any:
    raise RuntimeError("aicore exception 507015")


class Drift:
    """A silu that gets larger with every call."""

    name = "drift"

    def __init__(self) -> None:
        self.count = 0

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Callable[..., Any]) -> Any:
        result = compute(*args, **kwargs)
        if op._schema.name != "aten::silu":
            return result
        self.count += 1
        return result * (1.0 + 5e-4 * self.count)


# Each with the check that must show it and the beginning of the subject that must be named.
TRAINING: dict[str, tuple[Callable[[], Any], tuple[str, ...], str]] = {
    "one per cent in silu": (
        lambda: On("silu", lambda result: result * 1.01),
        ("gradient_error", "gradient_scale", "operator"),
        "mixture / aten.silu.default",
    ),
    "gradient of silu zero": (
        lambda: On("silu_backward", lambda result: result * 0),
        ("zero_gradient",),
        "mixture (backward) / aten.silu_backward.default",
    ),
    "root in the optimizer": (
        lambda: On("sqrt", lambda result: result * 1.05),
        ("update",),
        "optimizer / aten.sqrt.default",
    ),
    "addcmul_ without effect": (
        lambda: On("addcmul_", before=lambda args: args[0]),
        ("update",),
        "optimizer / aten.addcmul_.default",
    ),
    "no update at all": (
        lambda: On("addcdiv_", before=lambda args: args[0]),
        ("update", "weights_move"),
        "optimizer / aten.addcdiv_.default",
    ),
    "index_add loses a row": (
        lambda: On("index_add", before=losing_a_row),
        ("gradient_error", "gradient_scale", "operator", "final_loss"),
        "mixture / aten.index_add.default",
    ),
    "gradient of the embedding": (
        lambda: On("embedding_dense_backward", lambda result: result * 1.03),
        ("gradient_error", "gradient_scale"),
        "embedding (backward) / aten.embedding_dense_backward.default",
    ),
    "loss 2 % too large": (
        lambda: On("nll_loss_forward", lambda result: (result[0] * 1.02, result[1])),
        ("loss",),
        "step / aten.nll_loss_forward.default",
    ),
    "slow drift": (
        Drift,
        ("gradient_error", "gradient_scale", "loss", "operator"),
        "mixture / aten.silu.default",
    ),
    "NaN for good from step 8": (
        lambda: On("_log_softmax", lambda result: result * float("nan"), when=from_call(14)),
        ("finite",),
        "",
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", TRAINING)
def test_a_fault_in_training_is_shown_and_its_operator_named(rehearse: Rehearse, kind: str, dtype: str) -> None:
    make, checks, subject = TRAINING[kind]
    record = rehearse(make(), dtype=dtype)
    assert record.verdict == "FAIL"
    first = record.findings[0]
    assert first.check in checks
    assert first.critical
    if kind == "loss 2 % too large":  # outside every module: named by the function that calls it
        assert "/ aten.nll_loss_forward.default" in first.subject
    else:
        assert first.subject.startswith(subject)
    assert first.kind == "numerics"
    assert first.reproducer is not None


def test_a_nan_that_comes_once_is_reported_with_its_step(rehearse: Rehearse) -> None:
    # Five coupled steps come first, so the 14th call is in step 8 of the chip's own training.
    record = rehearse(On("_log_softmax", lambda result: result * float("nan"), when=at_call(14)))
    (finding,) = record.findings
    assert finding.check == "finite"
    assert finding.subject == "loss at step 8"
    assert "comes and goes" in finding.message


@pytest.mark.parametrize("when", [from_call(15), at_call(15)])
def test_an_exception_in_a_step_is_a_finding_with_the_line_of_the_model(
    rehearse: Rehearse, when: Callable[[int], bool]
) -> None:
    record = rehearse(On("native_layer_norm", refuse, when=when))
    (finding,) = record.findings
    assert finding.kind == "software"
    assert finding.check == "exception"
    assert "seed 0, step 9" in finding.message
    assert "aicore exception 507015" in finding.message
    assert "rehearsed.py" in finding.message
    if when(16):
        assert finding.subject.startswith("norm / aten.native_layer_norm.default")


def test_a_chip_that_cannot_even_hold_the_subject_is_a_finding(rehearse: Rehearse) -> None:
    class TooLarge(RehearsedSubject):
        def workload(self, device: Any, dtype: Any, seed: int = 0, small: bool = False) -> Any:
            if device.type == "sim":
                raise torch.OutOfMemoryError("out of memory: 2 GiB asked for, 1 GiB free")
            return super().workload(device, dtype, seed, small)

    for role in ("train", "serve"):
        (finding,) = rehearse(subject=TooLarge(), role=role).findings
        assert finding.kind == "software"
        assert "2 GiB asked for" in finding.message


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", [None, *VARIANTS])
def test_honest_chips_pass_training(rehearse: Rehearse, variant: str | None, dtype: str) -> None:
    record = rehearse(*([] if variant is None else [VARIANTS[variant]()]), dtype=dtype, seed=7)
    assert record.verdict in ("PASS", "PASS WITH LIMITS"), record.findings
    assert all(finding.check == "final_loss" for finding in record.findings)
    assert record.num_checks["gradient, error and scale"] > 20
    assert record.num_checks["operator call in lockstep"] > 100


@pytest.mark.parametrize("role", ["train", "serve"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cpu_passes(rehearse: Rehearse, dtype: str, role: Role) -> None:
    record = rehearse(dtype=dtype, role=role, chip="cpu")
    assert record.verdict in ("PASS", "PASS WITH LIMITS"), record.findings


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", [None, *VARIANTS])
def test_no_false_alarm_over_twenty_seeds(rehearse: Rehearse, variant: str | None, dtype: str) -> None:
    for seed in range(20):
        faults = [] if variant is None else [VARIANTS[variant]()]
        record = rehearse(*faults, dtype=dtype, seed=100 + 3 * seed)
        assert record.verdict != "FAIL", record.findings


def test_what_was_measured_is_kept_for_pages(rehearse: Rehearse) -> None:
    record = rehearse(dtype="bfloat16", tier="standard")
    kinds = {measured["kind"] for measured in record.measurements}
    assert kinds == {"gradients", "equivalence", "loss curve", "gradient norm ratio"}
    curve = next(measured for measured in record.measurements if measured["kind"] == "loss curve")
    assert len(curve["chip"]) == len(curve["reference"]) == len(curve["steps"]) <= 50
    assert curve["mean_relative_difference"] < 0.01
    equivalence = next(measured for measured in record.measurements if measured["kind"] == "equivalence")
    assert equivalence["margin"] == 0.005
    assert equivalence["num_seeds"] >= 2
    json.dumps(record.measurements, allow_nan=False)


def test_a_subject_without_seeds_is_said_to_have_one(rehearse: Rehearse) -> None:
    class Same(RehearsedSubject):
        def workload(self, device: Any, dtype: Any, seed: int = 0, small: bool = False) -> Any:
            return super().workload(device, dtype, 0, small)

    record = rehearse(subject=Same())
    assert record.verdict == "PASS"
    assert any("whatever the seed" in line for line in record.not_covered)


def test_after_a_death_the_call_is_named_in_the_journal(rehearse: Rehearse, tmp_path: Path) -> None:
    class Death(BaseException):
        """What no exam catches, as a signal."""

    def die(result: Any) -> Any:
        raise Death

    def die_at(count: int) -> On:
        return On("native_layer_norm", die, when=from_call(count))

    with pytest.raises(Death):
        rehearse(die_at(15))
    first = read_journal(tmp_path / "journal-1.jsonl", "rehearsal")
    assert first.now == "rehearsal, seed 0, training on the chip, step 9"
    with pytest.raises(Death):
        rehearse(die_at(1), skip=frozenset({first.now}))
    second = read_journal(tmp_path / "journal-2.jsonl", "rehearsal")
    assert second.now is not None
    assert second.now.startswith("rehearsal, lockstep, seed 0, step 9, call ")
    assert second.now.endswith("norm / aten.native_layer_norm.default")
    third = rehearse(die_at(1), skip=frozenset({first.now, second.now}))
    assert third.findings == []
    assert any("after the process died" in line for line in third.not_covered)


SERVING: dict[str, tuple[On, str]] = {
    "one per cent in the products": (On("addmm", lambda result: result * 1.01), "addmm"),
    "uniform attention": (
        On("scaled_dot_product_attention", before=lambda args: args[2].mean(-2, keepdim=True).expand_as(args[0]) * 1.0),
        "scaled_dot_product_attention",
    ),
    "NaN": (On("silu", lambda result: result * float("nan")), "silu"),
    "exception": (On("silu", refuse), "silu"),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", SERVING)
def test_a_fault_in_serving_is_shown_and_its_operator_named(rehearse: Rehearse, kind: str, dtype: str) -> None:
    fault, operator = SERVING[kind]
    record = rehearse(replace(fault), dtype=dtype, role="serve")
    assert record.verdict == "FAIL"
    assert f"/ aten.{operator}." in record.findings[0].subject


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", [None, *VARIANTS])
def test_honest_chips_pass_serving(rehearse: Rehearse, variant: str | None, dtype: str) -> None:
    record = rehearse(*([] if variant is None else [VARIANTS[variant]()]), dtype=dtype, role="serve")
    assert record.verdict == "PASS", record.findings
    assert record.num_checks["serving step"] >= 3


def test_a_bias_of_two_in_a_thousand_in_the_recipes_products_is_named(rehearse: Rehearse) -> None:
    record = rehearse(*faults_from("sim:N11"), dtype="bfloat16", subject=load_subject(FIRST))
    assert record.verdict == "FAIL"
    assert "/ aten.mm." in record.findings[0].subject
    assert record.findings[0].reproducer is not None


@pytest.mark.parametrize("role", ["train", "serve"])
def test_without_time_nothing_is_said_in_the_chips_favour(rehearse: Rehearse, role: Role) -> None:
    record = rehearse(role=role, budget_s=0.01)
    assert record.verdict == "INCONCLUSIVE"
    assert [finding.check for finding in record.findings] == ["time"]


def test_a_module_with_one_number_as_its_output_can_be_served(rehearse: Rehearse) -> None:
    class OneNumber(RehearsedSubject):
        def workload(self, device: Any, dtype: Any, seed: int = 0, small: bool = False) -> Any:
            made = super().workload(device, dtype, seed, small)
            logits = made.serve_step
            made.serve_step = lambda: logits().mean().reshape(1, 1)
            return made

    assert rehearse(role="serve", subject=OneNumber()).verdict == "PASS"


def test_weights_of_another_dtype_are_compared_as_far_as_it_goes(rehearse: Rehearse) -> None:
    class Narrow(RehearsedSubject):
        def workload(self, device: Any, dtype: Any, seed: int = 0, small: bool = False) -> Any:
            made = super().workload(device, dtype, seed, small)
            module: nn.Module = made.module.to(dtype)
            made.optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, foreach=False, fused=False)
            return made

    record = rehearse(dtype="bfloat16", subject=Narrow())
    assert record.verdict in ("PASS", "PASS WITH LIMITS"), record.findings


def test_curves_are_kept_where_the_time_cut_the_control(tmp_path: Path) -> None:
    """Of a chip that trains in bf16 the control may end at any step; a page draws whole curves only."""
    plant([])
    subject = RehearsedSubject()
    path = tmp_path / "journal.jsonl"
    context = ExamContext(
        "rehearsal", find_chip("sim"), "sim", "train", "smoke", subject,
        Trace("rehearsed", "train", "bfloat16", []), Journal(path), 10.0, tmp_path,
    )  # fmt: skip
    curve = [StepMeasure(2.0 - step / 10, 1.0) for step in range(8)]
    for number, control in enumerate((curve[:5], curve)):
        run = SeedRun(context, number, reference_curve=curve, chip_curve=curve, control_curve=control)
        rehearsal._keep_curves(context, run)
    cut, whole = (each for each in read_journal(path, "rehearsal").record.measurements if "loss" in each["kind"])
    assert len(cut["chip"]) == len(cut["steps"]) == 8
    assert "control" not in cut
    assert len(whole["control"]) == 8
