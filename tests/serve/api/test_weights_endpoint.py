"""Other weights while the server runs: for admins, all or nothing, and each answer says which."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from crosschip.data import ChatTokenizer
from crosschip.model import save_model
from crosschip.serve.limits import new_key
from tests.serve.conftest import Expression, RunningServer, make_model, running_server, tiny_config

BODY = {"prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0, "ignore_eos": True, "return_token_ids": True}


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: ChatTokenizer) -> Path:
    directory = tmp_path_factory.mktemp("models") / "other-tiny"
    config = tiny_config(tokenizer.vocab_size, eos_token_id=tokenizer.eos_id, initializer_range=0.2)
    save_model(make_model(config, seed=6), directory, torch.float32)
    tokenizer.save(directory)
    return directory


@pytest.fixture
def guarded(random_dir: Path, tmp_path: Path) -> Iterator[tuple[RunningServer, dict[str, str], dict[str, str]]]:
    alice, lines = new_key("alice")
    root, admin_lines = new_key("root", admin=True)
    keys = tmp_path / "keys.toml"
    keys.write_text(lines + admin_lines)
    program = f"__import__('crosschip.serve.limits').serve.limits.Limits(api_keys={str(keys)!r})"
    with running_server(random_dir, max_batch_size=4, limits=Expression(program)) as server:
        yield server, {"authorization": f"Bearer {alice}"}, {"authorization": f"Bearer {root}"}


def test_weights_are_replaced_by_an_admin_alone(guarded: Any, other_dir: Path, random_dir: Path) -> None:
    server, alice, root = guarded
    update = {"path": str(other_dir), "version": "step-200"}

    def answer() -> dict[str, Any]:
        response = httpx.post(f"{server.url}/v1/completions", json=BODY, headers=alice)
        assert response.status_code == 200, response.text
        return dict(response.json())

    before = answer()
    assert before["crosschip"]["weights_version"] == "1"
    assert httpx.post(f"{server.url}/v1/completions", json=BODY).status_code == 401
    assert httpx.post(f"{server.url}/v1/weights", json=update).status_code == 401
    assert httpx.post(f"{server.url}/v1/weights", json=update, headers=alice).status_code == 403
    assert answer()["choices"] == before["choices"]

    response = httpx.post(f"{server.url}/v1/weights", json=update, headers=root, timeout=60)
    assert (response.status_code, response.json()["weights_version"]) == (200, "step-200")
    after = answer()
    assert after["crosschip"]["weights_version"] == "step-200"
    assert after["crosschip"]["model_dir"] == other_dir.name
    assert after["choices"][0]["token_ids"] != before["choices"][0]["token_ids"]
    assert 'weights_version="step-200"' in httpx.get(f"{server.url}/metrics", headers=alice).text

    for wrong in ({"path": "/nowhere"}, {"path": str(other_dir), "version": "step-200"}, {"path": "x\x00"}):
        refusal = httpx.post(f"{server.url}/v1/weights", json=wrong, headers=root, timeout=60)
        assert refusal.status_code == 400, refusal.text
        assert refusal.json()["error"]["param"] == "path"
    for wrong in ({}, {"path": 7}, {"path": "x", "in_flight": "perhaps"}, {"path": "x", "version": 'a"b'}):
        assert httpx.post(f"{server.url}/v1/weights", json=wrong, headers=root).status_code == 400
    assert answer()["choices"] == after["choices"]


def test_an_answer_under_way_ends_on_the_weights_it_began_on(guarded: Any, other_dir: Path) -> None:
    server, alice, root = guarded
    lines: list[str] = []
    begun = threading.Event()

    def read() -> None:
        body = BODY | {"max_tokens": 300, "stream": True, "return_token_ids": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, headers=alice, timeout=60) as response:
            for line in response.iter_lines():
                lines.append(line)
                begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(30)
    response = httpx.post(f"{server.url}/v1/weights", json={"path": str(other_dir)}, headers=root, timeout=60)
    assert response.json()["weights_version"] == "2"
    reader.join(60)
    told = [line for line in lines if '"weights_version"' in line]  # a chunk may hold several tokens
    chunks = [json.loads(line.removeprefix("data: ")) for line in told]
    assert sum(len(choice["token_ids"]) for chunk in chunks for choice in chunk["choices"]) == 300
    assert all('"weights_version":"1"' in line for line in told)
    assert lines[-2] == "data: [DONE]"
    last = httpx.post(f"{server.url}/v1/completions", json=BODY, headers=alice).json()
    assert last["crosschip"]["weights_version"] == "2"
