"""Steps of one token a row, by compiled kernels, against the same steps by torch's operators."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crosschip.model import Decoder, ModelConfig, row_kernels
from crosschip.model.latent_cache import LatentCache
from tests.model.configs import configs, random_model

CONFIG = ModelConfig(vocab_size=97, hidden_size=32, num_hidden_layers=3, max_position_embeddings=256)
LENGTHS = (40, 1, 63, 32, 7)


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


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(config=configs(), slots=st.permutations(range(5)), num=st.integers(1, 5))
def test_a_step_by_kernels_is_the_step_by_operators(config: ModelConfig, slots: list[int], num: int) -> None:
    model = random_model(replace(config, max_position_embeddings=64))
    plain, fast = Decoder(model), Decoder(model, by_kernels=True)
    caches = filled(plain, record_routes=True), filled(fast, record_routes=True)
    expected, found = step(plain, caches[0], slots[:num]), step(fast, caches[1], slots[:num])
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


def test_kernels_are_what_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above would hold as well if both were the same way."""
    model = random_model(CONFIG)
    plain, fast = Decoder(model), Decoder(model, by_kernels=True)
    caches = filled(plain), filled(fast)
    monkeypatch.setattr(row_kernels, "attend", lambda *arguments: arguments[-1].fill(0.0))
    assert not torch.allclose(step(fast, caches[1], [0, 1]), step(plain, caches[0], [0, 1]), rtol=1e-2)


def test_a_row_has_the_same_bits_in_any_company() -> None:
    x = torch.randn(9, CONFIG.hidden_size, generator=torch.Generator().manual_seed(5)).numpy()
    whole, alone = np.empty_like(x), np.empty_like(x[:1])
    row_kernels.normalise(x, 1e-6, whole)
    for row in range(9):
        row_kernels.normalise(x[row : row + 1], 1e-6, alone)
        assert alone.tobytes() == whole[row : row + 1].tobytes()
    size = 2 * CONFIG.moe_intermediate_size
    gate_up, active = np.repeat(x[:, :size], 2, 1), np.empty((9, size), np.float32)
    row_kernels.gate(gate_up, np.empty((9, 0), np.float32), 0, active)
    row_kernels.gate(gate_up[4:5], np.empty((1, 0), np.float32), 0, active[:1])
    assert active[0].tobytes() == active[4].tobytes()


def test_what_is_not_finite_stays_in_its_row() -> None:
    decoder = Decoder(random_model(CONFIG), by_kernels=True)
    cache = filled(decoder)
    sound = step(decoder, filled(decoder), [0, 1, 2])
    cache.rows[1][cache.tables_SW[1][0] * 32] = torch.nan
    found = step(decoder, cache, [0, 1, 2])
    assert not found[1].isfinite().any()
    assert torch.equal(found[[0, 2]], sound[[0, 2]])


def test_an_expert_that_nobody_chose_is_not_looked_at() -> None:
    gate_up, share = np.full((1, 8), np.inf, np.float32), np.array([[0.0, 1.0]], np.float32)
    gate_up[0, 2:4] = gate_up[0, 6:8] = 1.0
    active = np.empty((1, 4), np.float32)
    row_kernels.gate(gate_up, share, 2, active)
    expected = 1 / (1 + np.exp(-1.0))
    assert np.allclose(active, [[0.0, 0.0, expected, expected]], rtol=1e-6)


def test_gates_of_every_size_are_those_of_torch() -> None:
    values = torch.cat((torch.linspace(-120, 120, 100_001), torch.tensor([0.0, -0.0, 3e38, -3e38])))
    gate_up = torch.stack((values, torch.ones_like(values))).flatten()[None].numpy()
    active = np.empty((1, len(values)), np.float32)
    row_kernels.gate(gate_up, np.empty((1, 0), np.float32), 0, active)
    expected = torch.nn.functional.silu(values.double())
    error = (torch.from_numpy(active[0]).double() - expected).abs()
    assert (error <= 4e-7 * expected.abs() + 2e-36).all()


def test_other_dtypes_wide_attention_and_large_layers_go_another_way() -> None:
    assert Decoder(random_model(CONFIG), torch.bfloat16, by_kernels=True)._row_step is None
    wide = replace(CONFIG, num_attention_heads=64, kv_lora_rank=64)
    assert Decoder(random_model(wide), by_kernels=True)._row_step is None
    large = replace(CONFIG, hidden_size=512, intermediate_size=4096, first_k_dense_replace=3)
    assert Decoder(random_model(large), by_kernels=True)._row_step is None


def test_long_rows_are_computed_by_products_unless_each_is_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crosschip.model.row_step._MOST_WORK", 1.0)
    decoder = Decoder(random_model(CONFIG), by_kernels=True)
    cache = filled(decoder)
    expected = step(Decoder(random_model(CONFIG)), filled(Decoder(random_model(CONFIG))), [4, 0, 2])
    monkeypatch.setattr(row_kernels, "attend", lambda *arguments: arguments[-1].fill(0.0))
    assert torch.allclose(step(decoder, cache, [4, 0, 2]), expected, rtol=1e-4, atol=1e-4)
    cache.by_row = True
    assert not torch.allclose(step(decoder, cache, [4, 0, 2]), expected, rtol=1e-2)


WITHOUT_A_PLACE = """
import numba.core.caching
numba.core.caching.CacheImpl._locator_classes = []
import numpy
from crosschip.model import row_kernels
x = numpy.full((1, 4), 3.0, numpy.float32)
row_kernels.normalise(x, 0.0, x)
assert (x == 1.0).all(), x
"""


def test_without_a_place_for_the_cache_kernels_are_compiled_each_time() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_A_PLACE], check=True)
