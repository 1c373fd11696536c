"""The experts that tokens took, recorded by the engine: a model that takes them again gives the engine's log-probs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from crosschip.errors import ServeError
from crosschip.model import Transformer, load_model, save_model
from crosschip.serve.engine.request import SamplingParams, TokenEvent
from tests.serve.conftest import make_model, tiny_config
from tests.serve.engine.engines import ids_of, logprobs_of, made_prompts, running

# fp32 sums in another order: some 1e-7 of logits of size 1 to 5.
CLOSE = 1e-5
ROOT = Path(__file__).parents[3]


def sampled(max_tokens: int, seed: int, **more: object) -> SamplingParams:
    return SamplingParams(max_tokens, seed=seed, num_logprobs=0, wants_routes=True, **more)  # type: ignore[arg-type]


def saved_model(directory: Path, num_experts: int, **changes: object) -> Path:
    fields: dict[str, object] = {"num_hidden_layers": 4, "n_routed_experts": num_experts, "initializer_range": 0.1}
    save_model(make_model(tiny_config(300, **(fields | changes)), seed=3), directory, torch.float32)
    return directory


@pytest.fixture(scope="module")
def few_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So few and small that all of them are computed."""
    return saved_model(tmp_path_factory.mktemp("few") / "model", 8)


@pytest.fixture(scope="module")
def many_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows are sorted by their experts; and the choice is among groups."""
    return saved_model(
        tmp_path_factory.mktemp("many") / "model", 20, n_group=4, topk_group=2, num_experts_per_tok=3,
        routed_scaling_factor=2.5,
    )  # fmt: skip


def replayed(model: Transformer, prompt: list[int], events: list[TokenEvent], add: int = 0) -> torch.Tensor:
    """The answer's log-probs by the training model with the recorded routes, each expert's number moved on by `add`."""
    ids = torch.tensor([prompt + ids_of(events)])
    assert events[-1].routes is not None
    assert events[-1].routes.shape[0] == ids.shape[1] - 1
    routes = (torch.from_numpy(events[-1].routes.astype(np.int64)) + add) % model.config.n_routed_experts
    with torch.no_grad():
        found = model.logprobs(ids[:, :-1], ids[:, 1:], routes=routes[None]).logprobs_BT[0]
    return found[len(prompt) - 1 :]


def assert_replayed(model: Transformer, prompt: list[int], events: list[TokenEvent]) -> None:
    told = torch.tensor(logprobs_of(events))
    assert len(told) > 0
    assert torch.allclose(replayed(model, prompt, events), told, atol=CLOSE, rtol=0)
    assert not torch.allclose(replayed(model, prompt, events, add=1), told, atol=100 * CLOSE, rtol=0), "the control"


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kind", ["few_experts", "few_experts sorted", "many_experts"])
def test_replay_gives_the_engines_log_probs(
    kind: str, deterministic: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = request.getfixturevalue(kind.removesuffix(" sorted"))
    if kind.endswith(" sorted"):
        monkeypatch.setattr("crosschip.model.feed_forward._FLOPS_OF_A_CALL", 0)
    model = load_model(directory)
    options = {"max_batch_size": 40, "max_model_len": 128, "deterministic": deterministic}
    with running(directory, record_routes=True, **options) as engine:
        prompts = made_prompts(5, 1, 70)
        handles = [engine.submit_all(prompt, [sampled(12, seed) for seed in range(8)]) for prompt in prompts]
        for prompt, siblings in zip(prompts, handles, strict=True):
            for handle in siblings:
                assert_replayed(model, prompt, list(handle))
        assert_replayed(model, [5], list(engine.submit([5], sampled(40, 1))))  # and one alone


def test_a_known_prefix_brings_its_routes_along(few_experts: Path) -> None:
    model = load_model(few_experts)
    with running(few_experts, record_routes=True, max_batch_size=2, max_model_len=256) as engine:
        prompt = made_prompts(1, 100, 101, seed=7)[0]
        missed = list(engine.submit(prompt, sampled(8, 1)))
        before = engine.load.prefix_tokens_found
        found = list(engine.submit(prompt, sampled(8, 1)))
        assert engine.load.prefix_tokens_found - before == 96
        assert_replayed(model, prompt, missed)
        assert_replayed(model, prompt, found)
        assert missed[-1].routes is not None
        assert found[-1].routes is not None
        assert (missed[-1].routes[:96] == found[-1].routes[:96]).all()
        chat = prompt + ids_of(missed) + made_prompts(1, 30, 31, seed=8)[0]
        assert_replayed(model, chat, list(engine.submit(chat, sampled(8, 2))))


@pytest.mark.parametrize("length", [1, 32, 33, 70])
def test_a_forks_copied_block_has_its_own_routes(few_experts: Path, length: int) -> None:
    model = load_model(few_experts)
    options = {"max_batch_size": 4, "max_model_len": 128, "cache_tokens": 512, "prefix_cache": False}
    with running(few_experts, record_routes=True, **options) as engine:
        (prompt,) = made_prompts(1, length, length + 1, seed=5)
        answers = [list(handle) for handle in engine.submit_all(prompt, [sampled(40, seed) for seed in range(4)])]
        for events in answers:
            assert_replayed(model, prompt, events)
        assert len({tuple(ids_of(events)) for events in answers}) == 4


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_a_preempted_requests_routes_are_right(few_experts: Path, prefix_cache: bool) -> None:
    model = load_model(few_experts)
    options = {"max_batch_size": 6, "max_model_len": 128, "cache_tokens": 160, "prefix_cache": prefix_cache}
    with running(few_experts, record_routes=True, **options) as small:
        prompts = made_prompts(8, 20, 40)
        handles = [small.submit(prompt, sampled(40, number)) for number, prompt in enumerate(prompts)]
        for prompt, handle in zip(prompts, handles, strict=True):
            assert_replayed(model, prompt, list(handle))
        assert small.load.preemptions > 0


def test_only_who_asks_gets_routes_and_a_scored_prompt_has_them_for_every_token(few_experts: Path) -> None:
    with running(few_experts, record_routes=True, max_batch_size=2, max_model_len=64) as engine:
        assert engine.info.records_routes
        events = list(engine.submit([5, 6, 7], SamplingParams(3, temperature=0.0)))
        assert all(event.routes is None for event in events)
        events = list(engine.submit([5, 6, 7], SamplingParams(3, temperature=0.0, wants_routes=True)))
        assert [event.routes is None for event in events] == [True, True, False]
        assert events[-1].routes is not None
        assert events[-1].routes.shape == (5, 3, 2)
        assert events[-1].routes.dtype == np.uint8
        (only,) = engine.submit([5, 6, 7], SamplingParams(0, num_prompt_logprobs=0, wants_routes=True))
        assert only.routes is not None
        assert only.routes.shape == (3, 3, 2)
        assert engine.update_weights(few_experts) == "2"
        assert list(engine.submit([5, 6, 7], SamplingParams(3, wants_routes=True)))[-1].routes is not None


def test_more_experts_than_a_byte_can_name(tmp_path: Path) -> None:
    directory = saved_model(tmp_path / "model", 300, num_hidden_layers=2, moe_intermediate_size=8)
    model = load_model(directory)
    with running(directory, record_routes=True, max_batch_size=2, max_model_len=64) as engine:
        events = list(engine.submit([5, 6, 7], sampled(30, 1)))
    assert events[-1].routes is not None
    assert events[-1].routes.dtype == np.int16
    assert events[-1].routes.max() > 255
    assert torch.allclose(replayed(model, [5, 6, 7], events), torch.tensor(logprobs_of(events)), atol=CLOSE, rtol=0)


def test_what_cannot_be_recorded_is_refused(few_experts: Path, tmp_path: Path) -> None:
    with running(few_experts, max_batch_size=1, max_model_len=64) as engine:
        with pytest.raises(ServeError, match="record_routes"):
            engine.submit([5], SamplingParams(1, wants_routes=True))
        assert engine._runner._cache.routes is None
    drafting = saved_model(tmp_path / "drafting", 4, num_nextn_predict_layers=1)
    with pytest.raises(ServeError, match="speculation"), running(drafting, record_routes=True, speculative=True):
        pass
    dense = saved_model(tmp_path / "dense", 4, first_k_dense_replace=4)
    with pytest.raises(ServeError, match="dense"), running(dense, record_routes=True):
        pass


ON_THE_SIMULATED_CHIP = """
import sys
from pathlib import Path
import torch
from crosschip.chips import find_chip
from crosschip.model import load_model
from tests.serve.engine.engines import logprobs_of, made_prompts, running
from tests.serve.engine.test_routes import assert_replayed, replayed, sampled

