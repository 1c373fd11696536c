"""The exported directory is complete for other engines: transformers loads it whole and answers the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from crosschip.data import Message, train_tokenizer
from crosschip.errors import RunDirectoryError
from crosschip.handoff import export_hf
from crosschip.handoff.export import export_model
from crosschip.handoff.source import open_source
from crosschip.handoff.targets import TARGETS
from crosschip.model import Decoder, ModelConfig, generate, load_model, save_model
from crosschip.recipe import Recipe, parse_recipe
from crosschip.rundir import RunDirectory, atomic_directory
from tests.model.configs import random_model

PROMPTS = ["What is 12 + 7?", "Was ist größer, 3 oder 4?", "x"]


def recipe(**handoff: str) -> Recipe:
    stage = {"steps": 100, "seq_len": 32}
    document = {"name": "t", "data": {"source": "arithmetic"}, "train": stage, "handoff": handoff}
    return parse_recipe(document, "test")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    tokenizer = train_tokenizer([*PROMPTS, "1 + 2 = 3 so the answer is 3."] * 20, 300)
    with atomic_directory(run.tokenizer) as directory:
        tokenizer.save(directory)
    config = ModelConfig(
        vocab_size=384,
        hidden_size=32,
        num_hidden_layers=2,
        q_lora_rank=16,
        tie_word_embeddings=True,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )
    for step in (5, 10):
        with atomic_directory(run.stage("pretrain") / "checkpoints" / f"step-{step:08d}") as directory:
            save_model(random_model(config, seed=step), directory)
    return run


def test_transformers_loads_the_export_and_answers_the_same_greedily(run: RunDirectory) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    directory = export_hf(run, recipe())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    decoder = Decoder(load_model(directory))
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        expected = theirs.generate(torch.tensor([ids]), max_new_tokens=24)[0, len(ids) :].tolist()
        assert theirs.generation_config.do_sample is False
        assert generate(decoder, [ids], 24, {tokenizer.eos_token_id}) == [expected]


def test_the_newest_checkpoint_leaves_with_tokenizer_and_hashes(run: RunDirectory) -> None:
    directory = export_hf(run, recipe())
    newest = load_model(run.stage("pretrain") / "checkpoints" / "step-00000010")
    assert torch.equal(load_model(directory).lm_head.weight, newest.lm_head.weight)
    record = json.loads((directory / "handoff.json").read_text())
    assert record["checkpoint"].endswith("step-00000010")
    files = {path.name for path in directory.iterdir()}
    assert set(record["sha256"]) == files - {"handoff.json", "COMPLETE"}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= files


def test_bfloat16_export_rounds_weights_and_keeps_router_biases(run: RunDirectory) -> None:
    model = load_model(export_hf(run, recipe(dtype="bfloat16")))
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.routers()[0].e_score_correction_bias.dtype == torch.float32


def test_a_run_without_a_finished_checkpoint_is_refused_and_nothing_is_left(tmp_path: Path, run: RunDirectory) -> None:
    empty = RunDirectory(tmp_path / "empty")
    with pytest.raises(RunDirectoryError, match="no complete checkpoint of its last stage, pretrain"):
        export_hf(empty, recipe())
    for checkpoint in (run.stage("pretrain") / "checkpoints").iterdir():
        (checkpoint / "COMPLETE").unlink()
    with pytest.raises(RunDirectoryError, match="no complete checkpoint"):
        export_hf(run, recipe())
    assert not run.handoff("hf").exists()


def test_a_directory_of_something_else_is_not_overwritten(run: RunDirectory, tmp_path: Path) -> None:
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("ten years")
    with pytest.raises(RunDirectoryError, match="not an export"):
        export_hf(run, recipe(), other)
    assert (other / "thesis.txt").read_text() == "ten years"


def test_messages_keep_their_reasoning_in_the_exported_template(run: RunDirectory) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(export_hf(run, recipe()))
    messages = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "reasoning_content": "one more than one", "content": "2"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert "<think>one more than one</think>2" in text
    assert Message("user", "1 + 1?").content in text


@pytest.mark.parametrize("what", ["manifest.json", "tokenizer.json", "model.safetensors"])
def test_what_is_complete_and_no_export_is_not_replaced(run: RunDirectory, tmp_path: Path, what: str) -> None:
    """A golden bundle, a tokenizer and a checkpoint end with COMPLETE as well."""
    with atomic_directory(tmp_path / "mine") as directory:
        (directory / what).write_text("months of work")
    with pytest.raises(RunDirectoryError, match=r"is not an export of crosschip: it has no handoff\.json"):
        export_hf(run, recipe(), tmp_path / "mine")
    assert (tmp_path / "mine" / what).read_text() == "months of work"


def test_an_older_export_is_replaced(run: RunDirectory, tmp_path: Path) -> None:
    export_hf(run, recipe(), tmp_path / "mine")
    (tmp_path / "mine" / "surplus").touch()
    assert not (export_hf(run, recipe(), tmp_path / "mine") / "surplus").exists()


def test_files_of_a_killed_conversion_to_another_target_are_not_published(run: RunDirectory, tmp_path: Path) -> None:
    partial = tmp_path / ".mine.partial"
    partial.mkdir()
    (partial / ".conversion.json").write_text('{"identity": {}, "sha256": {"model-00001-of-00037.safetensors": "x"}}')
    (partial / "model-00001-of-00037.safetensors").write_text("of another model")
    (partial / "old").mkdir()
    source = open_source(run.path)
    path = export_model(source, TARGETS["gguf"], tmp_path / "mine", "float32")
    expected = {
        "model.gguf",
        "config.json",
        "generation_config.json",
        "not_in_the_file.json",
        "handoff.json",
        "COMPLETE",
    }
    assert {each.name for each in path.iterdir()} == expected | {each.name for each in source.tokenizer_files}


@pytest.mark.parametrize("target", ["hf", "w8a8", "gguf"])
def test_python_files_that_are_not_exported_are_not_named(run: RunDirectory, tmp_path: Path, target: str) -> None:
    model = export_hf(run, recipe(), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    (model / "config.json").write_text(json.dumps(config))
    path = export_model(open_source(model), TARGETS[target], tmp_path / target)
    assert "auto_map" not in json.loads((path / "config.json").read_text())


@pytest.mark.parametrize("out", [".", "../mine/sub/.."])
def test_a_place_without_a_name_is_the_place_that_it_means(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    export_hf(run, recipe(), tmp_path / "mine")
    (tmp_path / "mine" / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert export_hf(run, recipe(), Path(out)) == tmp_path / "mine"
    assert not (tmp_path / "mine" / "sub").exists(), "replaced whole"


def test_a_link_to_an_older_export_stays_and_leads_to_the_new_one(run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    export_hf(run, recipe(), tmp_path / "disk" / "v1")
    (tmp_path / "disk" / "v1" / "surplus").touch()
    link = tmp_path / "served"
    link.symlink_to(tmp_path / "disk" / "v1")
    export_hf(run, recipe(), link)
    assert link.is_symlink()
    assert (link / "handoff.json").is_file()
    assert not (link / "surplus").exists()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["v1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "run", "served"]


def test_a_run_that_is_named_relative_to_it_says_the_same_of_its_checkpoint(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    record = json.loads((export_hf(RunDirectory(Path("run")), recipe()) / "handoff.json").read_text())
    assert record["checkpoint"] == "train/pretrain/checkpoints/step-00000010"
