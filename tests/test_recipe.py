"""The recipe: what is accepted, and that each fault names the key, the value and the remedy."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosschip.errors import RecipeError
from crosschip.recipe import Recipe, load_recipe, parse_recipe

ROOT = Path(__file__).parent.parent
SMALLEST = 'name = "small"\n[data]\nsource = "arithmetic"\n[train]\nsteps = 100\n'


@pytest.fixture
def smallest(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SMALLEST)
    return path


def load_text(tmp_path: Path, text: str, *overrides: str) -> Recipe:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return load_recipe(path, list(overrides))


def test_the_smallest_recipe_gets_its_defaults(smallest: Path) -> None:
    recipe = load_recipe(smallest)
    assert recipe.train is not None
    assert (recipe.name, recipe.seed, recipe.train.steps, recipe.train.batch_size) == ("small", 0, 100, 16)
    assert recipe.sft is None


def test_a_resolved_recipe_is_read_back_equal(smallest: Path) -> None:
    recipe = load_recipe(smallest, ["train.learning_rate=3e-4", "chips.train=cuda:1"])
    assert parse_recipe(recipe.model_dump(mode="json"), "resolved.json") == recipe


@pytest.mark.parametrize("stage", ["train", "sft", "rl"])
def test_how_long_a_sequence_may_be_a_directory_of_the_model_says_itself(stage: str) -> None:
    document: dict[str, object] = {"name": "x", "data": {}, stage: {"steps": 100, "seq_len": 2048}}
    with pytest.raises(RecipeError, match=rf"{stage}.seq_len=2048 is more than model.max_position_embeddings=1024"):
        parse_recipe(document, "here")
    assert parse_recipe({**document, "model": {"directory": "/models/long"}}, "here").stages[0][1].seq_len == 2048


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.name)
def test_shipped_recipes_are_valid(path: Path) -> None:
    assert load_recipe(path).name == path.stem


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps=200", 200),
        ("train.learning_rate=1e-4", 1e-4),
        ("train.schedule=wsd", "wsd"),
        ('train.schedule="wsd"', "wsd"),
        ("data.levels=[1, 2]", [1, 2]),
        ("model.directory=/models/with=equals", "/models/with=equals"),
        ("model.norm_topk_prob=false", False),
        ("chips.train=cuda:1", "cuda:1"),
        ("evaluate.level=3", 3),  # a table that the file does not have
        ("train.data.source=arithmetic", "arithmetic"),
    ],
)
def test_an_override_sets_its_key(smallest: Path, override: str, expected: object) -> None:
    value: object = load_recipe(smallest, [override])
    for part in override.partition("=")[0].split("."):
        value = getattr(value, part)
    assert value == expected


def test_the_last_override_wins(smallest: Path) -> None:
    recipe = load_recipe(smallest, ["seed=1", "seed=2"])
    assert recipe.seed == 2


@given(steps=st.integers(min_value=21, max_value=10**9), seed=st.integers(min_value=0, max_value=2**31))
def test_overrides_and_files_say_the_same(steps: int, seed: int) -> None:
    document = {"name": "x", "seed": seed, "data": {"source": "arithmetic"}, "train": {"steps": steps}}
    assert parse_recipe(document, "here").model_dump()["train"]["steps"] == steps


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.stepz=3", ["train.stepz = 3", "did you mean 'steps'"]),
        ("trian.steps=3", ["trian", "did you mean 'train'"]),
        ("train.data.pth=x", ["train.data.pth = 'x'", "did you mean 'path'"]),
        ("train.zzzzzz=3", ["the keys here are steps, batch_size"]),
        ("train.steps=0", ["train.steps = 0", "greater than 0"]),
        ("train.steps=1.5", ["train.steps = 1.5", "integer"]),
        ("train.steps='5'", ["train.steps = '5'", "integer"]),
        ("train.steps=true", ["train.steps = True", "integer"]),
        ("train.schedule=linear", ["train.schedule = 'linear'", "'cosine' or 'wsd'"]),
        ("train.learning_rate=nan", ["train.learning_rate = nan"]),
        ("train.learning_rate=inf", ["train.learning_rate = inf", "finite"]),
        ("train.warmup_steps=100", ["warmup_steps=100 leaves nothing of steps=100"]),
        ("train.lora_alpha=8.0", ["lora_alpha=8 is the scale of adapters", "lora_rank"]),
        ("train.gradient_accumulation=3", ["batch_size=16 is not a multiple of gradient_accumulation=3"]),
        ("train.seq_len=2048", ["train.seq_len=2048 is more than model.max_position_embeddings=1024"]),
        ("model.n_group=3", ["n_routed_experts=8 is not a multiple of n_group=3"]),
        ("model.num_experts_per_tok=9", ["num_experts_per_tok=9 is more than the 8 experts"]),
        ("model.qk_rope_head_dim=31", ["qk_rope_head_dim=31 is odd"]),
        ("data.path=x.txt", ["path='x.txt' is given together with source='arithmetic'"]),
        ("data.validation_fraction=1.0", ["data.validation_fraction = 1.0"]),
        ("data.levels=[]", ["data.levels = []"]),
        ("name=../escape", ["name = '../escape'", "'^[A-Za-z0-9]"]),
        ("train.data.path=", ["train.data.path = ''", "at least 1 character"]),
        ("model.directory=", ["model.directory = ''", "at least 1 character"]),
        ("tokenizer.directory=", ["tokenizer.directory = ''", "at least 1 character"]),
        ("data.reasoning_separator=", ["data.reasoning_separator = ''", "at least 1 character"]),
        ("steps", ["--set 'steps' is not KEY=VALUE"]),
        ("=3", ["is not KEY=VALUE"]),
        ("seed.x=3", ["seed is not a table"]),
        ("train..steps=3", ["is not KEY=VALUE"]),
    ],
)
def test_a_fault_names_key_value_and_remedy(tmp_path: Path, override: str, said: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_text(tmp_path, "seed = 1\n" + SMALLEST, override)
    for part in said:
        assert part in str(caught.value)
    assert caught.value.remedy


def test_groups_do_not_train_adapters(smallest: Path) -> None:
    load_recipe(smallest, ["train.lora_rank=4"])
    with pytest.raises(RecipeError, match=r"train\.lora_rank=4 cannot be trained by groups\.num_groups=2.*leave out"):
        load_recipe(smallest, ["train.lora_rank=4", "groups.num_groups=2"])


def test_groups_train_up_to_where_engines_answer_and_group_0_what_follows(tmp_path: Path) -> None:
    stages = "[sft]\nsteps = 100\n[rl]\nsteps = 100\nprompts = 5\nsamples = 3\n"
    stages += "[[then]]\nname = 'last'\nkind = 'sft'\nsteps = 100\n"
    recipe = load_text(tmp_path, SMALLEST + stages, "groups.num_groups=2")
    found = {name: recipe.groups_in(name).num_groups for name, _ in recipe.order}
    assert found == {"pretrain": 2, "sft": 2, "rl": 1, "last": 1}
    with pytest.raises(RecipeError, match=r"sft\.batch_size=7 is not a multiple of groups\.num_groups=2"):
        load_text(tmp_path, SMALLEST + stages, "groups.num_groups=2", "sft.batch_size=7")
    only = SMALLEST.replace("[train]", "[rl]")
    with pytest.raises(RecipeError, match=r"groups\.num_groups=2 and the first stage is rl, which one group trains"):
        load_text(tmp_path, only, "groups.num_groups=2")


def test_a_latency_without_a_bandwidth_is_refused_whoever_trains(smallest: Path) -> None:
    with pytest.raises(RecipeError, match=r"links: latency_ms=25 stands without bandwidth_mbit_s; give both"):
        load_recipe(smallest, ["links.latency_ms=25"])
    for beside in ("links.bandwidth_mbit_s=100", "links.report=links.json"):
        assert load_recipe(smallest, ["links.latency_ms=25", beside]).links.latency_ms == 25


def test_several_faults_are_told_at_once(smallest: Path) -> None:
    with pytest.raises(RecipeError, match=r"(?s)train\.steps.*model\.hidden_size"):
        load_recipe(smallest, ["train.steps=0", "model.hidden_size=-1"])


def test_a_recipe_without_a_stage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="add at least one stage"):
        load_text(tmp_path, 'name = "x"\n[data]\nsource = "arithmetic"\n')


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="data is missing"):
        load_text(tmp_path, 'name = "x"\n[train]\nsteps = 100\n')


def test_toml_that_does_not_parse_gives_the_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="line 2"):
        load_text(tmp_path, 'name = "x"\nthis is not toml\n')


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no recipe at"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(RecipeError, match="is a directory"):
        load_recipe(tmp_path)
    (tmp_path / "latin.toml").write_bytes('name = "é"'.encode("latin-1"))
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(tmp_path / "latin.toml")


def test_reading_a_recipe_does_not_import_torch() -> None:
    code = "import sys, crosschip.recipe; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_every_key_has_a_place_in_the_error_of_its_table(smallest: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(smallest, ["serve.qqqqqqqq=1"])
    assert re.search(r"the keys here are max_batch_size, max_model_len", str(caught.value))


def test_the_stages_of_r1_are_in_order() -> None:
    recipe = load_recipe(ROOT / "recipes" / "r1.toml")
    assert [name for name, _ in recipe.order] == ["pretrain", "sft", "rl", "distil", "sft-again", "rl-again"]
    assert [name for name, _ in recipe.stages] == ["pretrain", "sft", "rl", "sft-again", "rl-again"]


@pytest.mark.parametrize(
    ("further", "words"),
    [
        ({"kind": "sft", "name": "again", "steps": 30, "distilled": "nothing"}, "names no stage of kind 'distill'"),
        ({"kind": "sft", "name": "pretrain", "steps": 30}, "two stages are called pretrain"),
        ({"kind": "rl", "name": "sft", "steps": 30}, "called sft, as that of a table is"),
        ({"kind": "sft", "name": "again", "stepz": 30}, "did you mean 'steps'?"),
        ({"kind": "rl", "name": "again", "steps": 30, "batch_size": 7}, "leave it out"),
        ({"kind": "rl", "name": "again", "steps": 30, "rollouts": {"engines": ["vllm"]}}, "is no engine"),
        ({"kind": "rl", "name": "again", "steps": 30, "verify_checkpoints": "loss"}, "tensors"),
        ({"kind": "rl", "name": "again", "steps": 30, "max_new_tokens": 256}, "leaves no room for a prompt"),
    ],
)
def test_further_stages_that_cannot_be(further: dict[str, object], words: str) -> None:
    document = {"name": "x", "data": {"source": "arithmetic"}, "train": {"steps": 30}, "then": [further]}
    with pytest.raises(RecipeError, match=re.escape(words)):
        parse_recipe(document, "x")
