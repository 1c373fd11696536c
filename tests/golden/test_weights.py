"""The record of a tensor: made block by block, so that a large tensor is not in memory once more, and twice as wide."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest
import torch

from crosschip.golden import weights
from crosschip.golden.weights import compare_weights, tensor_record

RECORD = """
import pathlib, torch
from crosschip.golden.weights import tensor_record
def memory(which):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))
tensor_record(torch.randn(64, 64))
tensor = torch.empty({rows}, 8192, dtype=torch.{dtype}).normal_()
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
tensor_record(tensor)
print((memory("VmHWM") - before) / (tensor.numel() * tensor.element_size()))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_record_of_a_large_tensor_takes_little_memory_beside_it(dtype: str) -> None:
    """512 MiB. The promise of 1.3 times a shard leaves 0.3 beside it; one copy in fp64 is 2 or 4 times the tensor."""
    words = [sys.executable, "-c", RECORD.format(rows=16384 if dtype == "float32" else 32768, dtype=dtype)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.3


@pytest.mark.parametrize("shape", [(37, 11), (5, 3, 4), (50,), (1, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8])
def test_blocks_make_the_record_that_one_piece_makes(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1)).mul(9).to(dtype)
    whole = tensor_record(tensor)
    monkeypatch.setattr(weights, "_AT_ONCE", 23)
    parts = tensor_record(tensor)
    assert whole.sha256 == parts.sha256 == hash_of(tensor)
    assert whole.sha256_bf16 == parts.sha256_bf16 == (hash_of(tensor.bfloat16()) if dtype.is_floating_point else "")
    for name in ("sum_squares", "rows", "columns", "sorted_rows", "sorted_columns", "projections"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-12), name
    assert compare_weights({"a": whole}, {"a": parts}) == []


def test_the_numbers_of_fp16_in_fp32_are_told_by_their_hash_in_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_AT_ONCE", 16)
    halves = torch.randn(9, 8).half()
    assert tensor_record(halves.float()).sha256_fp16 == hash_of(halves)
    other = halves.float()
    other[-1, -1] = 0.1
    assert tensor_record(other).sha256_fp16 == ""


def hash_of(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