torch.set_num_threads(1)
directory = Path(sys.argv[1])
model = load_model(directory)
with running(directory, device="sim", record_routes=True, max_batch_size=3, max_model_len=96) as engine:
    for prompt in made_prompts(2, 20, 40):
        for handle in engine.submit_all(prompt, [sampled(6, seed) for seed in range(2)]):
            assert_replayed(model, prompt, list(handle))
"""


def test_the_simulated_chip_records(few_experts: Path) -> None:
    environment = os.environ | {"CROSSCHIP_SIM": "sim", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ON_THE_SIMULATED_CHIP, str(few_experts)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_all_answers_to_one_prompt_are_by_the_same_weights(few_experts: Path) -> None:
    """New weights wait for those that have no slot yet, if one of their siblings was begun."""
    with running(few_experts, record_routes=True, max_batch_size=2, max_model_len=2048) as engine:
        for in_flight, length in (("finish", 60), ("abort", 2000)):
            version = engine.info.weights_version
            handles = engine.submit_all([5, 6, 7], [SamplingParams(length, seed=seed) for seed in range(6)])
            next(iter(handles[0]))
            engine.update_weights(few_experts, in_flight=in_flight)  # type: ignore[arg-type]
            ended = [list(handle)[-1].finish_reason for handle in handles]
            assert ended == ["length" if in_flight == "finish" else "abort"] * 6
            assert {handle.weights_version for handle in handles} == {version}
