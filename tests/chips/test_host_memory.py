from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource, sys, torch
from crosschip.chips import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        tensors = [torch.ones(1 << 20) for _ in range(16)]  # 64 MiB, more than glibc keeps by itself
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this C library has no mallopt")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    # By itself glibc raises its threshold or not as the heap happens to lie; the variable holds it at its first value.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(128 << 10)}

    def faults(mode: str) -> int:
        command = [sys.executable, "-c", COUNT_FAULTS, mode]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return int(done.stdout)

    pages = 20 * 16 * (4 << 20) // 4096  # what 20 rounds of sixteen 4 MiB tensors touch
    assert faults("default") > pages / 2
    assert faults("keep") < pages / 20
