"""The replay of a step, operator by operator, on the simulated chip with faults of many kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from crosschip.chips.faults.variants import VARIANTS
from crosschip.chips.simulated import activate, plant
from crosschip.qualify.exams.rehearsal.lockstep import Replay, lockstep
from crosschip.qualify.tracing.one_call import call_is_wrong
from tests.qualify.planted import On
from tests.qualify.rehearsed import RehearsedSubject

activate("sim")
SIM = torch.device("sim:0")


@pytest.fixture(autouse=True)
def _honest_again() -> Iterator[None]:
    yield
    plant([])


def replay(fault: Any = None, dtype: torch.dtype = torch.float32, role: str = "train", device: Any = SIM) -> Replay:
    plant([])
    workload = RehearsedSubject().workload(device, dtype, seed=0, small=True)
    plant([] if fault is None else [fault])
    run: Callable[[], Any] = workload.serve_step if role == "serve" else lambda: workload.train_step(0)
    return lockstep(workload.module, device, run)


FAULTS = {
    "forward, in a module": (On("silu", lambda result: result * 1.01), "mixture", "silu"),
    "backward, in a module": (On("silu_backward", lambda result: result * 0), "mixture (backward)", "silu_backward"),
    "backward of an embedding": (
        On("embedding_dense_backward", lambda result: result * 1.01),
        "embedding (backward)",
        "embedding_dense_backward",
    ),
    "in place, in the optimizer": (On("addcmul_", before=lambda args: args[0]), "optimizer", "addcmul_"),
    "a root, in the optimizer": (On("sqrt", lambda result: result * 1.001), "optimizer", "sqrt"),
    "rows lost": (
        On("index_add", before=lambda args: torch.index_add(args[0], args[1], args[2][:-1], args[3][:-1])),
        "mixture",
        "index_add",
    ),
    "attention": (On("scaled_dot_product_attention", lambda result: result * 0.99), "", "scaled_dot_product_attention"),
    "norm for clipping": (On("linalg_vector_norm", lambda result: result * 1.01), "gradient clipping", ""),
    "one NaN": (
        On("silu", lambda result: result.clone().index_fill_(0, torch.tensor([0]), float("nan"))),
        "mixture",
        "silu",
    ),
    "a wrong dtype": (On("native_layer_norm", lambda r: (r[0].double(), r[1], r[2])), "norm", "native_layer_norm"),
    "a wrong choice": (On("argmax", lambda result: 1 - result), "mixture", "argmax"),
    "shape": (On("silu", lambda result: result[:, :-1]), "mixture", "silu"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FAULTS)
def test_the_operator_and_its_module_are_named(kind: str, dtype: torch.dtype) -> None:
    fault, where, operator = FAULTS[kind]
    if kind == "norm for clipping":
        fault = On("_foreach_norm", lambda result: [each * 1.01 for each in result])
    found = replay(fault, dtype)
    assert found.divergences, found
    first = found.divergences[0]
    assert first.where == where or not where
    assert first.operator.startswith(f"aten.{operator}")
    if kind not in ("a wrong choice", "shape", "a wrong dtype"):  # these go on as another shape or another route
        assert len(found.divergences) == 1, [each.subject for each in found.divergences]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("role", ["train", "serve"])
@pytest.mark.parametrize("variant", ["", *VARIANTS])
def test_an_honest_chip_is_never_named(variant: str, role: str, dtype: torch.dtype) -> None:
    found = replay(VARIANTS[variant]() if variant else None, dtype, role)
    assert found.error is None
    assert found.divergences == []
    assert found.num_compared > (20 if role == "serve" else 150)


def test_the_cpu_itself_is_compared_as_well() -> None:
    found = replay(device=torch.device("cpu"))
    assert found.divergences == []
    assert found.num_compared > 100


def test_an_exception_is_named_with_its_call() -> None:
    def refuse(result: Any) -> Any:
        raise RuntimeError("vector core exception")

    found = replay(On("native_layer_norm", refuse))
    assert isinstance(found.error, RuntimeError)
    (divergence,) = found.divergences
    assert divergence.what == "exception"
    assert "vector core exception" in str(divergence.measured)
    assert divergence.subject.startswith("norm / aten.native_layer_norm.default float32[6,12,24]")
    assert divergence.code is not None
    assert "rehearsed.py" in divergence.code


def test_every_call_is_told_before_it_is_made() -> None:
    told: list[str] = []
    workload = RehearsedSubject().workload(SIM, torch.float32)
    found = lockstep(workload.module, SIM, lambda: workload.train_step(0), told.append)
    assert len(told) == found.num_calls
    assert any("mixture / aten.silu.default" in line for line in told)


def test_the_call_can_be_made_again_from_what_is_kept() -> None:
    fault = On("silu", lambda result: result * 1.01)
    (divergence,) = replay(fault).divergences
    plant([fault])
    wrong, _, _ = call_is_wrong("sim:0", divergence.operator, divergence.args, divergence.kwargs, seed=0)
    assert wrong
    wrong, _, _ = call_is_wrong("cpu", divergence.operator, divergence.args, divergence.kwargs, seed=0)
    assert not wrong


def test_without_time_the_step_goes_on_and_says_so() -> None:
    workload = RehearsedSubject().workload(SIM, torch.float32)
    found = lockstep(workload.module, SIM, lambda: workload.train_step(0), limit_s=-1.0)
    assert not found.complete
    assert found.num_compared == 0
