"""Memory in use: what the process, the C library and the chip tell."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from crosschip.chips.simulated import activate
from crosschip.qualify.exams.stability import memory
from crosschip.qualify.exams.stability.memory import memory_left, read_memory

MIB = 1 << 20
CPU = torch.device("cpu")


def test_kept_memory_shows() -> None:
    """Pages of its own, as blocks of the C library may lie in memory that was freed before."""
    before = read_memory(CPU).resident
    with mmap.mmap(-1, 40 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as kept:
        kept.write(b"x" * len(kept))
        during = read_memory(CPU).resident
    after = read_memory(CPU).resident
    assert before is not None
    assert during is not None
    assert after is not None
    assert during - after >= 39 * MIB
    assert during > before


_SMALL_BLOCKS = """
import torch
from crosschip.qualify.exams.stability.memory import read_memory
before = read_memory(torch.device("cpu")).allocated
kept = [bytearray(1024) for _ in range(2000)]
after = read_memory(torch.device("cpu")).allocated
print("untold" if before is None or after is None else after - before)
"""


def test_small_blocks_show_by_the_byte() -> None:
    """In a process of its own: what other tests left frees its own blocks between two readings."""
    told = subprocess.run(
        [sys.executable, "-c", _SMALL_BLOCKS], check=True, capture_output=True, text=True
    ).stdout.strip()
    if told == "untold":
        pytest.skip("this C library does not tell what it has handed out")
    assert 2000 * 1024 <= int(told) < 2 * 2000 * 1024


def test_the_chips_own_memory_shows() -> None:
    activate("sim")
    device = torch.device("sim", 0)
    before = read_memory(device).device
    kept = torch.zeros(3 * MIB, dtype=torch.uint8, device=device)
    during = read_memory(device).device
    assert before is not None
    assert during is not None
    assert during - before >= kept.numel()
    assert read_memory(CPU).device is None


def test_what_is_left_is_within_a_containers_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unlimited, _ = memory_left(CPU)
    assert unlimited is not None
    (tmp_path / "memory.max").write_text(f"{100 * MIB}\n", encoding="ascii")
    (tmp_path / "memory.current").write_text(f"{30 * MIB}\n", encoding="ascii")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory_left(CPU) == (70 * MIB, None)
    (tmp_path / "memory.max").write_text("max\n", encoding="ascii")
    assert (memory_left(CPU)[0] or 0) > 70 * MIB


def test_garbage_that_waits_for_a_collection_does_not_count() -> None:
    before = read_memory(CPU).resident
    for _ in range(20):
        circle: list[object] = [bytearray(MIB)]
        circle.append(circle)
    del circle
    after = read_memory(CPU).resident
    assert before is not None
    assert after is not None
    assert after - before < 8 * MIB
