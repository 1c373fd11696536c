"""Traces: what is recorded, what is left out, and that calls can be made again from it."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

from crosschip.chips.simulated import activate, plant
from crosschip.errors import QualifyError
from crosschip.qualify.subjects.subject import StepMeasure, load_subject
from crosschip.qualify.tracing.inputs import make_arguments, operator_named
from crosschip.qualify.tracing.record import record_trace
from crosschip.qualify.tracing.trace import PHASES, Trace, tensor_specs
from tests.qualify.conftest import TINY, trace_of

ATTENTION = "aten.scaled_dot_product_attention.default"
# Operators that only the CPU has, and composite ones that a chip never sees.
NOT_OF_A_CHIP = ("for_cpu", "mkldnn", "aten.linear.", "aten.matmul.", "aten.einsum.", "aten.reshape.", "crosschip_sim")


@pytest.fixture(params=["train", "serve"])
def role(request: pytest.FixtureRequest) -> str:
    return request.param


def test_no_operator_of_the_cpu_alone_and_no_composite_one_is_named(role, first_trace: Callable[..., Trace]) -> None:
    operators = {call.operator for call in first_trace(role).calls}
    assert ATTENTION in operators
    assert not [name for name in operators if any(part in name for part in NOT_OF_A_CHIP)]
    for name in operators - {ATTENTION}:
        kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        assert not kernel(operator_named(name).name(), "CompositeImplicitAutograd"), name


def test_every_phase_is_there_and_every_call_has_one(role, first_trace: Callable[..., Trace]) -> None:
    trace = first_trace(role)
    expected = PHASES[:3] if role == "train" else PHASES[3:]
    assert {phase for call in trace.calls for phase in call.phases} == set(expected)
    assert all(call.phases for call in trace.calls)
    assert len({call.id for call in trace.calls}) == len(trace.calls)


def test_phases_of_a_train_step_are_where_they_belong() -> None:
    trace = trace_of(TINY, "train", torch.float32)
    phases = {call.operator: call.phases for call in trace.calls}
    assert phases["aten.embedding.default"] == ["forward"]
    assert phases["aten.embedding_dense_backward.default"] == ["backward"]
    assert phases["aten._fused_adamw_.default"] == ["optimizer"]
    assert phases["aten.linalg_vector_norm.default"] == ["optimizer"]  # clipping


def test_the_trace_goes_through_json_unchanged(role, first_trace: Callable[..., Trace]) -> None:
    document = first_trace(role).document()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert Trace.from_document(document).document() == document


def test_a_newer_trace_is_refused() -> None:
    document = {**trace_of(TINY, "serve", torch.float32).document(), "schema_version": 99}
    with pytest.raises(QualifyError, match="schema version 99"):
        Trace.from_document(document)


def test_every_call_can_be_made_again(role, first_trace: Callable[..., Trace]) -> None:
    """On the simulated chip, from the recorded arguments: same outputs in number, shape, dtype and stride."""
    activate("sim")
    plant([])
    calls = {call.operator: call for call in first_trace(role).calls}  # one of each operator: the others take minutes
    for call in calls.values():
        args, kwargs = make_arguments(call.args, call.kwargs, 0, "sim:0")
        wanted = [(spec["shape"], spec["dtype"], spec["stride"]) for spec in tensor_specs(call.args + call.outputs)]
        with torch.no_grad():
            result = operator_named(call.operator)(*args, **kwargs)
        found = [(list(t.shape), str(t.dtype)[6:], list(t.stride())) for t in tensors([list(args), result])]
        if call.operator != "aten.nonzero.default":
            assert found == wanted, call.title


def tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for each in value for tensor in tensors(each)] if isinstance(value, list | tuple) else []


def test_forward_calls_that_need_gradients_are_marked(first_trace: Callable[..., Trace]) -> None:
    trace = first_trace("train")
    marked = {call.operator for call in trace.calls if call.needs_gradient}
    assert {ATTENTION, "aten.mm.default", "aten.embedding.default"} <= marked
    assert all("forward" in call.phases for call in trace.calls if call.needs_gradient)
    assert not any("out" in call.kwargs for call in trace.calls if call.needs_gradient)
    assert not any(call.needs_gradient for call in first_trace("serve").calls)


def test_equal_calls_are_counted_and_shares_add_up(first_trace: Callable[..., Trace]) -> None:
    trace = first_trace("train")
    forms = [json.dumps([call.operator, *forgetful([call.args, call.kwargs])]) for call in trace.calls]
    assert len(set(forms)) == len(forms)
    attention = [call for call in trace.calls if call.operator == ATTENTION]
    assert sum(call.count for call in attention) == 5  # four layers and one module of multi-token prediction
    assert sum(trace.share(call) for call in trace.calls) == pytest.approx(1.0)


def forgetful(value):
    """An encoded value without its statistics."""
    if isinstance(value, dict):
        return {name: forgetful(each) for name, each in value.items() if name != "values"}
    return [forgetful(each) for each in value] if isinstance(value, list) else value


def test_index_arguments_stay_within_their_tables(first_trace: Callable[..., Trace]) -> None:
    (call, *_) = [call for call in first_trace("train").calls if call.operator == "aten.embedding.default"]
    table, ids = tensor_specs(call.args)
    assert ids["values"]["low"] >= 0
    assert ids["values"]["high"] < table["shape"][0]


class _Unchanging:
    """A subject of one product, to see its statistics."""

    name = origin = "unchanging"

    def __init__(self, left: torch.Tensor, right: torch.Tensor) -> None:
        self._left, self._right = left, right
        self.phase, self.notes, self.module = "prefill", ["as given"], torch.nn.Identity()

    def workload(self, device, dtype, seed=0, small=False):
        self._left, self._right = self._left.to(device, dtype), self._right.to(device, dtype)
        return self

    def train_step(self, index: int) -> StepMeasure:
        raise NotImplementedError

    def serve_step(self) -> torch.Tensor:
        with torch.inference_mode():
            return torch.matmul(self._left, self._right.t()).cpu()


def test_a_call_is_recorded_with_strides_and_values() -> None:
    left, right = torch.randn(8, 16), torch.randn(4, 16)
    left[0, 0] = 100.0
    trace = record_trace(_Unchanging(left, right), "serve", torch.float32)
    assert [call.operator for call in trace.calls] == ["aten.t.default", "aten.mm.default"]
    product = trace.calls[1]
    first, second = tensor_specs(product.args)
    assert (first["shape"], first["stride"], first["dtype"]) == ([8, 16], [16, 1], "float32")
    assert (second["shape"], second["stride"]) == ([16, 4], [1, 16])
    assert first["values"]["max_abs"] == 100.0
    assert first["values"]["rms"] == pytest.approx(float(left.square().mean().sqrt()))
    assert (product.count, product.phases, trace.notes) == (1, ["prefill"], ["as given"])
    assert product.outputs == [{"tensor": {"shape": [8, 4], "stride": [4, 1], "dtype": "float32"}}]


def test_planted_faults_do_not_reach_the_trace() -> None:
    class Missing:
        name = "missing"

        def operator(self, op, args, kwargs, compute):
            raise NotImplementedError(str(op))

    activate("sim")
    plant([Missing()])
    assert record_trace(load_subject(TINY), "serve", torch.float32).calls
