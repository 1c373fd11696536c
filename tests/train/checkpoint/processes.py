"""Scenarios of several processes, real ones over gloo. `python processes.py DIRECTORY`

This process imports torch once and forks the others, which saves each of them the seconds of an import.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoint_parts import STAGE, names, new_model, state_of, trained
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import crosschip.train.checkpoint.writing  # noqa: F401  (here, so that no forked process has to import it)
from crosschip.checkpoints import checkpoint_path
from crosschip.errors import CheckpointError
from crosschip.model import Transformer, load_model
from crosschip.model.experts import RoutedExperts
from crosschip.model.weights import own_tensors
from crosschip.train.checkpoint import (
    Checkpointer,
    background_group,
    find_newest,
    load_optimizer,
    load_weights,
    read_state,
)
from crosschip.train.checkpoint.readback import compare_tensors
from crosschip.train.optimizer import build_optimizer, optimizer_tensors

Tensors = dict[str, torch.Tensor]
TENSORS = STAGE.model_copy(update={"verify_checkpoints": "tensors"})
NUM_KILLS = 12
_fork = multiprocessing.get_context("fork")


def in_processes(count: int, work: Callable[[Path], None], directory: Path) -> None:
    """Run `work(directory)` in `count` processes that form a gloo group; each must end well."""
    store = directory / f"store-{time.monotonic_ns()}"

    def one(rank: int) -> None:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
        work(directory)
        dist.destroy_process_group()

    processes = [_fork.Process(target=one, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * count


def sharded() -> tuple[Transformer, torch.optim.Optimizer]:
    model = new_model(seed=dist.get_rank() + 100)  # other weights in each process, all to be replaced
    for layer in (*model.layers, *model.mtp):
        fully_shard(layer)
    fully_shard(model)
    return model, build_optimizer(model, STAGE)


def step_with_made_gradients(model: Transformer, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """An optimizer step, the same in every layout over processes."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(seed + len(name))
        gradient = torch.randn(parameter.shape, generator=generator)
        if isinstance(parameter, DTensor):
            gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
        parameter.grad = gradient
    optimizer.step()


def whole(model: Transformer, optimizer: torch.optim.Optimizer) -> Tensors:
    """Everything that must come back, gathered from all processes."""
    found = own_tensors(model) | optimizer_tensors(model, optimizer)
    return {name: t.full_tensor() if isinstance(t, DTensor) else t.clone() for name, t in found.items()}


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def save_sharded(directory: Path, step: int, model: Transformer, optimizer: torch.optim.Optimizer) -> None:
    with Checkpointer(directory, model, optimizer, TENSORS, background_group()) as saver:
        saver.save(state_of(step, num_processes=dist.get_world_size()))
        before = whole(model, optimizer)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)  # training goes on while the files are written
        path = saver.wait()
        assert path == checkpoint_path(directory, step)
        assert (path / "COMPLETE").exists(), "every process sees it whole as soon as it is told so"
        if dist.get_rank() == 0:
            assert [event.event for event in saver.events()] == ["checkpoint-verified"]
            torch.save(before, directory / f"expected-{step}.pt")
    dist.barrier()


def two_save(directory: Path) -> None:
    model, optimizer = sharded()
    for seed in (1, 2):
        step_with_made_gradients(model, optimizer, seed)
    with torch.no_grad():
        for router in model.routers():
            router.e_score_correction_bias += torch.arange(6.0)
    save_sharded(directory, 2, model, optimizer)


def four_go_on(directory: Path) -> None:
    path = checkpoint_path(directory, 2)
    model, optimizer = sharded()
    load_weights(path, model)
    load_optimizer(path, model, optimizer)
    assert_same(whole(model, optimizer), torch.load(directory / "expected-2.pt"))
    assert all(isinstance(p, DTensor) for p in model.parameters())
    step_with_made_gradients(model, optimizer, 3)
    save_sharded(directory, 3, model, optimizer)


