from __future__ import annotations

import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from crosschip.chips.faults import faults_from
from crosschip.chips.simulated import plant
from crosschip.qualify.exams.software.calls_exist import plain_parameters
from crosschip.qualify.exams.software.cliffs import CLIFF_FACTOR, CallTime, slowness, typical_proportion
from crosschip.qualify.exams.software.dtype_truth import DTYPES, dtype_step, steps_of
from crosschip.qualify.exams.software.round_trips import LAYOUTS, copy_is_exact, random_numbers_repeat, saving_is_exact
from crosschip.qualify.finding import ExamRecord, Finding
from crosschip.qualify.tracing.inputs import make_arguments, operator_named
from crosschip.qualify.tracing.replay import aspects_of, best_time_s
from crosschip.qualify.tracing.trace import TracedCall
from tests.qualify.broken_chip import Broken

Examine = Callable[..., ExamRecord]


pytestmark = pytest.mark.usefixtures("honest_afterwards")


def failures(record: ExamRecord) -> list[Finding]:
    return [each for each in record.findings if each.verdict == "FAIL"]


def changed(change: Callable[[Any], Any]) -> Callable[..., Any]:
    """A fault's `change` that hands the honest result through a function."""
    return lambda op, args, kwargs, compute: change(compute(*args, **kwargs))


@pytest.mark.parametrize("role", ["train", "serve"])
def test_the_honest_chip_passes(examine_on: Examine, role: str) -> None:
    record = examine_on("software", role=role)
    assert (record.verdict, record.findings, record.not_covered) == ("PASS", [], [])
    assert record.num_checks["traced call"] > 20
    assert record.num_checks["dtype"] == sum(len(steps_of(dtype)) for dtype in DTYPES)


def test_the_cpu_passes(examine_on: Examine) -> None:
    assert examine_on("software", chip_spec="cpu").verdict == "PASS"


@pytest.mark.parametrize("variant", ["fp32", "reordered", "naive", "noisy", "flush"])
def test_honest_variants_pass(examine_on: Examine, variant: str) -> None:
    record = examine_on("software", faults_from(f"sim:{variant}"))
    assert failures(record) == []


def test_a_missing_operator_is_named_with_a_reproducer(examine_on: Examine) -> None:
    def missing(op: Any, args: Any, kwargs: Any, compute: Any) -> Any:
        raise NotImplementedError(f"no kernel for {op}")

    (found,) = failures(examine_on("software", Broken(missing, ("aten.gelu.",))))
    assert found.subject.startswith("aten.gelu.")
    assert found.check == "traced call: raises"
    assert found.kind == "software"
    assert found.reproducer == "software-gelu-raises.py"


def raises_at(when: Callable[[int], bool], error: Exception) -> Broken:
    def raises(op: Any, args: Any, kwargs: Any, compute: Any) -> Any:
        if when(fault.num_changed):
            raise error
        return compute(*args, **kwargs)

    fault = Broken(raises, ("aten.gelu.default",))
    return fault


@pytest.mark.parametrize(
    ("when", "words"), [(lambda n: n == 1, "not again in 20 tries"), (lambda n: n % 5 == 1, "again at try 5")]
)
def test_an_operator_that_raises_now_and_then_is_named(
    examine_on: Examine, tmp_path: Path, when: Callable[[int], bool], words: str
) -> None:
    record = examine_on("software", raises_at(when, RuntimeError("lost its way")))
    (found,) = [each for each in failures(record) if each.check.startswith("traced call")]
    assert found.subject.startswith("aten.gelu.")
    assert (found.check, found.kind) == ("traced call: now and then", "software")
    assert f"RuntimeError: lost its way; {words}" in found.message
    assert found.reproducer is not None
    assert "repeats=200" in (tmp_path / "reproducers" / found.reproducer).read_text(encoding="utf-8")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_host_without_memory_is_not_the_chips_failure(examine_on: Examine, error: Exception) -> None:
    record = examine_on("software", raises_at(lambda n: n == 1, error))
    assert failures(record) == []
    assert any(each.startswith("aten.gelu.") and type(error).__name__ in each for each in record.not_covered)


def test_a_dtype_that_is_wrong_in_one_call_is_named(examine_on: Examine) -> None:
    def widens(op: Any, args: Any, kwargs: Any, compute: Any) -> Any:
        made = compute(*args, **kwargs)
        return made.double() if fault.num_changed == 1 else made

    fault = Broken(widens, ("aten.gelu.default",))
    (found,) = failures(examine_on("software", fault))
    assert found.check == "traced call: now and then"
    assert "torch.float64" in found.message


