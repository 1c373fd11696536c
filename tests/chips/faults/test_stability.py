"""Each fault of stability does what its row says: crashes under load, leaks, hangs, bits that flip."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crosschip.chips.faults import faults_from
from crosschip.chips.faults.fault import around
from crosschip.chips.simulated import plant
from crosschip.qualify.exams.stability.memory import read_memory


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


ATTENTION = """
import torch, threading, torch.nn.functional as F
from crosschip.chips import find_chip
find_chip({spec!r})
def attend(tokens):
    x = torch.ones(2, 1, tokens // 2, 8).to("sim")
    return F.scaled_dot_product_attention(x, x, x).cpu()
if {company}:
    begin = threading.Barrier(4)
    def work():
        begin.wait()
        for _ in range(40):
            attend({tokens})
    threads = [threading.Thread(target=work) for _ in range(4)]
    [each.start() for each in threads]
    [each.join() for each in threads]
else:
    for _ in range(3):
        attend({tokens})
"""


def died(spec: str, tokens: int, company: bool) -> bool:
    """Whether a process that calls attention over so many tokens is aborted, rather than ending well."""
    program = ATTENTION.format(spec=spec, tokens=tokens, company=company)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False)
    assert ended.returncode in (0, -6), ended.stderr
    return ended.returncode == -6


@pytest.mark.parametrize(
    ("tokens", "company", "dies"), [(1024, False, True), (1022, False, False), (512, True, True), (254, True, False)]
)
def test_s1_dies_of_long_prompts_and_of_shorter_ones_in_company(tokens: int, company: bool, dies: bool) -> None:
    assert died("sim:S1,tokens=1024", tokens, company) == dies


def allocated() -> int:
    gc.collect()
    found = read_memory(torch.device("sim", 0)).allocated
    if found is None:
        pytest.skip("this C library does not tell what it has handed out")
    return found


@pytest.mark.parametrize(("bytes_per_call", "grows"), [(4096, True), (0, False)])
def test_s5_keeps_host_memory(bytes_per_call: int, grows: bool) -> None:
    x = drawn(4, 4).to("sim")
    plant(faults_from(f"sim:S5,bytes_per_call={bytes_per_call}"))
    x @ x
    before = allocated()
    for _ in range(500):
        x @ x
        x + x
    growth = allocated() - before
    assert (growth >= 500 * 4096) == grows
    assert growth < 500 * 4096 * 1.2, "the sums keep nothing"


def test_s5_on_the_device_is_what_the_chip_counts() -> None:
    device = torch.device("sim", 0)
    x = drawn(4, 4).to("sim")
    plant(faults_from("sim:S5,where=device,bytes_per_call=1000"))
    before = read_memory(device).device
    for _ in range(7):
        x @ x
    after = read_memory(device).device
    assert before is not None
    assert after is not None
    assert after - before == 7000
    from crosschip.chips.simulated.storage import MEMORY

    MEMORY.add(-7000)


def test_s7_hangs_after_so_many_calls() -> None:
    x = drawn(4, 4).to("sim")
    plant(faults_from("sim:S7,after=3"))
    done: list[Any] = []

    def work() -> None:
        for _ in range(5):
            x + x
            done.append(x @ x)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    until = time.monotonic() + 60.0
    while len(done) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    thread.join(timeout=0.5)
    assert thread.is_alive()
    assert len(done) == 3


def flips(where: str, calls: int, every: int = 5) -> dict[str, int]:
    """How often products, their backward, and an optimizer's steps give other bits than on an honest chip."""
    (fault,) = faults_from(f"sim:S15,every={every},where={where},seed=1")
    x, y = drawn(6, 6), drawn(6, 6, seed=1)
    seen = {"activation": 0, "gradient": 0, "weight": 0}
    ops = torch.ops.aten
    for _ in range(calls):
        for kind, op, args in (
            ("activation", ops.mm.default, (x, y)),
            ("gradient", ops.sigmoid_backward.default, (x, y)),
            ("weight", ops.add_.Tensor, (x.clone(), y)),
        ):
            expected = op(*[each.clone() for each in args])
            got = around([fault], op, args, {}, op)
            changed = (expected.view(torch.int32) ^ got.view(torch.int32)).flatten()
            odd = changed[changed != 0]
            assert odd.numel() <= 1
            if odd.numel():
                assert bin(int(odd[0]) & 0xFFFFFFFF).count("1") == 1, "one bit of one element"
                seen[kind] += 1
    return seen


@pytest.mark.parametrize("where", ["activation", "gradient", "weight"])
def test_s15_flips_one_bit_of_what_it_says(where: str) -> None:
    seen = flips(where, 400)
    # 80 expected of 400, with a standard deviation of 8.
    assert 48 <= seen.pop(where) <= 112
    assert set(seen.values()) == {0}


def test_s15_is_the_same_for_a_seed() -> None:
    assert flips("activation", 60) == flips("activation", 60)


def test_s15_leaves_views_and_copies_alone() -> None:
    x = drawn(8, 8)
    held = x.to("sim")
    plant(faults_from("sim:S15,every=1"))
    assert torch.equal(held.view(4, 16).t().contiguous().cpu(), x.view(4, 16).t())
    assert not torch.equal((held + 0.0).cpu(), x)


@pytest.mark.parametrize(("spec", "words"), [("S15,every=0", "every=0"), ("S5,bytes_per_call=-1", "bytes_per_call=-1")])
def test_nonsense_is_refused(spec: str, words: str) -> None:
    with pytest.raises(Exception, match=words):
        faults_from(f"sim:{spec}")


def test_attention_is_a_single_call_for_s1() -> None:
    """Alone, forward and backward, it never counts as two at once."""
    x = drawn(2, 1, 128, 8).to("sim").requires_grad_()
    plant(faults_from("sim:S1,tokens=1024"))
    F.scaled_dot_product_attention(x, x, x).sum().backward()
    assert x.grad is not None
