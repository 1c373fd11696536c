"""Collectives of the simulated chip: gloo on the CPU twins of its tensors, with the planted faults around each.

A collective ends before its call returns; only sends and receives go on in the background, so that two ranks can send
to each other. Meeting the other ranks counts as a collective, too, called `connect`.
"""

# mypy: disable-error-code="override"
# (Torch's stubs list ways to call a process group that torch.distributed does not use.)

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import (
    AllreduceCoalescedOptions,
    AllreduceOptions,
    BarrierOptions,
    ProcessGroup,
    ReduceScatterOptions,
    Work,
)

from crosschip.chips.faults.fault import CollectiveCall, around_collective
from crosschip.chips.simulated.storage import as_cpu, is_sim

__all__ = ["SimulatedProcessGroup", "plant_collective_faults"]

_faults: list[Any] = []  # around collectives, outermost first

Compute = Callable[[list[Tensor]], list[Tensor]]


def plant_collective_faults(faults: Sequence[Any]) -> None:
    """Lay these faults around every collective from now on, the first outermost."""
    _faults[:] = faults


def _host(tensor: Tensor) -> Tensor:
    return as_cpu(tensor) if is_sim(tensor) else tensor


def _finished(result: list[Tensor]) -> Work:
    future: torch.futures.Future[list[Tensor]] = torch.futures.Future()
    future.set_result(result)
    return _create_work_from_future(future)


def _collective(call: CollectiveCall, inputs: Sequence[Tensor], outputs: Sequence[Tensor], compute: Compute) -> Work:
    """Make `outputs` of this rank's `inputs`; faults and `compute` see CPU tensors, and `compute` keeps its inputs."""
    made = around_collective(_faults, call.kind, [_host(each) for each in inputs], compute, call)
    for output, value in zip(outputs, made, strict=True):
        _host(output).copy_(value)
    return _finished(list(outputs))


def _operation_name(operation: Any) -> str:
    kind = operation.op if hasattr(operation, "op") else operation
    return str(kind).rpartition(".")[2].lower()


def _factor_of(operation: Any) -> Any:
    """The factor of PREMUL_SUM, a number or a tensor; None for any other operation."""
    if _operation_name(operation) != "premul_sum":
        return None
    factor = operation.__getstate__()[1]  # torch has no other way to it from Python
    return _host(factor) if isinstance(factor, Tensor) else factor