def reshard(directory: Path) -> None:
    """Two processes save, four go on and save, one goes on from each: the same bits everywhere."""
    in_processes(2, two_save, directory)
    in_processes(4, four_go_on, directory)
    ended = {}
    for step in (2, 3):
        path = checkpoint_path(directory, step)
        assert compare_tensors(path) is None
        assert len(list((path / "dcp").glob("*.distcp"))) == {2: 2, 3: 4}[step]
        assert read_state(path).num_processes == {2: 2, 3: 4}[step]
        model = load_model(path)
        optimizer = build_optimizer(model, STAGE)
        load_optimizer(path, model, optimizer)
        assert_same(whole(model, optimizer), torch.load(directory / f"expected-{step}.pt"))
        for seed in range(step + 1, 6):
            step_with_made_gradients(model, optimizer, seed)
        ended[step] = whole(model, optimizer)
    # Another layout rounds AdamW's update otherwise (vector kernels do the rest of a shard differently): by units of
    # the last place of what is added up.
    for name, tensor in ended[2].items():
        torch.testing.assert_close(ended[3][name], tensor, rtol=2**-20, atol=2**-20 * float(tensor.abs().max()))


def in_a_grid(experts: int, seed: int) -> tuple[Transformer, torch.optim.Optimizer]:
    """All processes share every parameter, but the experts are dealt out over `experts` of them first."""
    model = new_model(seed)
    ranks = init_device_mesh("cpu", (dist.get_world_size(),))
    grid = init_device_mesh("cpu", (dist.get_world_size() // experts, experts), mesh_dim_names=("sharers", "experts"))
    for layer in (*model.layers, *model.mtp):
        for module in layer.modules():
            if isinstance(module, RoutedExperts):
                for name, parameter in list(module.named_parameters()):
                    dealt = distribute_tensor(parameter.detach(), grid["experts"], [Shard(0)], src_data_rank=None)
                    setattr(module, name, torch.nn.Parameter(dealt))
                fully_shard(module, mesh=grid["sharers"], shard_placement_fn=lambda parameter: Shard(1))
        fully_shard(layer, mesh=ranks)
    fully_shard(model, mesh=ranks)
    return model, build_optimizer(model, STAGE)


def four_with_experts_in_twos(directory: Path) -> None:
    model, optimizer = in_a_grid(experts=2, seed=0)
    for parameter in model.parameters():  # gradients that need no layout of their own
        parameter.grad = torch.full_like(parameter, 0.1) * parameter
    optimizer.step()
    save_sharded(directory, 1, model, optimizer)


def two_with_experts_in_twos(directory: Path) -> None:
    path = checkpoint_path(directory, 1)
    model, optimizer = in_a_grid(experts=2, seed=1)
    load_weights(path, model)
    load_optimizer(path, model, optimizer)
    assert_same(whole(model, optimizer), torch.load(directory / "expected-1.pt"))


def experts_in_parallel(directory: Path) -> None:
    """Experts dealt out over two of four processes, read by two in another grid and by one."""
    in_processes(4, four_with_experts_in_twos, directory)
    in_processes(2, two_with_experts_in_twos, directory)
    path = checkpoint_path(directory, 1)
    assert compare_tensors(path) is None
    model = load_model(path)
    optimizer = build_optimizer(model, STAGE)
    load_optimizer(path, model, optimizer)
    assert_same(whole(model, optimizer), torch.load(directory / "expected-1.pt"))


def one_cannot_write(directory: Path) -> None:
    """The disk of the second of two processes is full: no process believes in the checkpoint."""
    model, optimizer = sharded()
    step_with_made_gradients(model, optimizer, 1)
    with Checkpointer(directory, model, optimizer, TENSORS, background_group()) as saver:
        saver.save(state_of(1))
        saver.wait()
        saver.events()
        if dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        saver.save(state_of(2))
        with pytest.raises(CheckpointError, match=r"process 1: .*File too large"):
            saver.wait()
        events = [event.event for event in saver.events()]
        assert events == ([] if dist.get_rank() else ["checkpoint-failed"])
        dist.barrier()
        assert names(directory) == ["step-00000001"]
        if dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        saver.save(state_of(3))
        assert saver.wait() == checkpoint_path(directory, 3)


def full_disk(directory: Path) -> None:
    in_processes(2, one_cannot_write, directory)


def replicas_differ_at_the_save(directory: Path) -> None:
    model, optimizer = sharded()
    step_with_made_gradients(model, optimizer, 1)
    if dist.get_rank() == 1:
        model.routers()[0].e_score_correction_bias[0] += 1
    with Checkpointer(directory, model, optimizer, TENSORS, background_group()) as saver:
        saver.save(state_of(1))
        saver.wait()
        if dist.get_rank() == 0:
            (event,) = saver.events()
            assert event.event == "checkpoint-wrong", event
            assert "e_score_correction_bias" in event.detail, event


def replicas(directory: Path) -> None:
    """A tensor that every process holds, and that is another one in one of them, is named."""
    in_processes(2, replicas_differ_at_the_save, directory)


def save_for_ever(directory: Path, first_step: int) -> None:
    model, optimizer = trained(1)
    settings = STAGE.model_copy(update={"verify_checkpoints": "off"})
    with Checkpointer(directory, model, optimizer, settings) as saver:
        for step in range(first_step, 10**6):
            with torch.no_grad():
                for tensor in (*model.parameters(), *optimizer_tensors(model, optimizer).values()):
                    tensor.fill_(step)
            saver.save(state_of(step))


def kills(directory: Path) -> None:
    """Saves that are killed at random moments: what is there is whole and of one step, and nothing else is left."""
    moments = random.Random(5)
    first_step, steps_seen, half_written = 1, set(), 0
    for _ in range(NUM_KILLS):
        process = _fork.Process(target=save_for_ever, args=(directory, first_step))
        process.start()
        deadline = time.monotonic() + 60
        while not any(int(name[5:]) >= first_step for name in names_of_steps(directory)):
            assert time.monotonic() < deadline, "no checkpoint came"
            time.sleep(0.005)
        time.sleep(moments.uniform(0.0, 0.15))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        half_written += any(name.startswith(".") for name in names(directory))
        newest = find_newest(directory, warn=_no_damage)
        assert newest is not None
        step = read_state(newest).step
        assert compare_to_step(newest, step) == []
        steps_seen.add(step)
        first_step = step + 1
    assert len(steps_seen) == NUM_KILLS
    assert half_written > 0, "no kill fell into a save, so this has shown nothing"
    model, optimizer = trained(1)
    with Checkpointer(directory, model, optimizer, STAGE) as saver:
        told = [event.event for event in saver.events()]
    assert set(told) <= {"unfinished-checkpoint"}
    assert all(name.startswith("step-") for name in names(directory))


def names_of_steps(directory: Path) -> list[str]:
    checkpoints = directory / "checkpoints"
    return [path.name for path in checkpoints.glob("step-*")] if checkpoints.is_dir() else []


def _no_damage(told: str) -> None:
    raise AssertionError(told)


def compare_to_step(path: Path, step: int) -> list[str]:
    """Tensors that are not full of the step's number. The files were written by a process that no longer exists."""
    model = load_model(path)
    optimizer = build_optimizer(model, STAGE)
    load_optimizer(path, model, optimizer)
    tensors = {name: p.detach() for name, p in model.named_parameters()} | optimizer_tensors(model, optimizer)
    return [name for name, tensor in tensors.items() if not bool((tensor == step).all())]


SCENARIOS = {
    "two save, four go on, one reads both": reshard,
    "experts in parallel and back": experts_in_parallel,
    "a disk full for one is an error in all": full_disk,
    "replicas that differ are named": replicas,
    "saves killed at random moments": kills,
}


def main() -> None:
    """Run every scenario and print how each has ended, as JSON."""
    torch.set_num_threads(1)
    trained(1)  # torch imports its compiler with the first step: once here, and not in every forked process
    told = {}
    for number, (name, scenario) in enumerate(SCENARIOS.items()):
        directory = Path(sys.argv[1]) / str(number)
        directory.mkdir()
        try:
            scenario(directory)
            told[name] = ""
        except Exception:
            told[name] = traceback.format_exc()
    print(json.dumps(told))


if __name__ == "__main__":
    main()
