"""Tensors of the simulated chip behave as on any device: views, storages, copies, files, memory figures."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from crosschip.chips.simulated import plant
from tests.chips.simulated.planted import Watching

SIM = "sim:0"


def test_a_tensor_is_a_plain_tensor_on_the_device() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device="sim")
    assert type(x) is torch.Tensor
    assert (str(x.device), x.dtype, x.shape) == (SIM, torch.float32, (2, 2))
    assert x.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert repr(x) == "tensor([[1., 2.],\n        [3., 4.]], device='sim:0')"
    assert x[1, 0].item() == 3.0
    assert bool(x.bool().all())


def test_numpy_is_refused_as_on_any_device() -> None:
    with pytest.raises(TypeError, match="can't convert sim:0 device type tensor to numpy"):
        torch.ones(2, device="sim").numpy()


@pytest.mark.parametrize("with_faults_around", [False, True])
def test_views_share_memory_and_versions(with_faults_around: bool) -> None:
    plant([Watching()] if with_faults_around else [])
    x = torch.arange(12.0, device="sim").view(3, 4)
    for view in (x[1:], x.t(), x[:, ::2], x.unsqueeze(0), x.flatten(), x.diagonal(), x.view(torch.int32)):
        assert view._is_view() or view.dtype != x.dtype
        assert view.untyped_storage() is x.untyped_storage()
        before = x._version
        view.zero_()
        assert x._version == before + 1
    assert not x.any()


def test_autograd_watches_writes_into_views() -> None:
    x = torch.ones(4, device="sim", requires_grad=True)
    y = x * 1
    y[:2].mul_(3)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [3.0, 3.0, 1.0, 1.0]
    z = x.exp()
    z.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_inference_mode_makes_inference_tensors() -> None:
    with torch.inference_mode():
        x = torch.ones(3, device="sim") * 2
        x[:2].add_(1)
    assert x.is_inference()
    assert x.tolist() == [3.0, 3.0, 2.0]
    assert (x + 1).tolist() == [4.0, 4.0, 3.0]


def test_tensors_of_both_sides_do_not_mix() -> None:
    x = torch.ones(2, 2, device="sim")
    assert (x + torch.tensor(1.0)).tolist() == [[2.0, 2.0], [2.0, 2.0]]  # a single number may lie on the host
    assert str(x[torch.tensor([0])].device) == SIM  # and so may indices
    host = torch.ones(2, 2)
    for call in (lambda: x + host, lambda: x @ host, lambda: torch.cat([x, host])):
        with pytest.raises(RuntimeError, match="all tensors to be on the same device, but found at least two devices"):
            call()


def test_there_is_one_chip_a_process() -> None:
    with pytest.raises(RuntimeError, match="invalid device ordinal: sim:1"):
        torch.ones(2, device="sim:1")
    with pytest.raises(RuntimeError, match="invalid device ordinal: sim:1"):
        torch.zeros_like(torch.ones(2), device="sim:1")


def test_default_device() -> None:
    torch.set_default_device("sim")
    try:
        assert str(torch.ones(3).device) == SIM
        linear = torch.nn.Linear(3, 2)
        assert str(linear.weight.device) == SIM
        linear(torch.rand(4, 3)).sum().backward()
    finally:
        torch.set_default_device(None)


def test_sparse_tensors_are_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"has no torch\.sparse_coo tensors"):
        torch.eye(3, device="sim").to_sparse()


def test_resizing_and_setting() -> None:
    x = torch.arange(4.0, device="sim")
    view = x[:2]
    x.resize_(8)
    assert x.shape == (8,)
    assert x[:4].tolist() == [0.0, 1.0, 2.0, 3.0]
    x[0] = 7.0
    assert view.tolist() == [7.0, 1.0]
    x.set_(torch.ones(2, 2, device="sim"))
    assert x.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    x.set_(x.untyped_storage(), 1, (2,), (2,))
    assert x.shape == (2,)
    x.data = torch.zeros(3, dtype=torch.bfloat16, device="sim")
    assert (x.dtype, x.tolist()) == (torch.bfloat16, [0.0, 0.0, 0.0])
    x.transpose_(0, 0).unsqueeze_(1)
    assert x.shape == (3, 1)


def test_out_of_another_shape_is_resized() -> None:
    out = torch.empty(0, device="sim")
    torch.mm(torch.ones(2, 3, device="sim"), torch.ones(3, 4, device="sim"), out=out)
    assert out.tolist() == [[3.0] * 4] * 2


def test_storages_can_be_resized() -> None:
    x = torch.arange(4.0, device="sim")
    storage = x.untyped_storage()
    before = torch.sim.memory_allocated()  # type: ignore[attr-defined]
    storage.resize_(0)
    if hasattr(storage, "_swap_data_ptr_"):  # torch before 2.13 keeps the bytes
        assert (storage.nbytes(), storage.data_ptr()) == (0, 0)
        assert torch.sim.memory_allocated() == before - 16  # type: ignore[attr-defined]
    storage.resize_(16)
    x.copy_(torch.arange(4.0))
    assert x.sum().item() == 6.0


def test_copies_to_and_from_the_host() -> None:
    values = torch.randn(3, 4).t()
    for made in (
        values.to("sim"),
        values.to("sim", non_blocking=True),
        values.sim(),  # type: ignore[attr-defined]
        torch.empty(4, 3, device="sim").copy_(values),
        torch.empty(4, 3, device="sim").copy_(values, non_blocking=True),
    ):
        assert str(made.device) == SIM
        for back in (made.cpu(), made.to("cpu", non_blocking=True), torch.empty(4, 3).copy_(made)):
            assert back.device.type == "cpu"
            assert torch.equal(back, values)
    assert values.to("sim").stride() == values.stride()
    assert torch.empty(2, 3, device="sim").copy_(torch.ones(3)).sum().item() == 6.0
    conjugated = torch.complex(torch.ones(2), torch.ones(2)).to("sim").conj()
    assert torch.equal(conjugated.cpu(), torch.complex(torch.ones(2), -torch.ones(2)))


def test_a_loader_with_pinned_memory() -> None:
    (batch,) = DataLoader([torch.ones(2)], pin_memory=True)
    assert batch.to("sim", non_blocking=True).tolist() == [[1.0, 1.0]]


def test_deep_copies_and_pickles_are_apart() -> None:
    x = torch.arange(3.0, device="sim")
    pair = {"x": x, "view": x[1:], "parameter": torch.nn.Parameter(x.clone())}
    for made, view_follows in ((copy.deepcopy(pair), True), (pickle.loads(pickle.dumps(pair)), False)):
        made["x"].add_(1)  # a pickle keeps no storage together, on the host either
        assert made["view"].tolist() == ([2.0, 3.0] if view_follows else [1.0, 2.0])
        assert str(made["view"].device) == SIM
        assert isinstance(made["parameter"], torch.nn.Parameter)
        assert x.tolist() == [0.0, 1.0, 2.0]
    assert str(x.untyped_storage().clone().device) == SIM


def make_module() -> torch.nn.Module:
    module = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    module[1].weight.requires_grad_(False)
    return module


def test_modules_move_both_ways() -> None:
    module = make_module()
    wanted = {name: value.clone() for name, value in module.state_dict().items()}
    module.to("sim")
    assert {str(value.device) for value in module.state_dict().values()} == {SIM}
    assert all(isinstance(each, torch.nn.Parameter) for each in module.parameters())
    module.to(torch.bfloat16).to(torch.float32).cpu()
    assert {value.device.type for value in module.state_dict().values()} == {"cpu"}
    module.load_state_dict({name: value.to("sim") for name, value in wanted.items()})
    assert all(torch.equal(value, wanted[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("saved_on", "map_location", "loaded_on"),
    [
        ("sim", None, "sim:0"),
        ("sim", "cpu", "cpu"),
        ("sim", "sim", "sim:0"),
        ("cpu", "sim", "sim:0"),
        ("cpu", None, "cpu"),
    ],
)
def test_files(tmp_path: Path, saved_on: str, map_location: Any, loaded_on: str) -> None:
    x = torch.arange(6.0).view(2, 3).to(saved_on)
    torch.save({"x": x, "view": x[1]}, tmp_path / "x.pt")
    made = torch.load(tmp_path / "x.pt", map_location=map_location, weights_only=True)
    assert str(made["x"].device) == loaded_on
    assert torch.equal(made["x"].cpu(), x.cpu())
    made["x"].add_(1)
    assert made["view"].tolist() == [4.0, 5.0, 6.0]  # one storage, as it was saved


def test_files_for_a_chip_that_is_not_there() -> None:
    file = io.BytesIO()
    torch.save(torch.ones(2), file)
    file.seek(0)
    with pytest.raises(RuntimeError, match="cannot load onto sim:1"):
        torch.load(file, map_location="sim:1")


def test_memory_is_counted_and_given_back() -> None:
    def allocated() -> int:
        gc.collect()
        return int(torch.sim.memory_allocated())  # type: ignore[attr-defined]

    before = allocated()
    x = torch.ones(1000, device="sim")
    assert allocated() == before + 4000
    view = x[1:]
    assert allocated() == before + 4000
    y = x + 1
    assert allocated() == before + 8000
    torch.accelerator.reset_peak_memory_stats()
    assert torch.accelerator.max_memory_allocated() == before + 8000
    del x, y
    assert allocated() == before + 4000
    assert torch.accelerator.max_memory_allocated() == before + 8000
    del view
    assert allocated() == before
    for _ in range(50):
        module = torch.nn.Linear(8, 8).to("sim")
        module(torch.ones(2, 8, device="sim")).sum().backward()
        del module
    assert allocated() == before
