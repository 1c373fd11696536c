"""Long work of rank 0 before the first step is no hang, neither of rank 0 nor of those that wait for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from crosschip.data import Message, Row
from crosschip.model import ModelConfig
from crosschip.recipe import parse_recipe
from crosschip.train import distil_stage, stage_making, stages
from crosschip.train.group.waiting import made_by_rank_zero, rank_zero_begins
from crosschip.train.group.world import ALONE, Alone
from crosschip.train.guard.heartbeat import Beat, Heartbeat, read_beats
from crosschip.train.preparation import obtain_tokenizer
from crosschip.train.progress import LineProgress
from crosschip.train.rl.problems import Problems

ALLOWED_S = 10.0
NOTHING: Any = None


@pytest.fixture
def heartbeat(tmp_path: Path) -> Heartbeat:
    """One of a stage whose steps are fast, and whose end is being saved."""
    beating = Heartbeat(tmp_path / "heartbeat-0", 0, ALLOWED_S, slack_s=0.0)
    beating.stage("sft")
    for step in range(5):
        beating.beat("save", step)
    return beating


def beat_of(directory: Path) -> Beat:
    (beat,) = read_beats(directory)
    return beat


def rank_of(heartbeat: Heartbeat) -> stage_making.Rank:
    chip: Any = SimpleNamespace(name="cpu")
    return stage_making.Rank(ALONE, chip, LineProgress(None), heartbeat, None)


def test_who_waits_for_rank_zero_may_be_silent_for_longer_than_rank_zero(tmp_path: Path, heartbeat: Heartbeat) -> None:
    assert beat_of(tmp_path).allowance_s < ALLOWED_S
    for rank, least_s, most_s in ((0, ALLOWED_S, ALLOWED_S), (1, 86_400.0, float("inf"))):
        beat = made_by_rank_zero(Alone(rank, 2), heartbeat, lambda: beat_of(tmp_path))
        assert least_s <= beat.allowance_s <= most_s
        assert beat_of(tmp_path).allowance_s == ALLOWED_S, "it has been waited for"
        with rank_zero_begins(Alone(rank, 2), heartbeat):
            assert beat_of(tmp_path).allowance_s == ALLOWED_S, "it has been waited for"


def test_rejection_sampling_beats_with_every_line_and_token(tmp_path: Path, heartbeat: Heartbeat, monkeypatch) -> None:
    seen: list[Beat] = []

    def distill(*arguments: Any, **settings: Any) -> None:
        for beat in (lambda: arguments[5]("some answers"), settings["beat"], settings["beat"]):
            beat()
            seen.append(beat_of(tmp_path))

    monkeypatch.setattr(distil_stage, "distill", distill)
    monkeypatch.setattr(distil_stage, "training_problems", lambda *arguments: [])
    monkeypatch.setattr(distil_stage, "time_limit_s", lambda recipe: 1.0)
    recipe: Any = SimpleNamespace(rl=None, data=None, seed=0, chips=SimpleNamespace(serve="auto"))
    run: Any = SimpleNamespace(distilled=lambda name: tmp_path / "own.jsonl")
    rank = rank_of(heartbeat)
    assert distil_stage.distil_stage("own", NOTHING, tmp_path, recipe, run, NOTHING, rank)
    assert len({beat.num_beats for beat in seen}) == 3
    assert {beat.allowance_s for beat in seen} == {ALLOWED_S}


def test_preparing_data_beats_with_every_batch(tmp_path: Path, heartbeat: Heartbeat, monkeypatch) -> None:
    seen: list[int] = []

    def prepare(*arguments: Any) -> Any:
        for _ in range(3):
            arguments[5](1000)
            seen.append(beat_of(tmp_path).num_beats)
        stream = SimpleNamespace(notes=[], check=check)
        return SimpleNamespace(train=stream, validation=stream)

    def check(beat: Callable[[], None]) -> None:
        beat()
        seen.append(beat_of(tmp_path).num_beats)

    monkeypatch.setattr(stage_making, "pretraining_data", prepare)
    sources = SimpleNamespace(of=lambda settings: None)
    recipe = SimpleNamespace(seed=0)
    run: Any = SimpleNamespace(
        rank=rank_of(heartbeat), sources=sources, tokenizer=None, directory=tmp_path, recipe=recipe
    )
    stage_making._prepare_data(run, "pretrain", NOTHING)
    assert len(set(seen)) == 5


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_zero_alone_hashes_the_data_and_beats(tmp_path: Path, heartbeat: Heartbeat, rank: int) -> None:
    seen: list[int] = []

    def find_digests(beat: Callable[[], None]) -> list[str]:
        assert rank == 0
        for _ in range(3):
            beat()
            seen.append(beat_of(tmp_path).num_beats)
        return ["hash"]

    class FromRankZero(Alone):
        def from_rank_zero(self, make: Callable[[], Any]) -> Any:
            return make() if rank == 0 else ["hash"]

    recipe = parse_recipe({"name": "x", "data": {}, "train": {"steps": 100}}, "x")
    taken: list[list[str]] = []
    source = SimpleNamespace(find_digests=find_digests, take_digests=taken.append, fingerprint="f")
    run: Any = SimpleNamespace(
        rank=replace(rank_of(heartbeat), world=FromRankZero(rank, 2)),
        recipe=recipe,
        config=ModelConfig(vocab_size=64),
        tokenizer=SimpleNamespace(fingerprint="t"),
        sources=SimpleNamespace(of=lambda settings: source, settings=lambda settings: recipe.data),
    )
    assert recipe.train is not None
    stages._identity(run, recipe.train, None)
    assert taken == [["hash"]]
    assert len(set(seen)) == (3 if rank == 0 else 0)


def test_reading_problems_beats() -> None:
    row = Row(messages=(Message("user", "What is 2 + 3?"), Message("assistant", "5")))
    source: Any = SimpleNamespace(rows=lambda split: [row] * 5)
    tokenizer: Any = SimpleNamespace(encode_chat=lambda messages, add_generation_prompt: [1, 2, 3])
    beats: list[None] = []
    assert len(Problems(source, tokenizer, 3, 0, lambda: beats.append(None))) == len(beats) == 5


def test_reading_texts_for_the_tokenizer_beats(tmp_path: Path) -> None:
    texts = [SimpleNamespace(as_text=lambda: "some words to learn from")] * 5
    source: Any = SimpleNamespace(rows=lambda split: texts)
    recipe: Any = SimpleNamespace(
        tokenizer=SimpleNamespace(directory=None, vocab_size=300), model=SimpleNamespace(directory=None)
    )
    run: Any = SimpleNamespace(tokenizer=tmp_path / "tokenizer")
    beats: list[None] = []
    obtain_tokenizer(recipe, run, [source], False, LineProgress(None), lambda: beats.append(None))
    assert len(beats) == len(texts)
