"""`hf`: what transformers, vLLM, vllm-ascend and SGLang read, in bf16 or fp32."""

from __future__ import annotations

from pathlib import Path

import torch

from crosschip.handoff.conversion.declared import dtype_layout
from crosschip.handoff.conversion.rotary_pairs import in_pairs
from crosschip.handoff.conversion.shards import SHARD_BYTES, Tell
from crosschip.handoff.source import ModelSource
from crosschip.handoff.targets.target import Target, write_hugging_face

__all__ = ["HF"]


def _export(source: ModelSource, directory: Path, dtype: str, tell: Tell, shard_bytes: int = SHARD_BYTES) -> None:
    source = in_pairs(source)
    layout = dtype_layout(source.tensors, getattr(torch, dtype))
    write_hugging_face(source, layout, directory, dtype, tell, shard_bytes)


HF = Target("hf", ("float32", "bfloat16"), _export, None, "Hugging Face: transformers, vLLM, vllm-ascend, SGLang")
