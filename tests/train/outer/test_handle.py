from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from crosschip.train.outer.errors import GroupsError
from crosschip.train.outer.handle import SidecarHandle, read_donation, write_donation
from crosschip.train.outer.memory import Layout, SharedMemory, open_descriptor
from crosschip.train.outer.messages import Config, Member, Rules
from crosschip.train.outer.network import interface_of, own_address_towards
from crosschip.train.outer.time_limits import TimeLimits, limits_for
from crosschip.train.outer.training_state import TrainingState


@dataclass
class Position:
    step: int = 0
    sequences: int = 0
    tokens: int = 0


class Model(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(5, 3)
        self.register_buffer("bias", torch.rand(3))
        self.register_buffer("table", torch.rand(1000), persistent=False)


def trained(seed: int, steps: int) -> TrainingState:
    model = Model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model.linear(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()
    return TrainingState(model, optimizer, Position(steps, 10 * steps, 100 * steps))


def new_memory(num_bytes: int) -> SharedMemory:
    layout = Layout(18, num_bytes, has_outer_state=False)
    descriptor = open_descriptor(layout)
    memory = SharedMemory(descriptor, layout)
    os.close(descriptor)
    return memory


@pytest.mark.parametrize("steps_of_the_healed", [0, 2])
def test_a_state_is_handed_over_bit_for_bit(steps_of_the_healed: int) -> None:
    donor, healed = trained(0, 3), trained(1, steps_of_the_healed)
    memory = new_memory(donor.num_bytes)
    donation = write_donation(memory, *donor.donate())
    healed.load(read_donation(memory, donation), donation.position)
    memory.forget_state()  # what was taken over must not lie there any more
    mine, theirs = healed.tensors(), donor.tensors()
    assert mine.keys() == theirs.keys()
    assert "model/table" not in mine, "what can be made again is not sent"
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert healed.position == donor.position
    for state in (donor, healed):
        torch.manual_seed(5)
        state._optimizer.zero_grad()
        state._model.linear(torch.randn(4, 5)).square().sum().backward()
        state._optimizer.step()
    assert all(torch.equal(healed.tensors()[name], donor.tensors()[name]) for name in mine)


def test_a_model_that_was_not_trained_yet_takes_the_optimizer_state_away() -> None:
    donor, healed = trained(0, 0), trained(1, 2)
    memory = new_memory(healed.num_bytes)
    donation = write_donation(memory, *donor.donate())
    healed.load(read_donation(memory, donation), donation.position)
    assert healed.tensors().keys() == donor.tensors().keys()


def test_another_model_is_refused() -> None:
    donor, healed = trained(0, 1), trained(1, 1)
    tensors, position = donor.donate()
    tensors["model/another"] = torch.zeros(1)
    with pytest.raises(GroupsError, match="model/another"):
        healed.load(tensors, position)


def test_without_torchft_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = Config(Member(0, 2, 1, "http://127.0.0.1:1"), Rules("none"), Layout(1, 1, False), TimeLimits())
    with pytest.raises(GroupsError, match="pip install"):
        SidecarHandle(config, lambda: ({}, {}), tmp_path / "log")


@pytest.mark.parametrize(
    "address", ["127.0.0.1:29510", "http://127.0.0.1", "https://127.0.0.1:1", "http://no.such.host.invalid:1"]
)
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(GroupsError, match=r"groups\.lighthouse"):
        own_address_towards(address)


def test_the_own_address_is_that_of_the_way_there() -> None:
    assert own_address_towards("http://127.0.0.1:29510") == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.77") is None


def test_limits_grow_with_what_a_link_has_to_carry() -> None:
    assert limits_for(1e6, 1e9, 0.001).exchange_s == 30.0
    assert limits_for(1e9, 1e6, 0.1).exchange_s == pytest.approx(5 * 1000.1)
    assert limits_for(1e9, None, 0.0).exchange_s == 300.0
