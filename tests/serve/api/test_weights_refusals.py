"""A directory that is not the served model's is refused by name, before its weights are read; the old ones go on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from crosschip.certificate import Status
from crosschip.data import ChatTokenizer
from crosschip.model import load_model, save_model
from crosschip.serve import load_engine
from crosschip.serve.api.server import background_server
from crosschip.serve.engine import new_weights
from crosschip.serve.limits import Limits, new_key
from tests.serve.conftest import make_model, tiny_config

GENERATION = {"temperature": 0.7, "transformers_version": "4.57.0"}


@dataclass
class Served:
    """A server in this process; of `loaded` directories the weights were read, of `hashed` ones the files hashed."""

    url: str
    headers: dict[str, str]
    loaded: list[Path] = field(default_factory=list)
    hashed: list[Path] = field(default_factory=list)

    def update(self, path: Path) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/weights", json={"path": str(path)}, headers=self.headers, timeout=60)

    def version(self) -> str:
        body = {"prompt": [5, 6], "max_tokens": 1, "ignore_eos": True}
        answer = httpx.post(f"{self.url}/v1/completions", json=body, headers=self.headers, timeout=60)
        return str(answer.json()["crosschip"]["weights_version"])


@pytest.fixture(scope="module")
def served_dir(random_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("served") / "model"
    shutil.copytree(random_dir, directory)
    (directory / "generation_config.json").write_text(json.dumps(GENERATION))
    return directory


@pytest.fixture
def served(served_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    secret, lines = new_key("root", admin=True)
    (tmp_path / "keys.toml").write_text(lines)
    told = Served("", {"authorization": f"Bearer {secret}"})

    def find(directory: Path, dtype: str) -> Status:
        told.hashed.append(directory)
        return Status("UNCERTIFIED", "as the test says")

    engine = load_engine(served_dir, max_batch_size=2, max_model_len=64)
    limits = Limits(api_keys=tmp_path / "keys.toml")
    monkeypatch.setattr(new_weights, "load_model", lambda of, **more: told.loaded.append(of) or load_model(of, **more))
    with background_server(engine, limits=limits, find_certificate=find) as told.url:
        yield told


def config_with(**changes: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def written(name: str, text: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_text(text) and None


def with_a_longer_template(directory: Path) -> None:
    path = directory / "chat_template.jinja"
    path.write_text(path.read_text() + "Z")


def with_another_bos(directory: Path) -> None:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": True}))


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (config_with(hidden_size=10**9), "hidden_size is 1000000000"),
    (config_with(num_hidden_layers=10**12), "num_hidden_layers is 1000000000000"),
    (config_with(rms_norm_eps=0.5), "rms_norm_eps is 0.5"),
    (config_with(eos_token_id=[5, 6]), "eos_token_id is (5, 6)"),
    (written("config.json", "[]"), "config.json holds a list"),
    (written("config.json", "{"), "is not JSON"),
    (written("config.json", "[" * 100_000), "nested too deep"),
    (lambda directory: (directory / "config.json").unlink(), "has no config.json"),
    (with_a_longer_template, "the chat template (chat_template.jinja) is not that of"),
    (with_another_bos, "tokenizer_config.json is not that of"),
    (written("tokenizer_config.json", "[]"), "tokenizer_config.json holds a list"),
    (written("generation_config.json", '{"do_sample": false}'), "generation_config.json is not that of"),
    (written("tokenizer.json", "{}"), "tokenizer.json is not that of"),
]


def test_another_model_is_refused_unread(served: Served, served_dir: Path, tmp_path: Path) -> None:
    for number, (damage, words) in enumerate(DAMAGES):
        directory = tmp_path / str(number)
        shutil.copytree(served_dir, directory)
        damage(directory)
        assert_refused(served, directory, words)
    assert (served.loaded, served.hashed) == ([], [])
    assert served.version() == "1"


def test_what_is_no_directory_is_refused_with_the_reason(served: Served, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("x")
    assert_refused(served, tmp_path / "nowhere", "No such file or directory")
    assert_refused(served, tmp_path / "loop", "symbolic links")
    assert_refused(served, tmp_path / "file", "is no directory")
    assert_refused(served, Path("/" + "a" * 4000), "File name too long")
    assert served.version() == "1"


def assert_refused(served: Served, directory: Path, words: str) -> None:
    response = served.update(directory)
    assert response.status_code == 400, (directory, response.text[:300])
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("weights_refused", "path")
    assert words in error["message"], error["message"]
    assert len(error["message"]) < 1000


def test_weights_that_cannot_be_read_are_refused(served: Served, served_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(served_dir, tmp_path / "cut")
    (path,) = (tmp_path / "cut").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    assert_refused(served, tmp_path / "cut", "cannot be read")
    assert served.loaded == [tmp_path / "cut"]
    assert served.version() == "1"


def test_fewer_files_and_those_of_training_are_taken(served: Served, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    config = tiny_config(tokenizer.vocab_size, eos_token_id=tokenizer.eos_id, initializer_range=0.2)
    published, few = tmp_path / "published", tmp_path / "few"
    save_model(make_model(config, seed=7), published, torch.float32)
    tokenizer.save(published)  # as reinforcement learning publishes its weights
    few.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(published / name, few)
    for version, directory in (("2", published), ("3", few)):
        response = served.update(directory)
        assert (response.status_code, served.version()) == (200, version), response.text
    (few / "generation_config.json").write_text(json.dumps(GENERATION | {"transformers_version": "5.0.0"}))
    assert served.update(few).status_code == 200, "who wrote a file is not what holds"
