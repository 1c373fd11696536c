"""Whether what goes to a device and back, directly or through a file, is what it was. Needs torch only."""

from __future__ import annotations

import io
from typing import Any

import torch

__all__ = ["LAYOUTS", "copy_is_exact", "random_numbers_repeat", "safetensors_are_exact", "saving_is_exact"]

LAYOUTS = ("contiguous", "transposed", "every second", "repeated", "part")


def _made(dtype: str, size: int, layout: str) -> torch.Tensor:
    """A CPU tensor of about `size` elements from any bytes, in one of the layouts."""
    generator = torch.Generator().manual_seed(size)
    made = getattr(torch, dtype)
    top = 2 if made == torch.bool else 256
    count = 2 * max(size, 1) * made.itemsize
    flat = torch.randint(0, top, (count,), dtype=torch.uint8, generator=generator).view(made)
    if layout == "transposed":
        return flat[: size // 7 * 7].view(7, -1).t()
    if layout == "every second":
        return flat[: 2 * size : 2]
    if layout == "repeated":
        return flat[:size].expand(3, size)
    return flat[1 : size + 1] if layout == "part" else flat[:size]


def _same(made: torch.Tensor, back: torch.Tensor) -> bool:
    """Whether two CPU tensors have one dtype, shape and content, byte for byte."""
    if made.dtype != back.dtype or made.shape != back.shape:
        return False
    return torch.equal(_bytes(made), _bytes(back))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def _first_difference(made: torch.Tensor, back: torch.Tensor) -> str:
    if made.dtype != back.dtype or made.shape != back.shape:
        return f"{back.dtype} {list(back.shape)}"
    differs = (_bytes(made) != _bytes(back)).nonzero()
    first = int(differs[0]) // made.dtype.itemsize if differs.numel() else 0
    return f"{differs.numel()} bytes differ, first in element {first} of {made.numel()}"


def _wait(device: str) -> None:
    kind = torch.device(device).type
    module = None if kind == "cpu" else torch.get_device_module(kind)
    if module is not None and hasattr(module, "synchronize"):
        module.synchronize()


def copy_is_exact(device: str, dtype: str, size: int, layout: str, non_blocking: bool) -> tuple[bool, str, str]:
    """A tensor to the device and back, once as it is and once copied on the device in between."""
    made = _made(dtype, size, layout)
    there = made.to(device, non_blocking=non_blocking)
    _wait(device)
    for source in (there, there.clone()):
        back = source.to("cpu", non_blocking=non_blocking)
        _wait(device)
        if not _same(made, back):
            return True, f"the same {made.numel()} elements", _first_difference(made, back)
    return False, f"the same {made.numel()} elements", "the same"


def _state(device: str, dtypes: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Tensors on the CPU and the same on the device: each dtype, one transposed, and one that is a part of another."""
    made = {dtype: _made(dtype, 101, "contiguous") for dtype in dtypes}
    made["transposed"] = _made("float32", 105, "transposed")
    made["whole"] = _made("int64", 64, "contiguous").clone()
    there = {name: tensor.to(device) for name, tensor in made.items()}
    made["part"], there["part"] = made["whole"][8:16], there["whole"][8:16]
    return made, there


def saving_is_exact(device: str, dtypes: list[str]) -> tuple[bool, str, str]:
    """Tensors saved from the device with `torch.save` and loaded on the CPU and on the device again."""
    made, there = _state(device, dtypes)
    file = io.BytesIO()
    torch.save(there, file)
    for place in ("cpu", device):
        file.seek(0)
        loaded = torch.load(file, map_location=place, weights_only=True)
        for name, tensor in made.items():
            back = loaded[name]
            if back.device.type != torch.device(place).type:
                return True, f"{name} loaded on {place}", f"it is on {back.device}"
            if not _same(tensor, back.cpu()):
                return True, f"{name} loaded on {place} as it was saved", _first_difference(tensor, back.cpu())
        loaded["part"].zero_()
        if int(loaded["whole"][8:16].cpu().abs().sum()) != 0:
            return True, "a part that shares the memory of the whole, also when loaded", f"on {place} it is apart"
    return False, "all tensors as they were saved", "all"


def safetensors_are_exact(device: str, dtypes: list[str]) -> tuple[bool, str, str]:
    """Tensors saved from the device in the safetensors format and read on the CPU."""
    from safetensors.torch import load, save

    made, there = _state(device, dtypes)
    kept = {name: tensor.contiguous() for name, tensor in there.items() if name != "part"}
    loaded = load(save(kept))
    for name in kept:
        if not _same(made[name], loaded[name]):
            return True, f"{name} as it was saved", _first_difference(made[name], loaded[name])
    return False, "all tensors as they were saved", "all"


def random_numbers_repeat(device: str) -> tuple[bool, str, str]:
    """The state of the device's random numbers taken and set again, and a seed set twice, give the same numbers."""
    module: Any = torch if torch.device(device).type == "cpu" else torch.get_device_module(device)
    torch.rand(3, device=device)
    state = module.get_rng_state()
    first = torch.rand(1000, device=device).cpu()
    module.set_rng_state(state)
    if not torch.equal(first, torch.rand(1000, device=device).cpu()):
        return True, "the same numbers after the state was set again", "others"
    draws = []
    for _ in range(2):
        torch.manual_seed(17)
        draws.append(torch.rand(1000, device=device).cpu())
    if not torch.equal(*draws):
        return True, "the same numbers after the same seed", "others"
    if torch.equal(first, draws[0]):
        return True, "other numbers after another seed", "the same"
    return False, "numbers that follow state and seed", "they do"
