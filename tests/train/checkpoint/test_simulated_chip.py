"""Tensors that lie on a device: the simulated chip, which is a real device to torch."""

import pytest
import torch
from checkpoint_parts import STAGE, new_model, state_of, train

from crosschip.chips.simulated import activate
from crosschip.model import load_model
from crosschip.train.checkpoint import Checkpointer, load_optimizer
from crosschip.train.checkpoint.checksum import checksums
from crosschip.train.optimizer import build_optimizer


@pytest.fixture(scope="module")
def device() -> torch.device:
    activate("sim")
    return torch.device("sim")


def test_the_device_has_the_same_sums_as_the_host(device) -> None:
    tensors = [torch.randn(shape) for shape in ((), (5,), (3000,), (70, 90))]
    assert checksums([tensor.to(device) for tensor in tensors]) == checksums(tensors)


def test_saved_from_a_device_read_back_and_gone_on_with(device, tmp_path) -> None:
    model = new_model().to(device)
    optimizer = build_optimizer(model, STAGE)
    train(model, optimizer, 1)
    settings = STAGE.model_copy(update={"verify_checkpoints": "tensors"})
    with Checkpointer(tmp_path, model, optimizer, settings) as saver:
        saver.save(state_of(1, device=str(device)))
        path = saver.wait()
        assert [event.event for event in saver.events()] == ["checkpoint-verified"]
    assert path is not None
    again = load_model(path, device=device)
    its_optimizer = build_optimizer(again, STAGE)
    load_optimizer(path, again, its_optimizer)
    assert train(again, its_optimizer, 2) == train(model, optimizer, 2)
