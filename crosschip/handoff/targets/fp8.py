"""`fp8`: weights in e4m3 with a scale per block of 128 x 128, as DeepSeek publishes its models."""

from __future__ import annotations

from pathlib import Path

import torch

from crosschip.handoff.conversion.declared import quantised_layout
from crosschip.handoff.conversion.rotary_pairs import in_pairs
from crosschip.handoff.conversion.shards import SHARD_BYTES, Tell
from crosschip.handoff.source import ModelSource
from crosschip.handoff.targets.target import Target, kept_modules, write_hugging_face
from crosschip.model.quantised import Quantisation

__all__ = ["FP8"]

_HOW = Quantisation("fp8", (128, 128))


def _export(source: ModelSource, directory: Path, dtype: str, tell: Tell, shard_bytes: int = SHARD_BYTES) -> None:
    source = in_pairs(source)
    layout = quantised_layout(source.tensors, _HOW, getattr(torch, dtype))
    settings = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": list(_HOW.block),
        "activation_scheme": "dynamic",
        "modules_to_not_convert": kept_modules(source.tensors),  # a router, say: vLLM would look for its scales
    }
    write_hugging_face(source, layout, directory, dtype, tell, shard_bytes, settings)


FP8 = Target("fp8", ("bfloat16", "float32"), _export, "fp8", "e4m3 with scales per 128 x 128 block, as DeepSeek's")
