"""A drafted second token changes the speed and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from crosschip.errors import ServeError
from crosschip.model import Decoder, load_model, save_model
from crosschip.serve.engine.chosen import ChosenToken
from crosschip.serve.engine.engine import Engine
from crosschip.serve.engine.request import Request, SamplingParams
from crosschip.serve.engine.speculation import Speculation
from tests.serve.conftest import make_model, tiny_config
from tests.serve.engine.engines import Forward, greedy, ids_of, logprobs_of, running

VOCAB = 12  # so few that a module that never learned is right now and then
OPTIONS: dict[str, Any] = {"max_batch_size": 16, "max_model_len": 256, "cache_tokens": 1024}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("weights") / "predicting"
    config = tiny_config(VOCAB, initializer_range=0.2, num_nextn_predict_layers=1)
    save_model(make_model(config, 3), made, torch.float32)
    return made


@pytest.fixture(scope="module")
def engine(directory: Path) -> Iterator[Engine]:
    with running(directory, speculative=True, **OPTIONS) as made:
        yield made


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 80, (count,), generator=generator).tolist()
    return [torch.randint(0, VOCAB, (size,), generator=generator).tolist() for size in sizes]


def test_the_draft_is_that_of_the_training_model(directory: Path) -> None:
    model = load_model(directory)
    decoder = Decoder(model)
    ids = torch.randint(0, VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        state = model._hidden(ids, torch.float32, [])
        embedded = model.embed_tokens(ids[:, 1:])
        expected = model.lm_head(model.mtp[0](state[:, :-1], embedded, model._rope(19, ids.device), []))
    cache = decoder.new_cache(2, 32, drafts=True)
    slots = torch.arange(2)
    hidden = decoder.extend(ids, torch.zeros(2, dtype=torch.int64), slots, cache)
    found = []
    for first, last in ((0, 9), (9, 10), (10, 17), (17, 19)):
        starts = torch.full((2,), first)
        found.append(decoder.draft(ids[:, first + 1 : last + 1], hidden[:, first:last], starts, slots, cache))
    drafted = decoder.logits(torch.cat(found, dim=1))
    assert torch.allclose(drafted, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_greedy_answers_are_the_models_and_come_faster(engine: Engine, directory: Path) -> None:
    forward = Forward(directory)
    before = engine.load
    handles = [engine.submit(prompt, greedy(40)) for prompt in prompts(8)]
    for prompt, handle in zip(prompts(8), handles, strict=True):
        events = list(handle)
        assert len(ids_of(events)) == 40
        assert len(logprobs_of(events)) == 40
        forward.assert_greedy(prompt, events)
    drafts, right = engine.load.drafts - before.drafts, engine.load.drafts_right - before.drafts_right
    assert 0 < right < drafts, "some were right and some wrong, so both ways were taken"
    assert engine.load.free_blocks == engine.load.num_blocks


def test_drafts_taken_unseen_would_be_noticed(engine: Engine, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: whoever believes the module does not say what the model says."""
    run = Speculation.run

    def believe(self: Speculation, decoder: Decoder, requests: Sequence[Request]) -> list[ChosenToken]:
        drafted = self._draft(decoder, requests).tolist()
        scores = [choice.score for choice in run(self, decoder, requests)[: len(requests)]]
        rows = zip(requests, drafted, scores, strict=True)
        believed = [ChosenToken(request, token, True, score) for request, token, score in rows]
        for request in requests:
            self._pending[request.slot].state_TD = self._pending[request.slot].state_TD[:1]
        return believed

    monkeypatch.setattr(Speculation, "run", believe)
    prompt = prompts(1, seed=5)[0]
    with pytest.raises(AssertionError):
        Forward(directory).assert_greedy(prompt, list(engine.submit(prompt, greedy(20))))


def test_a_seed_draws_the_same_tokens_with_and_without_drafts(engine: Engine, directory: Path) -> None:
    ways = [
        SamplingParams(30, seed=1),
        SamplingParams(30, seed=2, temperature=0.6, top_p=0.8),
        SamplingParams(30, seed=3, frequency_penalty=1.0),
        SamplingParams(30, seed=4, min_p=0.2, stop_ids=frozenset({3})),
        SamplingParams(1, seed=5),
    ]
    with running(directory, **OPTIONS) as plain:
        for prompt in prompts(4, seed=2):
            for params in ways:
                expected = ids_of(list(plain.submit(prompt, params)))
                assert ids_of(list(engine.submit(prompt, params))) == expected


def test_sampled_tokens_follow_the_models_distribution(engine: Engine, directory: Path) -> None:
    model, prompt, count = load_model(directory), [1, 5, 2], 1200
    with torch.no_grad():
        first = torch.softmax(model.forward(torch.tensor([prompt]))[0, -1], -1)
        pairs = torch.tensor([[*prompt, one, other] for one in range(VOCAB) for other in range(VOCAB)])
        after = torch.softmax(model.forward(pairs), -1)
        joint = first[:, None] * after[::VOCAB, 3]  # of the first token and the second
        second, third = joint.sum(0), joint.flatten() @ after[:, 4]
    before = engine.load.drafts_right
    handles = [engine.submit(prompt, SamplingParams(3, seed=seed)) for seed in range(count)]
    answers = torch.tensor([ids_of(list(handle)) for handle in handles])
    assert engine.load.drafts_right > before
    for place, expected in ((0, first), (1, second), (2, third)):  # the third is a right draft's second token
        shares = torch.bincount(answers[:, place], minlength=VOCAB) / count
        tolerance = 5 * torch.sqrt(expected * (1 - expected) / count)  # five standard deviations of a binomial share
        assert ((shares - expected).abs() <= tolerance).all()
        assert not ((shares - expected.flip(0)).abs() <= tolerance).all()


def test_preemption_siblings_and_the_end_of_the_model(directory: Path) -> None:
    forward = Forward(directory)
    options: dict[str, Any] = {"max_batch_size": 4, "max_model_len": 96, "cache_tokens": 128}
    with running(directory, speculative=True, **options) as small:
        many = [prompt[:50] for prompt in prompts(6, seed=4)]
        handles = [handle for p in many for handle in small.submit_all(p, [greedy(96 - len(p)), greedy(3)])]
        for number, handle in enumerate(handles):
            prompt = many[number // 2]
            events = list(handle)
            assert len(ids_of(events)) == handle.request.params.max_tokens
            forward.assert_greedy(prompt, events)
        assert small.load.preemptions > 0
        assert small.load.free_blocks == small.load.num_blocks


def test_what_cannot_be_is_refused(random_dir: Path, directory: Path) -> None:
    with pytest.raises(ServeError, match="num_nextn_predict_layers"), running(random_dir, speculative=True):
        pass
    with pytest.raises(ServeError, match="deterministic"), running(directory, speculative=True, deterministic=True):
        pass