def test_an_operator_that_refuses_one_dtype_is_named_in_that_dtype_only(examine_on: Examine) -> None:
    def refuses_bf16(op: Any, args: Any, kwargs: Any, compute: Any) -> Any:
        if any(isinstance(each, torch.Tensor) and each.dtype == torch.bfloat16 for each in args):
            raise RuntimeError('"layer_norm" not implemented for bfloat16')
        return compute(*args, **kwargs)

    fault = Broken(refuses_bf16, ("aten.native_layer_norm.",))
    assert failures(examine_on("software", fault)) == []
    (found,) = failures(examine_on("software", fault, dtype=torch.bfloat16))
    assert "native_layer_norm" in found.subject
    assert found.critical


def test_a_result_of_another_dtype_is_named(examine_on: Examine) -> None:
    fault = Broken(changed(lambda made: made.float()), ("aten.gelu.",))
    (found,) = failures(examine_on("software", fault, dtype=torch.bfloat16))
    assert (found.check, found.measured) == ("traced call: dtype", "dtype ['torch.float32']")
    assert found.limit == "dtype ['torch.bfloat16']"


def test_a_result_of_another_shape_is_named(examine_on: Examine) -> None:
    (found,) = failures(examine_on("software", Broken(changed(lambda made: made.unsqueeze(0)), ("aten.gelu.",))))
    assert found.check == "traced call: shape"


def test_sharing_of_memory_is_seen() -> None:
    made = torch.ones(3, 4, device="sim")
    shared = aspects_of(operator_named("aten.transpose.int"), (made, 0, 1), {}, "sim:0")
    copied = aspects_of(operator_named("aten.transpose_copy.int"), (made, 0, 1), {}, "sim:0")
    assert (shared["memory"], copied["memory"]) == (["that of argument 0"], ["its own"])
    assert shared["strides"] == ["[1, 4]"]


def test_another_layout_of_an_elementwise_result_is_a_limit(examine_on: Examine) -> None:
    def other_layout(made: torch.Tensor) -> torch.Tensor:
        return made.transpose(-1, -2).contiguous().transpose(-1, -2)

    record = examine_on("software", Broken(changed(other_layout), ("aten.gelu.default",)))
    assert record.verdict == "PASS WITH LIMITS"
    assert [each.check for each in record.findings] == ["traced call: strides"]


def test_a_warning_of_running_on_the_cpu_is_a_failure(examine_on: Examine) -> None:
    def warns(op: Any, args: Any, kwargs: Any, compute: Any) -> Any:
        warnings.warn(f"{op} is not supported on this backend and will fall back to run on the CPU", stacklevel=1)
        return compute(*args, **kwargs)

    (found,) = failures(examine_on("software", Broken(warns, ("aten.gelu.",))))
    assert found.check == "traced call: fallback"


def test_a_missing_backward_of_attention_is_named(examine_on: Examine) -> None:
    def missing(op: Any, args: Any, kwargs: Any, compute: Any) -> Any:
        raise RuntimeError("no backward kernel")

    (found,) = failures(examine_on("software", Broken(missing, ("attention_backward",))))
    assert "scaled_dot_product_attention" in found.subject
    assert found.check == "traced call: gradient"


def test_a_result_on_another_device_is_seen() -> None:
    call = TracedCall("c", "aten.neg.default", [], {}, [])
    made = aspects_of(operator_named(call.operator), (torch.ones(3),), {}, "sim:0")
    assert made["device"] == ["cpu"]


@pytest.mark.parametrize(("name", "least_elements"), [("gelu", 0), ("gelu", 2048), ("add", 0)])
def test_a_slow_operator_is_a_cliff(examine_on: Examine, name: str, least_elements: int) -> None:
    """Also `add`, by which the time of a trivial call is measured, too."""

    def slow(op: Any, args: Any, kwargs: Any, compute: Any) -> Any:
        if args[0].numel() >= least_elements:
            time.sleep(0.05)
        return compute(*args, **kwargs)

    (found,) = failures(examine_on("software", Broken(slow, (f"aten.{name}.",))))
    assert found.check == "performance cliff"
    assert found.subject.startswith(f"aten.{name}.")
    assert isinstance(found.measured, float)
    assert found.measured > CLIFF_FACTOR
    assert found.reproducer is not None
    assert found.reproducer.startswith(f"software-{name}-")


