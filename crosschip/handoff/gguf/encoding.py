"""Numbers as GGUF keeps them: F32, F16, BF16 and Q8_0 (32 numbers of 8 bits and one scale in fp16).

The arithmetic of Q8_0 is the gguf package's own. Importing gives fp32 from Q8_0, and each other form as it is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

from crosschip.errors import HandoffError

__all__ = ["BLOCK", "decoded", "encoded", "num_bytes", "stored_type"]

BLOCK = 32  # numbers of one row that share a scale in Q8_0
_BLOCK_BYTES = BLOCK + 2
_LARGEST_SCALE = 65504.0  # of fp16
_ITEM_BYTES = {GGMLQuantizationType.F32: 4, GGMLQuantizationType.F16: 2, GGMLQuantizationType.BF16: 2}
# llama.cpp reads these as fp32 whatever the file's type is: norms, biases, and the router, whose scores decide.
_ALWAYS_F32 = ("_norm.weight", ".bias", "ffn_gate_inp.weight")


def stored_type(name: str, shape: tuple[int, ...], dtype: str) -> GGMLQuantizationType:
    """How a tensor is kept in a file of `dtype` (float32, bfloat16 or q8_0).

    A matrix whose rows are no multiple of 32 cannot be Q8_0 and stays in fp32.
    """
    if dtype == "float32" or len(shape) < 2 or name.endswith(_ALWAYS_F32):
        return GGMLQuantizationType.F32
    if dtype == "bfloat16":
        return GGMLQuantizationType.BF16
    assert dtype == "q8_0", dtype
    return GGMLQuantizationType.Q8_0 if shape[-1] % BLOCK == 0 else GGMLQuantizationType.F32


def num_bytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    """The size of a tensor's data."""
    count = int(np.prod(shape, dtype=np.int64))
    return count // BLOCK * _BLOCK_BYTES if kind == GGMLQuantizationType.Q8_0 else count * _ITEM_BYTES[kind]


def encoded(name: str, tensor: torch.Tensor, kind: GGMLQuantizationType) -> NDArray[Any]:
    """The tensor's data; bf16 is rounded to nearest even.

    Raises:
        HandoffError: a number is not finite, or too large for the form.
    """
    wide = tensor.detach().to("cpu", torch.float32).contiguous()
    if not bool(torch.isfinite(wide).all()):
        raise HandoffError(f"{name} holds numbers that are not finite", "the weights are broken: train or copy again")
    if kind == GGMLQuantizationType.F32:
        return wide.numpy()
    if kind == GGMLQuantizationType.BF16:
        rounded = wide.to(torch.bfloat16)
        if not bool(torch.isfinite(rounded).all()):
            raise HandoffError(f"{name} holds numbers too large for bfloat16", "use float32")
        return rounded.view(torch.uint16).numpy()
    largest = float(wide.abs().max()) if wide.numel() else 0.0
    if largest / 127 > _LARGEST_SCALE:
        raise HandoffError(f"{name} holds {largest:.3g}, too large for the scales of q8_0", "use float32 or bfloat16")
    codes: NDArray[Any] = quantize(wide.numpy(), GGMLQuantizationType.Q8_0)
    return codes


def decoded(name: str, data: NDArray[Any], shape: tuple[int, ...], kind: GGMLQuantizationType) -> torch.Tensor:
    """The tensor of a file's data.

    Raises:
        HandoffError: a form that is not read here.
    """
    if kind == GGMLQuantizationType.BF16:
        return torch.from_numpy(data.reshape(-1).view(np.uint16).copy()).view(torch.bfloat16).reshape(shape)
    if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        return torch.from_numpy(data.reshape(shape).copy())
    if kind == GGMLQuantizationType.Q8_0:
        return torch.from_numpy(np.ascontiguousarray(dequantize(data, kind))).reshape(shape)
    raise HandoffError(f"{name} is kept as {kind.name}", "F32, F16, BF16 and Q8_0 are read here")
