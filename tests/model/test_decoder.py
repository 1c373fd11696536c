from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings

from crosschip.model import Decoder, ModelConfig, generate
from tests.model.configs import configs, random_model

CONFIG = ModelConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, max_position_embeddings=64)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(config=configs())
def test_decoding_in_pieces_gives_the_logits_of_the_whole(config: ModelConfig) -> None:
    model = random_model(config)
    ids = torch.randint(0, 97, (3, 20), generator=torch.Generator().manual_seed(1))
    whole = model(ids).detach()
    decoder = Decoder(model)
    cache = decoder.new_cache(num_slots=5, max_len=32)
    slots, done = torch.tensor([4, 0, 2]), 0
    for piece in (7, 5, 1, 1, 6):
        hidden = decoder.extend(ids[:, done : done + piece], torch.full((3,), done), slots, cache)
        expected = whole[:, done : done + piece]
        assert torch.allclose(decoder.logits(hidden), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
        done += piece


def test_rows_of_unequal_length_do_not_see_each_other_or_their_padding() -> None:
    model = random_model(CONFIG)
    ids = torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(2))
    decoder = Decoder(model)
    cache = decoder.new_cache(2, 32)
    slots = torch.tensor([0, 1])
    padded = ids[:, :10].clone()
    padded[1, 4:] = 0  # row 1 has 4 tokens, the rest is padding
    decoder.extend(padded, torch.zeros(2, dtype=torch.int64), slots, cache)
    hidden = decoder.extend(torch.stack((ids[0, 10:11], ids[1, 4:5])), torch.tensor([10, 4]), slots, cache)
    for row, length in ((0, 11), (1, 5)):
        expected = model(ids[row : row + 1, :length])[0, -1]
        assert torch.allclose(decoder.logits(hidden)[row, 0], expected, rtol=1e-4, atol=1e-4)


def test_greedy_answers_are_those_of_the_slow_way_and_stop() -> None:
    model = random_model(CONFIG)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11]]
    answers = generate(Decoder(model), prompts, 12, stop_ids=set())
    for prompt, answer in zip(prompts, answers, strict=True):
        sequence = list(prompt)
        for _ in range(12):
            sequence.append(int(model(torch.tensor([sequence]))[0, -1].argmax()))
        assert answer == sequence[len(prompt) :]
    stop = answers[0][4]
    stopped = generate(Decoder(model), prompts, 12, stop_ids={stop})
    assert stopped[0] == answers[0][: answers[0].index(stop) + 1]


def test_dense_and_sorted_experts_agree(monkeypatch) -> None:
    model = random_model(CONFIG)
    ids = torch.randint(0, 97, (8, 3))
    results = []
    monkeypatch.setattr("crosschip.model.feed_forward._FLOPS_OF_A_CALL", 0)
    for limit in (0, 64):
        monkeypatch.setattr("crosschip.model.feed_forward._DENSE_EXPERT_TOKENS", limit)
        decoder = Decoder(model)
        cache = decoder.new_cache(8, 8)
        results.append(decoder.extend(ids, torch.zeros(8, dtype=torch.int64), torch.arange(8), cache))
    assert not torch.equal(*results)  # two ways indeed
    assert torch.allclose(*results, rtol=1e-4, atol=1e-5)