def test_an_evenly_slow_chip_with_long_launches_has_no_cliff() -> None:
    """Ten times slower than the reference, 1 ms for a launch; lists of tensors are taken one by one."""
    times = [CallTime(str(n), f"op{n % 4}", 1e-3 + 10 * n * 1e-3, n * 1e-3, 2) for n in range(20)]
    times += [CallTime("list", "list", 69e-3, 0.1e-3, 69)]
    typical = typical_proportion(times, 1e-3)
    assert 9.0 < typical < 11.0
    assert max(slowness(each, typical, 1e-3) for each in times) < CLIFF_FACTOR


def test_an_accelerator_that_loses_only_where_it_launches_has_no_cliff() -> None:
    """Products 500 times faster than the reference, a sort 10 times, everything at least 10 us."""
    products = [CallTime(f"mm{n}", "mm", 10e-6 + n * 1e-3 / 500, n * 1e-3, 2) for n in range(1, 20)]
    views = [CallTime(f"view{n}", "view", 10e-6, 2e-6, 1) for n in range(50)]
    others = [CallTime("sort", "sort", 100e-6, 1e-3, 1), *views]
    typical = typical_proportion([*products, *others], 10e-6)
    assert max(slowness(each, typical, 10e-6) for each in [*products, *others]) < CLIFF_FACTOR


