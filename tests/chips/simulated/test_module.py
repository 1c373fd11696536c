"""`torch.sim`, `torch.accelerator`, and random numbers of the simulated chip."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from crosschip.chips.simulated import plant
from tests.chips.simulated.planted import Watching


@pytest.fixture
def module() -> Any:
    return torch.get_device_module("sim")


def test_torch_sim(module: Any) -> None:
    assert module is torch.sim  # type: ignore[attr-defined]
    assert (module.is_available(), module.device_count(), module.current_device()) == (True, 1, 0)
    module.synchronize()
    module.synchronize(torch.device("sim:0"))
    module.set_device("sim:0")
    with module.device(0), module.device("sim"), module.stream(module.Stream()):
        assert torch.ones(1, device="sim").item() == 1.0
    with pytest.raises(RuntimeError, match="sim:3 is not there"):
        module.set_device(3)
    first, second = module.Event(enable_timing=True), module.Event(enable_timing=True)
    first.record(module.current_stream())
    time.sleep(0.01)
    second.record()
    second.synchronize()
    module.current_stream().wait_event(second)
    assert second.query()
    assert first.elapsed_time(second) >= 10
    with pytest.raises(RuntimeError, match="recorded before"):
        first.elapsed_time(module.Event())
    assert module.get_device_properties(0).total_memory > 2**28
    free, total = module.mem_get_info()
    assert 0 < free <= total
    module.empty_cache()
    assert module.memory_stats()["allocated_bytes.all.current"] == module.memory_allocated()


def test_its_name_tells_the_planted_faults(module: Any) -> None:
    assert module.get_device_name(0) == "simulated chip"
    plant([Watching()])
    assert module.get_device_name(0) == "simulated chip (watching)"
    assert module.get_device_properties().name == "simulated chip (watching)"


def test_torch_accelerator() -> None:
    assert torch.accelerator.is_available()
    assert torch.accelerator.current_accelerator() == torch.device("sim")
    assert (torch.accelerator.device_count(), torch.accelerator.current_device_index()) == (1, 0)
    torch.accelerator.set_device_index(0)
    torch.accelerator.synchronize()
    torch.accelerator.memory.empty_cache()
    x = torch.ones(100, device="sim")
    assert torch.accelerator.memory_allocated() >= x.nbytes
    assert torch.accelerator.memory_stats()["num_device_alloc"] > 0
    assert torch.accelerator.current_stream() is not None


def numbers() -> list[torch.Tensor]:
    x = torch.ones(50, device="sim")
    return [
        torch.rand(5, device="sim"),
        torch.randn(5, device="sim", dtype=torch.bfloat16),
        torch.randint(0, 100, (5,), device="sim"),
        torch.randperm(9, device="sim"),
        torch.rand_like(x),
        torch.bernoulli(x * 0.5),
        x.clone().uniform_(),
        x.clone().exponential_(),
        x.multinomial(3),
        F.dropout(x, 0.5),
        F.rrelu(-x, training=True),
        torch.normal(x, x),
        F.scaled_dot_product_attention(x.view(1, 5, 10), x.view(1, 5, 10), x.view(1, 5, 10), dropout_p=0.5),
    ]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> list[bool]:
    return [torch.equal(one, other) for one, other in zip(left, right, strict=True)]


@pytest.mark.parametrize("with_faults_around", [False, True])
def test_the_same_seed_gives_the_same_numbers(with_faults_around: bool) -> None:
    plant([Watching()] if with_faults_around else [])
    torch.manual_seed(3)
    first = numbers()
    assert {each.device.type for each in first} == {"sim"}
    assert not any(same(first, numbers()))
    torch.manual_seed(3)
    assert all(same(first, numbers()))


def test_the_hosts_numbers_are_apart(module: Any) -> None:
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    numbers()
    assert torch.equal(torch.rand(4), wanted)
    module.manual_seed(5)
    first = torch.rand(4, device="sim")
    torch.rand(4)
    module.manual_seed(5)
    assert torch.equal(torch.rand(4, device="sim"), first)
    assert module.initial_seed() == 5


def test_states_are_kept_and_forked(module: Any) -> None:
    state = module.get_rng_state()
    first = numbers()
    module.set_rng_state(state)
    assert all(same(first, numbers()))
    module.set_rng_state(state)
    with torch.random.fork_rng(device_type="sim"):
        numbers()
    assert all(same(first, numbers()))


def test_a_generator_of_the_host_is_taken() -> None:
    def draw() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        return [
            torch.rand(4, device="sim", generator=generator),
            torch.ones(4, device="sim").multinomial(2, generator=generator),
            torch.empty(4, device="sim").normal_(generator=generator),
        ]

    first = draw()
    numbers()
    assert all(same(first, draw()))
    assert torch.equal(first[0].cpu(), torch.rand(4, generator=torch.Generator().manual_seed(1)))


def test_checkpointed_dropout_draws_the_same_numbers_again() -> None:
    x = torch.ones(64, device="sim", requires_grad=True)
    out = checkpoint(lambda value: F.dropout(value * 1, 0.5), x, use_reentrant=False)
    out.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, out.detach())
