import json
from pathlib import Path

import pytest
import torch

from crosschip.errors import CheckpointError
from crosschip.model import ModelConfig, Transformer, init_weights, load_model
from crosschip.recipe import StageSettings
from crosschip.rundir import is_complete
from crosschip.train.checkpoint import CheckpointState, find_newest, library_versions, read_state, save_checkpoint
from crosschip.train.optimizer import build_optimizer


def new_model(**settings: object) -> Transformer:
    small = {"hidden_size": 32, "num_hidden_layers": 2, "n_routed_experts": 4, "kv_lora_rank": 16}
    model = Transformer(ModelConfig(vocab_size=64, **small, **settings))  # type: ignore[arg-type]
    init_weights(model, 0)
    return model


def save(directory: Path, step: int, keep: int = 2, model: Transformer | None = None) -> Path:
    model = model or new_model()
    state = CheckpointState(
        stage="pretrain",
        step=step,
        sequences_consumed=8 * step,
        tokens_consumed=256 * step,
        compute_dtype="float32",
        device="cpu",
        num_threads=1,
        fingerprints={"data": "d", "tokenizer": "t", "architecture": "a", "recipe_stage": "r"},
        settings={"data": {}, "tokenizer": {}, "model": {}, "stage": {}},
        versions=library_versions(),
    )
    optimizer = build_optimizer(model, StageSettings(steps=100))
    return save_checkpoint(directory, model, optimizer, state, keep)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "checkpoints").iterdir())


def test_a_checkpoint_is_a_model_directory_and_tells_where_it_stands(tmp_path) -> None:
    model = new_model()
    path = save(tmp_path, 20, model=model)
    assert path.name == "step-00000020"
    assert is_complete(path)
    state = read_state(path)
    assert (state.step, state.sequences_consumed, state.compute_dtype) == (20, 160, "float32")
    assert state.versions["torch"] == torch.__version__
    loaded = load_model(path)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_tied_embeddings_stay_tied(tmp_path) -> None:
    model = new_model(tie_word_embeddings=True)
    loaded = load_model(save(tmp_path, 1, model=model))
    assert loaded.config == model.config
    assert loaded.lm_head.weight is loaded.embed_tokens.weight


def test_the_newest_k_are_kept(tmp_path) -> None:
    for step in (5, 10, 100_000_000, 15):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-00000015", "step-100000000"]
    save(tmp_path, 200_000_000, keep=1)
    assert names(tmp_path) == ["step-200000000"]


def test_what_cannot_be_written_leaves_the_older_one(tmp_path, monkeypatch) -> None:
    older = save(tmp_path, 1)

    def full(*arguments: object, **keywords: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("crosschip.train.checkpoint.writing.write_json", full)
    with pytest.raises(CheckpointError, match=r"step 2 could not be written.*No space left"):
        save(tmp_path, 2, keep=1)
    assert names(tmp_path) == [older.name]
    assert find_newest(tmp_path, warn=pytest.fail) == older


def test_nothing_written_is_no_checkpoint(tmp_path) -> None:
    assert find_newest(tmp_path, warn=pytest.fail) is None


def test_damage_is_named_and_passed_over(tmp_path) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    (newer / "config.json").unlink()
    told: list[str] = []
    assert find_newest(tmp_path, told.append) == older
    assert len(told) == 1
    assert "step-00000002: config.json is missing" in told[0]


def test_a_newer_schema_is_refused_and_not_taken_for_damage(tmp_path) -> None:
    path = save(tmp_path, 1)
    document = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**document, "schema_version": 3}))
    with pytest.raises(CheckpointError, match="schema_version 3; this crosschip reads up to 2"):
        read_state(path)
