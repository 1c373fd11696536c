"""What a whole training leaves behind, and the ways to begin one."""

import json
from pathlib import Path

import pytest
import torch

from crosschip.chips import find_chip
from crosschip.data import load_tokenizer
from crosschip.errors import CheckpointError, ModelError
from crosschip.model import load_model, save_model
from crosschip.rundir import RunDirectory, atomic_directory, read_json
from crosschip.train import stages
from crosschip.train.checkpoint import read_state
from crosschip.train.group.world import Alone
from crosschip.train.guard.heartbeat import Heartbeat
from crosschip.train.guard.hook import GuardError
from crosschip.train.outer.alone import AloneGroup
from crosschip.train.progress import LineProgress
from crosschip.train.stage_making import Rank


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_metrics_validation_samples_events_and_checkpoints(uninterrupted) -> None:
    run = RunDirectory(uninterrupted)
    assert read_json(run.resolved_recipe)["train"]["steps"] == 10
    pretrain = run.stage("pretrain")
    metrics = lines(pretrain / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 11))
    assert {"loss", "gradient_norm", "tokens", "seconds", "learning_rate", "tokens_per_s", "mtp_loss"} < set(metrics[0])
    assert [line["step"] for line in lines(pretrain / "validation.jsonl")] == [3, 6, 9, 10]
    assert {line["step"] for line in lines(pretrain / "samples.jsonl")} == {6, 10}
    events = [line["event"] for line in lines(pretrain / "events.jsonl")]
    assert [event for event in events if event != "checkpoint-verified"] == ["started", "finished"]
    assert events.count("checkpoint-verified") == 3
    assert sorted(p.name for p in (pretrain / "checkpoints").iterdir()) == ["step-00000008", "step-00000010"]
    assert any((pretrain / "tensorboard").iterdir())
    vocab_size = load_tokenizer(run.tokenizer).vocab_size
    model = load_model(run.stage("sft") / "checkpoints/step-00000007")
    assert model.config.vocab_size % 64 == 0
    assert 0 <= model.config.vocab_size - vocab_size < 64


def test_fine_tuning_begins_where_pre_training_ended(uninterrupted) -> None:
    before = lines(uninterrupted / "train/pretrain/validation.jsonl")
    started = lines(uninterrupted / "train/sft/events.jsonl")[0]
    assert str(started["detail"]).endswith("pretrain/checkpoints/step-00000010")
    assert lines(uninterrupted / "train/sft/metrics.jsonl")[0]["loss"] < before[0]["validation_loss"] + 0.3  # type: ignore[operator]


def test_bits_per_byte_is_the_loss_in_other_units(uninterrupted) -> None:
    """A byte-level vocabulary has at least one byte a token, so bits per byte are at most bits per trained token."""
    for line in lines(uninterrupted / "train/pretrain/validation.jsonl"):
        bits_per_token = line["validation_loss"] / 0.6931471805599453  # type: ignore[operator]
        assert 0.3 * bits_per_token < line["bits_per_byte"] < 1.2 * bits_per_token  # type: ignore[operator]


def test_a_refused_recipe_is_not_recorded(tiny, train, uninterrupted) -> None:
    resolved = RunDirectory(uninterrupted).resolved_recipe
    with pytest.raises(CheckpointError, match="seed"):
        train(tiny("seed=5"), "uninterrupted", resume=True)
    assert read_json(resolved)["seed"] == 7
    train(tiny("sft.steps=8"), "uninterrupted", resume=True)
    assert read_json(resolved)["sft"]["steps"] == 8


def test_a_checkpoint_whose_replacement_was_killed_is_gone_on_from(tiny, train, uninterrupted) -> None:
    last = uninterrupted / "train/sft/checkpoints/step-00000007"
    last.rename(last.with_name(f".{last.name}.old"))
    assert train(tiny(), "uninterrupted", resume=True).already_complete


@pytest.mark.parametrize("size", [1, 2])
def test_an_interrupt_between_stages_never_waits_for_other_ranks(tiny, tmp_path, monkeypatch, size) -> None:
    """They may be in a collective, where nothing but this rank's end reaches them."""

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "_prepare", interrupted)
    rank = Rank(Alone(0, size), find_chip("cpu"), LineProgress(None), Heartbeat(None, 0, 600.0), None)
    arguments = (tiny(), RunDirectory(tmp_path), False, rank)
    if size > 1:
        with pytest.raises(KeyboardInterrupt):
            stages._train_stages(*arguments)
    else:
        assert stages._train_stages(*arguments).exit_code == 130


@pytest.fixture
def published(uninterrupted, tmp_path) -> Path:
    """A model directory with its tokenizer, as one downloads it."""
    directory = tmp_path / "published"
    checkpoint = uninterrupted / "train/sft/checkpoints/step-00000007"
    with atomic_directory(directory) as written:
        save_model(load_model(checkpoint), written)
        load_tokenizer(uninterrupted / "tokenizer").save(written)
    return directory


