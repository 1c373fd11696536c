"""Steps of one token a row, by compiled kernels, against the same steps by torch's operators."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numba import cfunc, njit, types
from numba.core.caching import CacheImpl, IndexDataCacheFile
from numba.np.numpy_support import carray

from crosschip.model import Decoder, ModelConfig
from crosschip.model.latent_cache import LatentCache
from crosschip.model.rows import row_step, thread_team
from crosschip.model.rows.arithmetic import write_gated
from crosschip.model.rows.intrinsics import call, take_next
from crosschip.model.rows.step import _kept
from tests.model.configs import configs, random_model

CONFIG = ModelConfig(vocab_size=97, hidden_size=32, num_hidden_layers=3, max_position_embeddings=256)
LENGTHS = (40, 1, 63, 32, 7)


@pytest.fixture
def threads() -> Iterator[int]:
    """Two of torch's, however many there were."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield 2
    torch.set_num_threads(before)


def filled(decoder: Decoder, lengths: tuple[int, ...] = LENGTHS, **options: bool) -> LatentCache:
    """A cache in which slot n has `lengths[n]` tokens, in blocks that lie in no order."""
    cache = decoder.new_cache(len(lengths), 64, **options)
    blocks = torch.randperm(cache.num_blocks, generator=torch.Generator().manual_seed(3)).view(len(lengths), -1)
    for slot, own in enumerate(blocks.tolist()):
        cache.set_blocks(slot, own)
    tokens = torch.randint(97, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(4))
    for slot, length in enumerate(lengths):
        decoder.extend(tokens[slot : slot + 1, :length], torch.tensor([0]), torch.tensor([slot]), cache)
    return cache


def step(decoder: Decoder, cache: LatentCache, slots: list[int]) -> torch.Tensor:
    """The states after one more token in these slots."""
    tokens = torch.arange(5, 5 + len(LENGTHS))[slots][:, None]
    return decoder.extend(tokens, torch.tensor(LENGTHS)[slots], torch.tensor(slots), cache)[:, 0]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(config=configs(), slots=st.permutations(range(5)), num=st.integers(1, 5), num_threads=st.integers(1, 3))
def test_a_step_by_kernels_is_the_step_by_operators(
    config: ModelConfig, slots: list[int], num: int, num_threads: int
) -> None:
    model = random_model(replace(config, max_position_embeddings=64))
    plain, fast = Decoder(model), Decoder(model, by_kernels=True)
    caches = filled(plain, record_routes=True), filled(fast, record_routes=True)
    expected, before = step(plain, caches[0], slots[:num]), torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        found = step(fast, caches[1], slots[:num])
    finally:
        torch.set_num_threads(before)
    scale = expected.abs().max().item()
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * scale)
    for ours, theirs in zip(caches[1].rows, caches[0].rows, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())
    for slot in slots[:num]:
        blocks = caches[0].tables_SW[slot].tolist()
        assert caches[0].routes is not None
        assert caches[1].routes is not None
        theirs = caches[0].routes.read(blocks, LENGTHS[slot] + 1).sort(-1).values
        assert torch.equal(caches[1].routes.read(blocks, LENGTHS[slot] + 1).sort(-1).values, theirs)


@pytest.mark.parametrize("num_rows", [1, 6, 7, 40])
def test_any_number_of_rows(num_rows: int) -> None:
    """Also more than a product takes at a time, of a model with few experts that are chosen often."""
    model = random_model(replace(CONFIG, moe_intermediate_size=20, kv_lora_rank=40, num_attention_heads=5))
    plain, fast = Decoder(model), Decoder(model, by_kernels=True)
    start = torch.arange(num_rows) % 3
    tokens = torch.randint(97, (num_rows, 4), generator=torch.Generator().manual_seed(6))
    states = []
    for decoder in (plain, fast):
        cache = decoder.new_cache(num_rows, 64)
        plain.extend(tokens[:, :3], torch.zeros_like(start), torch.arange(num_rows), cache)
        states.append(decoder.extend(tokens[:, 3:], start, torch.arange(num_rows), cache))
    assert torch.allclose(states[1], states[0], rtol=1e-4, atol=1e-4 * states[0].abs().max().item())


