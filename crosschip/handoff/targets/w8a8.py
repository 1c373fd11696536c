"""`w8a8`: int8 weights with a scale per output channel, activations int8 per token, for chips without FP8.

In the compressed-tensors format, which vLLM and vllm-ascend read: `weight` int8 and `weight_scale` [out, 1] in fp32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from crosschip.handoff.conversion.declared import quantised_layout
from crosschip.handoff.conversion.rotary_pairs import in_pairs
from crosschip.handoff.conversion.shards import SHARD_BYTES, Tell
from crosschip.handoff.source import ModelSource, TensorSource
from crosschip.handoff.targets.target import Target, kept_modules, write_hugging_face
from crosschip.model.quantised import Quantisation

__all__ = ["W8A8"]

_HOW = Quantisation("w8a8")


def _export(source: ModelSource, directory: Path, dtype: str, tell: Tell, shard_bytes: int = SHARD_BYTES) -> None:
    source = in_pairs(source)
    layout = quantised_layout(source.tensors, _HOW, getattr(torch, dtype))
    settings = _settings(source.tensors)
    write_hugging_face(source, layout, directory, dtype, tell, shard_bytes, settings)


def _settings(tensors: TensorSource) -> dict[str, Any]:
    """`quantization_config`: every Linear but those in `ignore`."""
    common = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**common, "strategy": "channel", "dynamic": False, "observer": "minmax"},
        "input_activations": {**common, "strategy": "token", "dynamic": True, "observer": None},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": kept_modules(tensors),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


W8A8 = Target("w8a8", ("bfloat16", "float32"), _export, "int8", "int8 weights and activations, compressed-tensors")
