"""Weights in 8 bits, and back: FP8 with a scale per block as DeepSeek publishes, int8 with a scale per output channel.

Scales keep 16 of the 24 significant bits of fp32. A code has at most 8, so code times scale is exact in fp32, and
quantising what was multiplied out gives the same codes and scales again, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from crosschip.errors import ModelError

__all__ = [
    "FP8_DTYPES",
    "QUANTISED_DTYPES",
    "Block",
    "Quantisation",
    "check_dialect",
    "dequantise",
    "dequantise_blocks",
    "dequantise_channels",
    "quantisation_of",
    "quantise_blocks",
    "quantise_channels",
    "rounding_steps",
    "scale_name",
]

Block = tuple[int, int]
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
QUANTISED_DTYPES = (*FP8_DTYPES, torch.int8)

_FP8_MAX, _INT8_MAX = 448.0, 127.0
_DROPPED_BITS = 8  # of a scale's 24 significant bits
_AT_ONCE = 1 << 20  # numbers
_LEAST_SCALE = 2.0**-100  # below, the block counts as zero: its scale could not be normal with all its bits


@dataclass(frozen=True)
class Quantisation:
    """How the weights of a directory are stored: `block` belongs to fp8 alone."""

    kind: Literal["fp8", "w8a8"]
    block: Block = (128, 128)


def scale_name(weight: str, dtype: torch.dtype) -> str:
    """The name of the scales of the weight `weight`, which is stored in `dtype`."""
    return f"{weight}_scale" if dtype == torch.int8 else f"{weight}_scale_inv"


def quantise_blocks(weight: Tensor, block: Block = (128, 128)) -> tuple[Tensor, Tensor]:
    """[rows, columns] as e4m3fn codes and their scales [ceil(rows / b0), ceil(columns / b1)] in fp32."""
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=weight.device)
    if weight.is_meta:  # answered from the shapes: torch's own meta kernels would import 80 MB of Python first
        return codes, torch.empty(-(-rows // block[0]), -(-columns // block[1]), device="meta")
    scales = []
    for part in _stripes(weight, block[0]):
        floats = weight[part].float()
        padded = torch.nn.functional.pad(floats.abs(), (0, -columns % block[1], 0, -floats.shape[0] % block[0]))
        largest = padded.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0])).amax(dim=(1, 3))
        scale = _scale(largest, _FP8_MAX)
        del padded
        scaled = floats / _wide(scale, block, *floats.shape)  # never in place: a fp32 weight is not copied
        codes[part] = scaled.clamp_(-_FP8_MAX, _FP8_MAX).to(codes.dtype)
        scales.append(scale)
    return codes, torch.cat(scales)


def dequantise_blocks(name: str, weight: Tensor, scale: Tensor, block: Block) -> Tensor:
    """FP8 [rows, columns] times its scale per block [ceil(rows / b0), ceil(columns / b1)], in fp32."""
    rows, columns = weight.shape
    expected = (-(-rows // block[0]), -(-columns // block[1]))
    if tuple(scale.shape) != expected:
        raise ModelError(
            f"{name}: scales of shape {tuple(scale.shape)} for a weight of {tuple(weight.shape)} in blocks of "
            f"{block}; expected {expected}",
            "check weight_block_size in config.json",
        )
    exact = torch.empty(rows, columns, device=weight.device)
    if weight.is_meta:
        return exact
    for part in _stripes(weight, block[0]):
        scales = scale[part.start // block[0] : -(-part.stop // block[0])].float()
        exact[part] = weight[part].float().mul_(_wide(scales, block, part.stop - part.start, columns))
    return exact


def quantise_channels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] as int8 codes from -127 to 127 and a scale per output channel [out, 1] in fp32."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], 1, device=weight.device)
    if weight.is_meta:
        return codes, scale
    for part in _stripes(weight, 1):
        floats = weight[part].float()
        scale[part] = _scale(floats.abs().amax(dim=1, keepdim=True), _INT8_MAX)
        codes[part] = (floats / scale[part]).round_().clamp_(-_INT8_MAX, _INT8_MAX).to(torch.int8)
    return codes, scale


def dequantise_channels(name: str, weight: Tensor, scale: Tensor) -> Tensor:
    """int8 [out, in] times its scale per output channel [out, 1], in fp32."""
    if tuple(scale.shape) not in ((weight.shape[0], 1), (weight.shape[0],)):
        raise ModelError(
            f"{name}: scales of shape {tuple(scale.shape)} for an int8 weight of {tuple(weight.shape)}; "
            f"expected {(weight.shape[0], 1)}, one per output channel",
            "scales per tensor or per group are not read here: quantise the model again with strategy 'channel'",
        )
    if weight.is_meta:
        return torch.empty(weight.shape, device="meta")
    return weight.float().mul_(scale.float().reshape(-1, 1))


def dequantise(name: str, weight: Tensor, scale: Tensor, block: Block) -> Tensor:
    """The stored weight `name`, of whichever kind its dtype says, multiplied out in fp32.

    Raises:
        ModelError: it is no matrix, or its scales have another shape than they should.
    """
    if weight.dim() != 2:
        raise ModelError(f"{name} is stored in 8 bits with shape {tuple(weight.shape)}", "only matrices are read so")
    if not scale.is_floating_point():
        raise ModelError(f"{name}: its scales are {scale.dtype}", "scales are fp32 or bf16; convert the model again")
    if weight.dtype == torch.int8:
        return dequantise_channels(name, weight, scale)
    return dequantise_blocks(name, weight, scale, block)


def rounding_steps(weight: Tensor, scale: Tensor, block: Block) -> Tensor:
    """The distance between neighbouring numbers of the format at each stored number, in fp32: [rows, columns]."""
    if weight.dtype == torch.int8:
        return scale.float().reshape(-1, 1).expand(weight.shape)
    info = torch.finfo(weight.dtype)
    exponent = weight.float().abs().clamp_min(info.smallest_normal).log2().floor_()
    return torch.exp2(exponent).mul_(info.eps * _wide(scale.float(), block, *weight.shape))


def _stripes(weight: Tensor, multiple: int) -> Iterator[slice]:
    """Rows that are worked on at once: their fp32 copies stay small beside the weight."""
    rows, columns = weight.shape
    step = max(multiple, _AT_ONCE // max(columns, 1) // multiple * multiple)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _scale(largest: Tensor, code: float) -> Tensor:
    """The scale that brings the largest magnitude of a block to the largest code, rounded up to 16 bits."""
    exact = largest / code
    if not bool(exact.isfinite().all()):
        raise ModelError("a weight holds NaN or infinity", "it has no 8-bit form: look at the training that wrote it")
    bits = exact.view(torch.int32)
    coarse = (bits + ((1 << _DROPPED_BITS) - 1) >> _DROPPED_BITS << _DROPPED_BITS).view(torch.float32)
    return torch.where(exact < _LEAST_SCALE, torch.ones_like(exact), coarse)


def _wide(scale: Tensor, block: Block, rows: int, columns: int) -> Tensor:
    return scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]


def check_dialect(name: str, weight: Tensor) -> None:
    """Refuse FP8 bytes of one dialect under the other's label, as far as the bytes tell.

    The two differ by a factor of 2 at almost every code, so a wrong label leaves a plausible model. What tells: 0x7f
    and 0xff are NaN in e4m3fn and the largest numbers in e4m3fnuz, which every block scaled to them holds; 0x80 is -0
    in e4m3fn and NaN in e4m3fnuz. Bytes without any of the three fit both.

    Raises:
        ModelError: the weight holds a NaN under its label.
    """
    codes = weight.view(torch.uint8)
    top = int(((codes & 0x7F) == 0x7F).sum())
    minus_zero = int((codes == 0x80).sum())
    if weight.dtype == torch.float8_e4m3fn and top:
        how = "these are e4m3fnuz bytes" if not minus_zero else "the file is damaged: no dialect fits"
        found, other = f"{top} codes 0x7f or 0xff, which are NaN there", how
    elif weight.dtype == torch.float8_e4m3fnuz and minus_zero:
        how = "these are e4m3fn bytes" if not top else "the file is damaged: no dialect fits"
        found, other = f"{minus_zero} codes 0x80, which are NaN there", how
    else:
        return
    label = str(weight.dtype).removeprefix("torch.float8_")
    raise ModelError(
        f"{name} is labelled {label} and holds {found}: {other}",
        "read in the wrong dialect every weight is off by a factor of 2; make or download the file again",
    )


def quantisation_of(document: dict[str, Any]) -> Quantisation | None:
    """What `quantization_config` of a `config.json` says; None where the weights are not quantised.

    Raises:
        ModelError: a kind that is not read here.
    """
    settings = document.get("quantization_config") or document.get("compression_config")
    if not settings:
        return None
    if not isinstance(settings, dict):
        raise ModelError(
            f"quantization_config of config.json is {settings!r}",
            "it is an object with quant_method: copy the model's own config.json",
        )
    method = settings.get("quant_method")
    if method == "fp8":
        return Quantisation("fp8", _block(settings.get("weight_block_size") or (128, 128)))
    if method == "compressed-tensors":
        _check_compressed(settings)
        return Quantisation("w8a8")
    raise ModelError(
        f"quantization_config.quant_method is {method!r}",
        "fp8 block scales and compressed-tensors int8 are read here; use the unquantised weights",
    )


def _block(value: Any) -> Block:
    sizes = tuple(value) if isinstance(value, list | tuple) else ()
    if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ModelError(f"weight_block_size = {value!r}", "it is two positive numbers, such as [128, 128]")
    return sizes[0], sizes[1]


def _check_compressed(settings: dict[str, Any]) -> None:
    """Only symmetric int8 weights with a scale per output channel are read."""
    remedy = "symmetric int8 weights with a scale per output channel are read here; use the unquantised weights"
    if settings.get("format") not in (None, "int-quantized"):
        raise ModelError(f"quantization_config.format is {settings['format']!r}", remedy)
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ModelError(f"quantization_config.config_groups is {groups!r}", remedy)
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        expected = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
        found = {key: weights.get(key) for key in expected} if isinstance(weights, dict) else weights
        if found != expected:
            raise ModelError(f"quantization_config.config_groups.{name}.weights is {found}", remedy)
