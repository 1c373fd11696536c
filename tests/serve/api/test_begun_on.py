"""Who waits for new weights is told of those, who was begun on the old ones of those; who is ended may ask again."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from crosschip.certificate import Status
from crosschip.data import ChatTokenizer
from crosschip.model import save_model
from crosschip.serve import load_engine
from crosschip.serve.api import transport
from crosschip.serve.api.server import background_server
from crosschip.serve.engine.engine import Engine
from tests.serve.conftest import make_model, tiny_config
from tests.serve.gateway.conftest import wait_until

TEXT = "/v1/completions", {"prompt": [5, 6, 7], "ignore_eos": True, "max_tokens": 8, "echo": True}
CHAT = "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "ignore_eos": True}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}


class Steps:
    """The engine computes as many steps as it is given."""

    def __init__(self, engine: Engine) -> None:
        self._run, self._given = engine._runner.run, threading.Semaphore(0)
        engine._runner.run = self._gated  # type: ignore[method-assign]

    def _gated(self, step: Any) -> Any:
        self._given.acquire()
        return self._run(step)

    def give(self, count: int = 1000) -> None:
        self._given.release(count)


@dataclass
class Asked:
    """A request in a thread of its own."""

    url: str
    request: tuple[str, dict[str, Any]]
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.first_line = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def _ask(self) -> None:
        path, body = self.request
        with httpx.stream("POST", self.url + path, json=body, timeout=60) as response:
            self.status, self.headers = response.status_code, dict(response.headers)
            for line in response.iter_lines():
                self.lines.append(line)
                self.first_line.set()

    def answered(self) -> Asked:
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self

    def events(self) -> list[dict[str, Any]]:
        data = [line.removeprefix("data: ") for line in self.lines if line.startswith("data: ")]
        return [json.loads(each) for each in data if each != "[DONE]"]

    def told(self) -> set[tuple[str, str]]:
        return {(e["crosschip"]["weights_version"], e["crosschip"]["certificate"]) for e in self.events()}


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: ChatTokenizer) -> Path:
    directory = tmp_path_factory.mktemp("models") / "other-tiny"
    config = tiny_config(tokenizer.vocab_size, eos_token_id=tokenizer.eos_id, initializer_range=0.2)
    save_model(make_model(config, seed=6), directory, torch.float32)
    tokenizer.save(directory)
    return directory


@pytest.fixture
def gated(random_dir: Path) -> Iterator[tuple[str, Engine, Steps]]:
    engine = load_engine(random_dir, max_batch_size=2, max_model_len=256)
    steps = Steps(engine)
    with background_server(engine) as url:
        yield url, engine, steps
        steps.give()  # so that nothing waits for ever when a test has failed


def in_thread(act: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=act)
    thread.start()
    return thread


def updating(engine: Engine, directory: Path, **options: Any) -> threading.Thread:
    """New weights, which are certified, wait for their moment."""
    thread = in_thread(lambda: engine.update_weights(directory, certificate=Status("CERTIFIED"), **options))
    wait_until(lambda: engine._update is not None, "the update waits for what is under way")
    return thread


@pytest.mark.parametrize("request_", [TEXT, CHAT], ids=["completion", "chat"])
@pytest.mark.parametrize("waits_long", [False, True])
def test_each_stream_tells_of_the_weights_it_was_begun_on(
    gated: Any, other_dir: Path, request_: Any, waits_long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, engine, steps = gated
    monkeypatch.setattr(transport, "_SIGN_OF_LIFE_S", 0.05 if waits_long else 60.0)
    streamed = request_[0], request_[1] | USAGE
    steps.give(1)
    old = Asked(url, streamed)
    assert old.first_line.wait(60)
    update = updating(engine, other_dir)
    new, whole = Asked(url, streamed), Asked(url, request_)
    wait_until(lambda: len(engine._arrived) == 2, "both others wait")
    if waits_long:
        assert new.first_line.wait(60)
    steps.give()
    update.join()
    assert old.answered().told() == {("1", "UNCERTIFIED")}
    assert new.answered().told() == {("2", "CERTIFIED")}
    assert new.headers["x-crosschip-certificate"] == ("PENDING" if waits_long else "CERTIFIED")
    assert (": waiting" in new.lines) == waits_long
    assert whole.answered().headers["x-crosschip-certificate"] == "CERTIFIED"
    assert json.loads("".join(whole.lines))["crosschip"]["certificate"] == "CERTIFIED"


@pytest.mark.parametrize("request_", [TEXT, CHAT], ids=["completion", "chat"])
@pytest.mark.parametrize("code", ["weights_replaced", "server_ended"])
def test_who_is_ended_is_told_to_ask_again(gated: Any, other_dir: Path, request_: Any, code: str) -> None:
    url, engine, steps = gated
    steps.give(1)
    stream = Asked(url, (request_[0], request_[1] | USAGE))
    assert stream.first_line.wait(60)
    whole = Asked(url, request_)
    wait_until(lambda: len(engine._arrived) == 1, "the other one waits")
    if code == "server_ended":
        ending = in_thread(engine.close)
        wait_until(lambda: engine._closing, "the engine closes")
    else:
        steps.give(1)
        wait_until(lambda: engine._scheduler.num_free_slots == 0, "both are begun")
        ending = updating(engine, other_dir, in_flight="abort")
    steps.give()
    ending.join()
    assert stream.answered().status == 200
    assert stream.events()[-1]["error"]["code"] == code
    assert whole.answered().status == 503
    assert int(whole.headers["retry-after"]) >= 1
    assert json.loads("".join(whole.lines))["error"]["code"] == code
    if code == "server_ended":
        late = Asked(url, request_).answered()
        assert (late.status, json.loads("".join(late.lines))["error"]["code"]) == (503, code)
