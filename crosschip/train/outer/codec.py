"""How numbers become bytes for the wire: fp32 as it is, or int8 and int4 with one fp32 scale a block.

A block's scale is its largest magnitude over the largest code, so a value is off by half a scale at most: its block's
largest magnitude / 254 with int8, / 14 with int4. A block with a value that is not finite decodes to no finite value,
so that whoever watches for such values still sees them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

__all__ = ["BLOCK", "CODECS", "Codec", "CompressionName"]

CompressionName = Literal["none", "int8", "int4"]

BLOCK = 128  # a scale of 4 bytes adds 3 % to int8 and 6 % to int4; larger blocks have larger errors


@dataclass(frozen=True)
class Codec:
    """`encode` takes fp32 [rows, n], n a multiple of `BLOCK`, and gives bytes [rows, m]; `decode` is the way back."""

    name: CompressionName
    is_exact: bool
    encode: Callable[[torch.Tensor], torch.Tensor]
    decode: Callable[[torch.Tensor], torch.Tensor]


def _encode_fp32(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.uint8)


def _decode_fp32(payload: torch.Tensor) -> torch.Tensor:
    return payload.view(torch.float32)


def _quantised(values: torch.Tensor, largest_code: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [rows, blocks, BLOCK] as fp32 whole numbers, and scales [rows, blocks]."""
    blocks = values.reshape(values.shape[0], -1, BLOCK)
    scales = blocks.abs().amax(dim=-1) / largest_code
    inverse = torch.where(scales > 0, scales.reciprocal(), torch.zeros_like(scales))
    codes = (blocks * inverse[..., None]).round_().nan_to_num_(0.0).clamp_(-largest_code, largest_code)
    return codes, scales


def _with_scales(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return torch.cat((scales.contiguous().view(torch.uint8), codes.flatten(1)), dim=1)


def _encode_int8(values: torch.Tensor) -> torch.Tensor:
    codes, scales = _quantised(values, 127)
    return _with_scales(codes.to(torch.int8).view(torch.uint8), scales)


def _decode_int8(payload: torch.Tensor) -> torch.Tensor:
    num_blocks = payload.shape[1] // (4 + BLOCK)
    scales, codes = _parted(payload, num_blocks)
    values = codes.view(torch.int8).view(payload.shape[0], num_blocks, BLOCK).to(torch.float32)
    return values.mul_(scales[..., None]).flatten(1)


def _encode_int4(values: torch.Tensor) -> torch.Tensor:
    codes, scales = _quantised(values, 7)
    codes = codes.add_(8).to(torch.uint8)  # 1 to 15: half a byte each
    return _with_scales(codes[..., 0::2] | (codes[..., 1::2] << 4), scales)


def _decode_int4(payload: torch.Tensor) -> torch.Tensor:
    num_blocks = payload.shape[1] // (4 + BLOCK // 2)
    scales, codes = _parted(payload, num_blocks)
    halves = torch.stack((codes & 15, codes >> 4), dim=-1)
    values = halves.view(payload.shape[0], num_blocks, BLOCK).to(torch.float32).sub_(8)
    return values.mul_(scales[..., None]).flatten(1)


def _parted(payload: torch.Tensor, num_blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    scales = payload[:, : 4 * num_blocks].contiguous().view(torch.float32)
    return scales, payload[:, 4 * num_blocks :].contiguous()


CODECS: dict[CompressionName, Codec] = {
    "none": Codec("none", True, _encode_fp32, _decode_fp32),
    "int8": Codec("int8", False, _encode_int8, _decode_int8),
    "int4": Codec("int4", False, _encode_int4, _decode_int4),
}
