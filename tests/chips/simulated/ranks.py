"""One rank of several processes: `python -m tests.chips.simulated.ranks CASE RANK WORLD STORE`. Not a test itself."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from crosschip.chips.simulated import activate, plant


def expect(tensor: Tensor, wanted: Any) -> None:
    assert tensor.device.type == "sim", tensor.device
    assert torch.equal(tensor.cpu(), torch.as_tensor(wanted, dtype=tensor.dtype)), (tensor, wanted)


def full(value: float, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape or (2,), float(value), dtype=dtype, device="sim")


def reductions(rank: int, world: int) -> None:
    total = sum(range(world))
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64):
        x = full(rank, 3, dtype=dtype)
        dist.all_reduce(x)
        expect(x, [total] * 3)
    for operation, wanted in ((dist.ReduceOp.AVG, total / world), (dist.ReduceOp.MAX, world - 1)):
        x = full(rank)
        dist.all_reduce(x, operation)
        expect(x, [wanted] * 2)
    strided = full(rank, 4, 2)
    dist.all_reduce(strided[:, 0])
    expect(strided, [[total, rank]] * 4)
    work = dist.all_reduce(full(1), async_op=True)
    assert work.wait()
    assert work.is_completed()
    x = full(rank + 1)
    dist.reduce(x, 0)
    expect(x, [total + world if rank == 0 else rank + 1] * 2)
    part = full(0)
    dist.reduce_scatter_tensor(part, torch.arange(2.0 * world, device="sim"))
    expect(part, [2 * rank * world, (2 * rank + 1) * world])
    dist.reduce_scatter(part, [full(each) for each in range(world)])
    expect(part, [rank * world] * 2)


def exchanges(rank: int, world: int) -> None:
    parts = [full(0) for _ in range(world)]
    dist.all_gather(parts, full(rank))
    expect(torch.cat(parts), [each for each in range(world) for _ in range(2)])
    whole = full(0, 2 * world)
    dist.all_gather_into_tensor(whole, full(rank))
    expect(whole, [each for each in range(world) for _ in range(2)])
    whole = full(0, world)
    dist.all_to_all_single(whole, torch.arange(float(world), device="sim") + 10 * rank)
    expect(whole, [10 * each + rank for each in range(world)])
    dist.all_to_all(parts, [full(10 * rank + each) for each in range(world)])
    expect(torch.cat(parts), [10 * each + rank for each in range(world) for _ in range(2)])
    splits = [each + 1 for each in range(world)]  # rows for rank 0, 1, ...
    received = full(0, world * (rank + 1))
    dist.all_to_all_single(received, full(rank, sum(splits)), [rank + 1] * world, splits)
    expect(received, [each for each in range(world) for _ in range(rank + 1)])
    x = full(rank)
    dist.broadcast(x, 1)
    expect(x, [1, 1])
    gathered = [full(0) for _ in range(world)] if rank == 0 else None
    dist.gather(full(rank), gathered)
    if gathered is not None:
        expect(torch.cat(gathered), [each for each in range(world) for _ in range(2)])
    dist.scatter(x, [full(5 + each) for each in range(world)] if rank == 0 else None)
    expect(x, [5 + rank] * 2)
    neighbour = full(0)
    sending = dist.P2POp(dist.isend, full(rank), (rank + 1) % world)
    receiving = dist.P2POp(dist.irecv, neighbour, (rank - 1) % world)
    for work in dist.batch_isend_irecv([sending, receiving]):
        work.wait()
    expect(neighbour, [(rank - 1) % world] * 2)
    dist.barrier()
    objects: list[Any] = [None] * world
    dist.all_gather_object(objects, {"rank": rank})
    assert objects == [{"rank": each} for each in range(world)]
    on_host = torch.ones(2)
    dist.all_reduce(on_host)
    assert on_host.tolist() == [world, world]


class Noting:
    """Notes each collective, and adds one to what it gives."""

    name = "noting"

    def __init__(self) -> None:
        self.kinds: list[str] = []

    def collective(self, kind: str, tensors: list[Tensor], compute: Callable[[list[Tensor]], Any]) -> Any:
        self.kinds.append(kind)
        assert all(each.device.type == "cpu" for each in tensors)
        return [each + 1 for each in compute(tensors)]


def faults(rank: int, world: int) -> None:
    noting = Noting()
    plant([noting])
    x = full(0)
    dist.all_reduce(x)
    expect(x, [1, 1])
    whole = full(0, world)
    dist.all_gather_into_tensor(whole, full(rank, 1))
    expect(whole, [each + 1 for each in range(world)])
    if rank == 0:
        dist.send(full(7), 1)
    if rank == 1:
        dist.recv(x, 0)
        expect(x, [8, 8])
    dist.barrier()
    between = {0: ["send"], 1: ["recv"]}.get(rank, [])
    assert noting.kinds == ["all_reduce", "all_gather_into_tensor", *between, "barrier"], noting.kinds
    plant([])
    dist.all_reduce(x.zero_())
    expect(x, [0, 0])


def training(rank: int, world: int) -> None:
    """FSDP2 and DDP against one process on the CPU with the whole batch."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    def build() -> torch.nn.Sequential:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))

    values = torch.randn(4 * world, 8, generator=torch.Generator().manual_seed(1))
    own = values[4 * rank : 4 * rank + 4].to("sim")
    alone, sharded = build(), build().to("sim")
    mesh = init_device_mesh("sim", (world,))
    for layer in (sharded[0], sharded[2], sharded):
        fully_shard(layer, mesh=mesh)
    replicated = DistributedDataParallel(build().to("sim"))
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-2) for each in (alone, sharded, replicated)]
    for _ in range(3):
        for module, batch in ((alone, values), (sharded, own), (replicated, own)):
            module(batch).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for one, other, copy in zip(alone.parameters(), sharded.parameters(), replicated.parameters(), strict=True):
        torch.testing.assert_close(other.full_tensor().cpu(), one)  # type: ignore[attr-defined]
        torch.testing.assert_close(copy.cpu(), one)


CASES = {"reductions": reductions, "exchanges": exchanges, "faults": faults, "training": training}


def main() -> None:
    name, rank, world, store = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    activate("sim")
    named = {} if name == "exchanges" else {"backend": "sim_ccl"}  # it is the device's default
    dist.init_process_group(init_method=f"file://{store}", rank=rank, world_size=world, **named)
    CASES[name](rank, world)
    dist.destroy_process_group()
    print("done")


if __name__ == "__main__":
    main()