class _Receiving(Work):
    """A receive in the background, whose faults act when it is waited for."""

    def __init__(self, work: Work, tensors: list[Tensor], call: CollectiveCall) -> None:
        super().__init__()
        self._work = work
        self._tensors = tensors
        self._call = call
        self._is_done = False

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Wait for the tensors, then let the faults at them."""
        if not self._is_done:
            _collective(self._call, self._tensors, self._tensors, lambda tensors: self._awaited(tensors, timeout))
            self._is_done = True
        return True

    def _awaited(self, tensors: list[Tensor], timeout: timedelta) -> list[Tensor]:
        self._work.wait(timeout) if timeout else self._work.wait()
        return tensors

    def is_completed(self) -> bool:
        """Whether the tensors are there."""
        return self._is_done


class SimulatedProcessGroup(ProcessGroup):
    """The process group behind `init_process_group("sim_ccl")`. Tensors of the host are taken as well."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]  # the stubs lack this one
        self._timeout_s = timeout.total_seconds()
        self._gloo: Any = None

        def connect(inputs: list[Tensor]) -> list[Tensor]:
            self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
            return []

        _collective(self._call("connect"), [], [], connect)
        # Names, sequence numbers and what asks for a device's back end are gloo's.
        self._register_backend(torch.device("cpu"), ProcessGroup.BackendType.GLOO, self._gloo)
        self._register_backend(torch.device("sim"), ProcessGroup.BackendType.CUSTOM, self._gloo)

    def getBackendName(self) -> str:
        """Its name, for torch."""
        return "sim_ccl"

    def _start_coalescing(self, device: torch.device) -> None:
        """Collectives are done one by one."""

    def _end_coalescing(self, device: torch.device) -> Work:
        return _finished([])

    def _call(self, kind: str, operation: Any = None, peer: int | None = None) -> CollectiveCall:
        """What faults are told of a collective of this group."""
        name = None if operation is None else _operation_name(operation)
        factor = None if operation is None else _factor_of(operation)
        number = None if factor is None else float(factor)
        return CollectiveCall(kind, self.rank(), self.size(), self._timeout_s, name, number, peer)

    def _reduced(self, tensors: list[Tensor], operation: Any) -> list[Tensor]:
        """New tensors with the reduction over all ranks. Gloo has no factor, and not always had an average."""
        is_average = operation == dist.ReduceOp.AVG
        factor = _factor_of(operation)
        options = AllreduceOptions()
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.SUM) if is_average or factor is not None else operation
        made = [each.clone(memory_format=torch.contiguous_format) for each in tensors]
        for each in made:
            if factor is not None:
                each.mul_(factor)
            self._gloo.allreduce([each], options).wait()
            if is_average:
                each.div_(self.size(), rounding_mode=None if each.is_floating_point() else "trunc")
        return made

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Work:
        """Each rank's tensor becomes the reduction of all."""
        operation = (opts or AllreduceOptions()).reduceOp
        call = self._call("all_reduce", operation)
        return _collective(call, tensors, tensors, lambda inputs: self._reduced(inputs, operation))

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> Work:
        """Several reductions in one call."""
        return self.allreduce(tensors, opts or AllreduceCoalescedOptions())

    def reduce(self, tensors: list[Tensor], opts: Any) -> Work:
        """The root's tensor becomes the reduction of all."""

        def compute(inputs: list[Tensor]) -> list[Tensor]:
            made = self._reduced(inputs, opts.reduceOp)
            return made if self.rank() == opts.rootRank else []

        call = self._call("reduce", opts.reduceOp)
        return _collective(call, tensors, tensors if self.rank() == opts.rootRank else [], compute)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> Work:
        """Each rank's tensor becomes the root's."""

        def compute(inputs: list[Tensor]) -> list[Tensor]:
            made = [each.clone(memory_format=torch.contiguous_format) for each in inputs]
            self._gloo.broadcast(made, opts).wait()
            return made

        return _collective(self._call("broadcast"), tensors, tensors, compute)

    def allgather(self, output_tensors: list[list[Tensor]], input_tensors: list[Tensor], opts: Any = None) -> Work:
        """Each rank gets every rank's tensor, in a list."""
        (outputs,) = output_tensors

        def compute(inputs: list[Tensor]) -> list[Tensor]:
            made = [torch.empty(each.shape, dtype=each.dtype, device="cpu") for each in outputs]
            self._gloo.allgather([made], [each.contiguous() for each in inputs]).wait()
            return made

        return _collective(self._call("all_gather"), input_tensors, outputs, compute)

    def all_gather_single(self, output_tensor: Tensor, input_tensor: Tensor, opts: Any = None) -> Work:
        """Each rank gets every rank's tensor, in one."""

        def compute(inputs: list[Tensor]) -> list[Tensor]:
            made = torch.empty(output_tensor.shape, dtype=output_tensor.dtype, device="cpu")
            parts = list(made.view(self.size(), -1).unbind(0))
            self._gloo.allgather([parts], [inputs[0].contiguous().view(-1)]).wait()
            return [made]

        return _collective(self._call("all_gather_into_tensor"), [input_tensor], [output_tensor], compute)

    def reduce_scatter(self, output_tensors: list[Tensor], input_tensors: list[list[Tensor]], opts: Any = None) -> Work:
        """Each rank gets the reduction of the tensors that all ranks have for it."""
        operation = (opts or ReduceScatterOptions()).reduceOp
        (inputs,) = input_tensors

        def compute(inputs: list[Tensor]) -> list[Tensor]:
            return [self._reduced(inputs, operation)[self.rank()]]

        return _collective(self._call("reduce_scatter", operation), inputs, output_tensors, compute)

    def reduce_scatter_single(self, output_tensor: Tensor, input_tensor: Tensor, opts: Any = None) -> Work:
        """Each rank gets its part of the reduction of one tensor."""
        operation = (opts or ReduceScatterOptions()).reduceOp

        def compute(inputs: list[Tensor]) -> list[Tensor]:
            reduced = self._reduced(inputs, operation)[0].view(self.size(), -1)
            return [reduced[self.rank()].view(output_tensor.shape)]

        return _collective(self._call("reduce_scatter_tensor", operation), [input_tensor], [output_tensor], compute)

    def all_to_all_single(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        output_split_sizes: list[int],
        input_split_sizes: list[int],
        opts: Any = None,
    ) -> Work:
        """Each rank gets its part of every rank's tensor, in one; the splits are rows."""
        exchange = getattr(self._gloo, "all_to_all_single", None) or self._gloo.alltoall_base

        def compute(inputs: list[Tensor]) -> list[Tensor]:
            made = torch.empty(output_tensor.shape, dtype=output_tensor.dtype, device="cpu")
            exchange(made, inputs[0].contiguous(), list(output_split_sizes), list(input_split_sizes)).wait()
            return [made]

        return _collective(self._call("all_to_all_single"), [input_tensor], [output_tensor], compute)

    def alltoall(self, output_tensors: list[Tensor], input_tensors: list[Tensor], opts: Any = None) -> Work:
        """Each rank gets the tensor that every rank has for it, in a list."""
        exchange = getattr(self._gloo, "all_to_all_single", None) or self._gloo.alltoall_base
        sizes = [each.numel() for each in output_tensors]

        def compute(inputs: list[Tensor]) -> list[Tensor]:
            sent = torch.cat([each.reshape(-1) for each in inputs])
            made = torch.empty(sum(sizes), dtype=sent.dtype, device="cpu")
            exchange(made, sent, sizes, [each.numel() for each in inputs]).wait()
            return [part.view(each.shape) for part, each in zip(made.split(sizes), output_tensors, strict=True)]

        return _collective(self._call("all_to_all"), input_tensors, output_tensors, compute)

    def gather(self, output_tensors: list[list[Tensor]], input_tensors: list[Tensor], opts: Any) -> Work:
        """The root gets every rank's tensor, in a list."""
        outputs = output_tensors[0] if output_tensors else []

        def compute(inputs: list[Tensor]) -> list[Tensor]:
            made = [torch.empty(each.shape, dtype=each.dtype, device="cpu") for each in outputs]
            self._gloo.gather([made] if made else [], [each.contiguous() for each in inputs], opts).wait()
            return made

        return _collective(self._call("gather"), input_tensors, outputs, compute)

    def scatter(self, output_tensors: list[Tensor], input_tensors: list[list[Tensor]], opts: Any) -> Work:
        """Each rank gets the tensor that the root has for it."""
        (output,) = output_tensors

        def compute(inputs: list[Tensor]) -> list[Tensor]:
            made = torch.empty(output.shape, dtype=output.dtype, device="cpu")
            self._gloo.scatter([made], [[each.contiguous() for each in inputs]] if inputs else [], opts).wait()
            return [made]

        return _collective(self._call("scatter"), input_tensors[0] if input_tensors else [], output_tensors, compute)

    def send(self, tensors: list[Tensor], dst_rank: int, tag: int) -> Work:
        """Send to one rank, in the background."""
        started: list[Work] = []

        def compute(inputs: list[Tensor]) -> list[Tensor]:
            started.append(self._gloo.send([each.contiguous() for each in inputs], dst_rank, tag))
            return []

        call = self._call("send", peer=dst_rank)
        around_collective(_faults, call.kind, [_host(each) for each in tensors], compute, call)
        return started[-1] if started else _finished([])

    def recv(self, tensors: list[Tensor], src_rank: int, tag: int) -> Work:
        """Receive from one rank, in the background."""
        return self._receiving(tensors, lambda twins: self._gloo.recv(twins, src_rank, tag), src_rank)

    def recv_anysource(self, tensors: list[Tensor], tag: int) -> Work:
        """Receive from any rank, in the background."""
        return self._receiving(tensors, lambda twins: self._gloo.recv_anysource(twins, tag))

    def _receiving(
        self, tensors: list[Tensor], start: Callable[[list[Tensor]], Work], source: int | None = None
    ) -> Work:
        work = start([_host(each) for each in tensors])
        return _Receiving(work, tensors, self._call("recv", peer=source)) if _faults else work

    def barrier(self, opts: Any = None) -> Work:
        """Wait for all ranks."""

        def compute(inputs: list[Tensor]) -> list[Tensor]:
            self._gloo.barrier(BarrierOptions()).wait()
            return []

        return _collective(self._call("barrier"), [], [], compute)

    # Several of one kind in one call

    def allgather_coalesced(
        self, output_tensors: list[list[Tensor]], input_tensors: list[Tensor], opts: Any = None
    ) -> Work:
        """Several gatherings in lists."""
        for outputs, each in zip(zip(*output_tensors, strict=True), input_tensors, strict=True):
            self.allgather([list(outputs)], [each], opts)
        return _finished([])

    def all_gather_single_coalesced(
        self, output_tensors: list[Tensor], input_tensors: list[Tensor], opts: Any = None
    ) -> Work:
        """Several gatherings."""
        for output, each in zip(output_tensors, input_tensors, strict=True):
            self.all_gather_single(output, each, opts)
        return _finished(output_tensors)

    def reduce_scatter_single_coalesced(
        self, output_tensors: list[Tensor], input_tensors: list[Tensor], opts: Any = None
    ) -> Work:
        """Several reductions."""
        for output, each in zip(output_tensors, input_tensors, strict=True):
            self.reduce_scatter_single(output, each, opts)
        return _finished(output_tensors)

    # Torch before 2.13 asks by these names.
    _allgather_base = all_gather_single  # type: ignore[assignment]
    _reduce_scatter_base = reduce_scatter_single  # type: ignore[assignment]
    alltoall_base = all_to_all_single  # type: ignore[assignment]
    allgather_into_tensor_coalesced = all_gather_single_coalesced  # type: ignore[assignment]
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced  # type: ignore[assignment]