def test_kernels_are_what_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparisons above would hold as well if both were the same way."""
    model = random_model(CONFIG)
    plain, fast = Decoder(model), Decoder(model, by_kernels=True)
    caches = filled(plain), filled(fast)
    calls = []
    monkeypatch.setattr(row_step, "call_together", lambda *arguments: calls.append(arguments))
    step(plain, caches[0], [0, 1])
    assert not calls
    step(fast, caches[1], [0, 1])
    assert len(calls) == 1


def test_a_row_has_the_same_bits_in_any_company(threads: int) -> None:
    """Beside others or alone, wherever it stands, and with one thread or several."""
    decoder = Decoder(random_model(CONFIG), by_kernels=True)
    together = step(decoder, filled(decoder), [3, 0, 4, 2, 1])
    for place, slot in enumerate([3, 0, 4, 2, 1]):
        assert torch.equal(step(decoder, filled(decoder), [slot])[0], together[place])
    assert torch.equal(step(decoder, filled(decoder), [1, 4])[0], together[4])
    cache = filled(decoder)  # which products of torch's fill
    torch.set_num_threads(1)
    assert torch.equal(step(decoder, cache, [3, 0, 4, 2, 1]), together)


def test_without_a_library_of_threads_the_caller_computes_alone(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    decoder = Decoder(random_model(CONFIG), by_kernels=True)
    expected = step(decoder, filled(decoder), [0, 1, 2])
    monkeypatch.setattr(thread_team, "_team", lambda: None)
    assert thread_team.barrier_address() == 0
    assert torch.equal(step(decoder, filled(decoder), [0, 1, 2]), expected)


def test_all_threads_of_torch_make_a_call_and_wait_for_each_other(threads: int) -> None:
    """Each counts itself in, waits, and finds all counted."""

    @cfunc(types.void(types.voidptr))
    def count(numbers: Any) -> None:
        found = carray(numbers, 4, dtype=np.int64)
        me = take_next(found[3])
        call(found[2])
        found[me] = take_next(found[3] + 8)

    barrier = thread_team.barrier_address()
    if not barrier:
        pytest.skip("torch's threads are of no library that is known")
    counters = np.zeros(2, np.int64)
    numbers = np.array([-1, -1, barrier, counters.ctypes.data])
    thread_team.call_together(count.address, numbers.ctypes.data)
    assert counters.tolist() == [threads, threads]
    assert sorted(numbers[:2].tolist()) == [0, 1]


def test_what_is_not_finite_stays_in_its_row() -> None:
    decoder = Decoder(random_model(CONFIG), by_kernels=True)
    cache = filled(decoder)
    sound = step(decoder, filled(decoder), [0, 1, 2])
    cache.rows[1][cache.tables_SW[1][0] * 32] = torch.nan
    found = step(decoder, cache, [0, 1, 2])
    assert not found[1].isfinite().any()
    assert torch.equal(found[[0, 2]], sound[[0, 2]])


def test_an_expert_that_nobody_chose_is_not_looked_at() -> None:
    model = random_model(replace(CONFIG, n_routed_experts=4, num_experts_per_tok=2))
    experts = [block.mlp for block in model.layers if hasattr(block.mlp, "experts")]
    assert experts
    for mixture in experts:
        mixture.gate.e_score_correction_bias[1] = -1e9
    sound, tokens, zero = Decoder(model, by_kernels=True), torch.tensor([[5]]), torch.tensor([0])
    expected = sound.extend(tokens, zero, zero, sound.new_cache(1, 32))
    for mixture in experts:
        mixture.experts.gate_up_proj.data[1] = torch.inf
    spoilt = Decoder(model, by_kernels=True)
    assert torch.equal(spoilt.extend(tokens, zero, zero, spoilt.new_cache(1, 32)), expected)


def test_gates_of_every_size_are_those_of_torch() -> None:
    values = torch.cat((torch.linspace(-120, 120, 100_001), torch.tensor([0.0, -0.0, 3e38, -3e38])))

    @njit
    def gated(gate: Any, up: Any, out: Any) -> None:
        write_gated(gate, up, np.float32(1), out)

    active = np.empty(len(values), np.float32)
    gated(values.numpy(), np.ones(len(values), np.float32), active)
    expected = torch.nn.functional.silu(values.double())
    error = (torch.from_numpy(active).double() - expected).abs()
    assert (error <= 4e-7 * expected.abs() + 2e-36).all()


def test_gates_need_no_fused_products() -> None:
    """A CPU without them rounds each product: what is taken off in two steps must not become one."""
    again = f"{__file__}::test_gates_of_every_size_are_those_of_torch"
    environment = {**os.environ, "NUMBA_CPU_NAME": "generic"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", again]
    made = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout
    assert "1 passed" in made.stdout


def test_other_dtypes_wide_attention_and_large_layers_go_another_way() -> None:
    assert Decoder(random_model(CONFIG), torch.bfloat16, by_kernels=True)._row_step is None
    wide = replace(CONFIG, num_attention_heads=64, kv_lora_rank=64)
    assert Decoder(random_model(wide), by_kernels=True)._row_step is None
    large = replace(CONFIG, hidden_size=512, intermediate_size=4096, first_k_dense_replace=3)
    assert Decoder(random_model(large), by_kernels=True)._row_step is None


def _no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CacheImpl, "_locator_classes", [])


def _full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def save(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(IndexDataCacheFile, "save", save)


def _cut_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise EOFError("Ran out of input")

    monkeypatch.setattr(IndexDataCacheFile, "load", load)


@pytest.mark.parametrize("trouble", [_no_place, _full_disk, _cut_file])
def test_whatever_is_wrong_with_the_cache_kernels_are_compiled_all_the_same(
    monkeypatch: pytest.MonkeyPatch, trouble: Callable[[pytest.MonkeyPatch], None]
) -> None:
    trouble(monkeypatch)

    def add_one(numbers: Any) -> None:
        carray(numbers, 1, dtype=np.int64)[0] += 1

    number = np.array([41])
    thread_team.call_together(_kept(add_one).address, number.ctypes.data)
    assert number[0] > 41


WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = None  # it is not there, or refuses this numpy: an ImportError
import torch
from crosschip.model import Decoder, ModelConfig
from tests.model.configs import random_model
decoder = Decoder(random_model(ModelConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2)), by_kernels=True)
zero = torch.tensor([0])
print(decoder.extend(torch.tensor([[5]]), zero, zero, decoder.new_cache(1, 32)).shape)
"""


def test_where_nothing_can_be_compiled_torch_s_operators_compute() -> None:
    made = subprocess.run([sys.executable, "-c", WITHOUT_NUMBA], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert "decode steps are not compiled" in made.stderr
    assert "[1, 1, 32]" in made.stdout


def test_another_default_dtype_changes_nothing() -> None:
    """transformers sets it for the whole process while it builds a model."""
    decoder = Decoder(random_model(CONFIG), by_kernels=True)
    expected = step(decoder, filled(decoder), [0, 1, 2, 3, 4])
    cache = filled(decoder)
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            found = step(decoder, cache, [0, 1, 2, 3, 4])
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(found, expected)


def test_a_position_beyond_the_cache_is_refused() -> None:
    decoder = Decoder(random_model(CONFIG), by_kernels=True)
    cache, zero = filled(decoder), torch.tensor([0])
    with pytest.raises(IndexError, match="position 64 is beyond the 64 of the cache"):
        decoder.extend(torch.tensor([[5]]), torch.tensor([64]), zero, cache)