def test_an_operator_that_makes_most_calls_and_is_slow_in_all_is_a_cliff() -> None:
    products = [CallTime(f"mm{n}", "mm", 0.1, 1e-3, 2) for n in range(20)]
    others = [CallTime(name, name, 1e-3, 1e-3, 2) for name in ("gelu", "sum", "sort")]
    typical = typical_proportion([*products, *others], 1e-5)
    assert [slowness(each, typical, 1e-5) > CLIFF_FACTOR for each in (products[0], others[0])] == [True, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cpu_has_every_dtype(dtype: str) -> None:
    assert [step for step in steps_of(dtype) if dtype_step("cpu", dtype, step)[0]] == []


@pytest.mark.parametrize(("cut", "dtype"), [("float32", "float64"), ("bfloat16", "float32"), ("float16", "bfloat16")])
def test_a_dtype_that_is_silently_narrower_fails(examine_on: Examine, cut: str, dtype: str) -> None:
    whole, narrow = getattr(torch, dtype), getattr(torch, cut)

    def cuts(made: Any) -> Any:
        is_whole = isinstance(made, torch.Tensor) and made.dtype == whole
        return made.to(narrow).to(whole) if is_whole else made

    record = examine_on("software", Broken(changed(cuts), ("aten.add.", "aten.mul.", "aten.sum.", "aten.div.")))
    (found,) = [each for each in failures(record) if each.check == "dtype truth table"]
    assert (found.subject, found.kind) == (dtype, "numerics")
    assert found.reproducer is not None


def test_a_missing_dtype_is_a_limit_unless_the_subject_uses_it(examine_on: Examine) -> None:
    def without(dtype: torch.dtype) -> Broken:
        def refuses(op: Any, args: Any, kwargs: Any, compute: Any) -> Any:
            made = compute(*args, **kwargs)
            if any(isinstance(each, torch.Tensor) and each.dtype == dtype for each in (*args, made)):
                raise RuntimeError(f"{dtype} is not supported")
            return made

        return Broken(refuses)

    record = examine_on("software", without(torch.float64))
    assert record.verdict == "PASS WITH LIMITS"
    assert [each.subject for each in record.findings] == ["float64"]
    used = examine_on("software", without(torch.int64))
    assert "int64" in [each.subject for each in failures(used)]


def test_catalogue_faults_of_software_are_named(examine_on: Examine) -> None:
    assert failures(examine_on("software", faults_from("sim:N20")))[0].subject == "float64"
    assert "gelu" in failures(examine_on("software", faults_from("sim:W1,operator=gelu,slowdown=2000")))[0].subject
    assert "gelu" in failures(examine_on("software", faults_from("sim:W3,operator=gelu")))[0].subject
    assert examine_on("software", faults_from("sim:W5")).findings[0].subject == "float64"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies_are_exact_on_the_honest_chip(layout: str) -> None:
    for dtype in ("float64", "bfloat16", "int8", "bool"):
        for size in (0, 1, 17, 4097):
            assert not copy_is_exact("sim:0", dtype, size, layout, False)[0], (dtype, size)


def test_a_copy_that_loses_its_end_fails(examine_on: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.Tensor.to

    def loses(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        made = whole(self, *args, **kwargs)
        if (
            self.device.type == "sim"
            and made.device.type == "cpu"
            and made.numel() > 4000
            and made.dtype == torch.float32
        ):
            made[-1] = 7.0
        return made

    monkeypatch.setattr(torch.Tensor, "to", loses)
    record = examine_on("software")
    assert [each.subject for each in failures(record)] == ["copies of float32"]


def test_files_and_random_numbers_on_the_honest_chip() -> None:
    for device in ("cpu", "sim:0"):
        assert not saving_is_exact(device, list(DTYPES))[0]
        assert not random_numbers_repeat(device)[0]


def test_random_numbers_that_do_not_follow_their_state_fail(
    examine_on: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.get_device_module("sim"), "set_rng_state", lambda state, device=None: None)
    record = examine_on("software")
    assert [each.subject for each in failures(record)] == ["random numbers"]


def test_the_exam_keeps_to_its_budget(examine_on: Examine) -> None:
    record = examine_on("software", budget_s=0.01)
    assert record.coverage["traced calls"].made < record.coverage["traced calls"].planned
    assert record.verdict == "INCONCLUSIVE"


def test_plain_parameters_keep_shapes_and_integers() -> None:
    spec = {"shape": [4], "stride": [1], "dtype": "int64", "values": {"low": 0, "high": 3}}
    wide = {"shape": [4, 2], "stride": [2, 1], "dtype": "float32", "values": {"normal": [0.0, 1.0]}}
    call = TracedCall("c", "aten.index_select.default", [{"tensor": wide}, 0, {"tensor": spec}], {}, [])
    parameters = plain_parameters(call, 0)
    (values, _, indices), _ = make_arguments(parameters["args"], parameters["kwargs"], 0, "cpu")
    assert torch.equal(values, torch.ones(4, 2))
    assert (int(indices.min()), int(indices.max())) == (0, 3)


@pytest.mark.parametrize("honest", [True, False])
def test_the_chips_clock_stands_still_while_an_honest_variant_imitates(honest: bool) -> None:
    def slow(op: Any, args: Any, kwargs: Any, compute: Any) -> Any:
        time.sleep(0.05)
        return compute(*args, **kwargs)

    fault = Broken(slow, ("aten.neg.",))
    fault.honest = honest  # type: ignore[attr-defined]
    plant([fault])
    took = best_time_s(operator_named("aten.neg.default"), (torch.ones(3, device="sim"),), {}, "sim:0", repeats=3)
    assert (took < 0.025) == honest


def speeds(record: ExamRecord) -> list[dict[str, Any]]:
    return [each for each in record.measurements if each.get("kind") == "speed"]


@pytest.mark.parametrize("role", ["train", "serve"])
def test_the_speed_of_the_subjects_step_has_bounds(examine_on: Examine, role: str) -> None:
    (speed,) = speeds(examine_on("software", role=role))
    assert 0 < speed["lower"] <= speed["value"] <= speed["upper"]
    assert (speed["what"], speed["unit"]) == (f"{role} steps", "steps/s")
    assert speed["num"] >= 5


def test_a_chip_on_which_steps_take_longer_is_surely_slower(examine_on: Examine) -> None:
    def slow(op: Any, args: Any, kwargs: Any, compute: Any) -> Any:
        time.sleep(0.02)
        return compute(*args, **kwargs)

    (honest,) = speeds(examine_on("software"))
    (slowed,) = speeds(examine_on("software", Broken(slow, ("aten.gelu.",))))
    assert slowed["upper"] < honest["lower"]


class HoldsFewResults:
    """Memory for a few results at a time: enough for one call after the other, not for the activations of a step."""

    name = "runs out of memory"

    def __init__(self) -> None:
        self.held: list[weakref.ref[torch.Tensor]] = []

    def operator(self, op: Any, args: Any, kwargs: Any, compute: Any) -> Any:
        result = compute(*args, **kwargs)
        if isinstance(result, torch.Tensor) and not op.is_view:
            self.held = [*(each for each in self.held if each() is not None), weakref.ref(result)]
        if len(self.held) > 20:
            raise RuntimeError("out of memory: tried to allocate 2.00 GiB")
        return result


def test_a_step_in_which_the_chip_raises_is_a_failure_though_each_call_goes_well(examine_on: Examine) -> None:
    (found,) = failures(examine_on("software", HoldsFewResults()))
    assert (found.subject, found.check, found.kind) == ("train step", "the subject's step", "software")
    assert "out of memory" in found.message
    assert found.critical


def test_too_few_steps_are_no_speed(examine_on: Examine) -> None:
    record = examine_on("software", budget_s=0.01)
    assert speeds(record) == []
    assert any("speed of a step" in each for each in record.not_covered)