def test_a_published_directory_is_gone_on_with(tiny, train, published, tmp_path) -> None:
    recipe = tiny(f"model.directory={published}", "sft.steps=2").model_copy(update={"train": None})
    outcome = train(recipe, "further")
    assert [end.stage for end in outcome.stages] == ["sft"]
    run = RunDirectory(tmp_path / "further")
    assert load_tokenizer(run.tokenizer).fingerprint == load_tokenizer(published).fingerprint
    assert outcome.checkpoint is not None
    original, trained = load_model(published), load_model(outcome.checkpoint)
    assert original.config == trained.config
    moved = (original.lm_head.weight - trained.lm_head.weight).abs().max()
    assert 0 < moved < 0.02, "two steps away from the published weights, not from new ones"


def test_a_published_model_that_is_too_small_is_refused(tiny, train, published) -> None:
    recipe = tiny(f"model.directory={published}", "model.max_position_embeddings=512", "train.seq_len=200")
    with pytest.raises(ModelError, match=r"seq_len=200 is more than the max_position_embeddings=160"):
        train(recipe, "long")


def test_fine_tuning_alone_can_begin_with_new_weights(tiny, train, capsys) -> None:
    outcome = train(tiny("sft.steps=2").model_copy(update={"train": None}), "alone")
    assert outcome.stages[0].step == 2
    assert "new weights from seed 7" in capsys.readouterr().err


def test_a_stage_can_have_its_own_data(tiny, train, tmp_path) -> None:
    own = ("sft.data.source=arithmetic", "sft.data.levels=[2]", "sft.data.num_problems=600")
    outcome = train(tiny("train.steps=3", "sft.steps=2", *own), "own")
    assert [end.step for end in outcome.stages] == [3, 2]
    first, second = (read_state(end.checkpoint) for end in outcome.stages)
    assert (first.settings["data"]["levels"], second.settings["data"]["levels"]) == ([1], [2])
    assert first.fingerprints["data"] != second.fingerprints["data"]
    assert first.fingerprints["tokenizer"] == second.fingerprints["tokenizer"]


def test_tied_embeddings_resume_bit_exactly(tiny, train, same_runs, train_with_signal) -> None:
    tied = ("model.tie_word_embeddings=true", "train.steps=6", "sft.steps=2")
    train(tiny(*tied), "whole")
    train_with_signal(tiny(*tied), "parts", "pretrain", 3, 2)
    train(tiny(*tied), "parts", resume=True)
    same_runs("whole", "parts")


def test_divergence_stops_by_name_after_every_remedy_and_keeps_a_checkpoint(tiny, train, tmp_path) -> None:
    recipe = tiny("train.learning_rate=1e30", "train.warmup_steps=0", "train.checkpoint_every=1", "train.steps=40")
    with pytest.raises(GuardError, match=r"step \d+: non-finite: loss"):
        train(recipe, "diverged")
    stage = tmp_path / "diverged/train/pretrain"
    events = [line for line in lines(stage / "events.jsonl") if line["event"] == "non-finite"]
    actions = " ".join(str(event["action"]) for event in events)
    assert all("the replay gave the same" in str(event["detail"]) for event in events)
    for remedy in ("skipped the batch", "rolled back"):
        assert remedy in actions, actions
    assert str(events[-1]["action"]).startswith("stopped")
    assert any((stage / "checkpoints").iterdir())
    assert not (tmp_path / "diverged/lock.json").exists()


def test_groups_are_told_which_steps_were_skipped(tiny, train, tmp_path, monkeypatch) -> None:
    told: list[bool] = []
    monkeypatch.setattr(AloneGroup, "after_update", lambda self, num_tokens, updated: told.append(updated))
    recipe = tiny("train.learning_rate=1e30", "train.warmup_steps=0", "train.checkpoint_every=1", "train.steps=40")
    with pytest.raises(GuardError):
        train(recipe, "skipped")
    events = lines(tmp_path / "skipped/train/pretrain/events.jsonl")
    assert told.count(False) == sum(str(event["action"]).startswith("skipped") for event in events) > 0
    assert any(told)


def test_the_loss_falls(tiny, train, tmp_path) -> None:
    recipe = tiny("train.steps=60", "train.learning_rate=1e-2", "train.validate_every=60").model_copy(
        update={"sft": None}
    )
    train(recipe, "longer")
    losses = [line["loss"] for line in lines(tmp_path / "longer/train/pretrain/metrics.jsonl")]
    assert sum(losses[-5:]) / 5 < losses[0] - 1.5  # type: ignore[arg-type, operator]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_an_accelerator_resumes_bit_exactly(tiny, train, same_runs, train_with_signal) -> None:
    recipe = tiny("train.dtype=bfloat16", "sft.dtype=bfloat16")
    train(recipe, "whole")
    train_with_signal(recipe, "parts", "pretrain", 5, 2)
    train(recipe, "parts", resume=True)
    same_runs("whole", "parts")
