"""Bodies that would cost far more than their bytes: refused at their first fault, or before they are looked at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, ValidationError

from crosschip.data import ChatTokenizer
from crosschip.serve import load_engine
from crosschip.serve.api.schemas import ChatRequest, CompletionRequest
from crosschip.serve.api.server import background_server
from crosschip.serve.tokenizer import ServingTokenizer

MANY = 5000
USER = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def url(random_dir: Path) -> Iterator[str]:
    with background_server(load_engine(random_dir, max_batch_size=2, max_model_len=256)) as address:
        yield address


@pytest.mark.parametrize(
    ("kind", "body", "words"),
    [
        (CompletionRequest, {"prompt": [{}] * MANY}, "prompt.0 = {}"),
        (CompletionRequest, {"prompt": [[{}] * MANY] * 2}, "prompt.0.0 = {}"),
        (CompletionRequest, {"prompt": ["a"] * MANY + [1]}, "prompt."),
        (CompletionRequest, {"prompt": "a", "stop_token_ids": ["a"] * MANY}, "stop_token_ids.0 = 'a'"),
        (CompletionRequest, {"prompt": "a", "logit_bias": {f"x{i}": 1 for i in range(MANY)}}, "at most 1024"),
        (ChatRequest, {"messages": [{}] * MANY}, "messages.0.role is missing"),
        (ChatRequest, {"messages": [{"role": "user", "content": [{}] * MANY}]}, "messages.0.content.0.type is missing"),
        (ChatRequest, {"messages": [USER, {"role": "user", "content": [{}] * 9}] * 99}, "messages.1.content.0.type"),
    ],
)
def test_a_wrong_list_is_read_to_its_first_fault(
    url: str, kind: type[BaseModel], body: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValidationError) as error:
        kind.model_validate(body)
    assert error.value.error_count() < 10, "each is kept with all that it is about"
    path = "/v1/completions" if kind is CompletionRequest else "/v1/chat/completions"
    response = httpx.post(url + path, json=body, timeout=60)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


@pytest.mark.parametrize("ids", [[5] * MANY, [5, 10**6]], ids=["too long", "outside the vocabulary"])
def test_ids_that_are_refused_are_not_written_out(url: str, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    monkeypatch.setattr(ServingTokenizer, "token_bytes", lambda self, token: written.append(token) or b"x")
    response = httpx.post(f"{url}/v1/completions", json={"prompt": ids, "echo": True, "max_tokens": 1}, timeout=60)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")
    assert written == []


def test_offsets_of_echoed_ids_count_the_characters_that_are_shown(url: str, tokenizer: ChatTokenizer) -> None:
    """Also of characters in several tokens, and of bytes that are no character."""
    whole = tokenizer.encode("a🙂ß🚀 z")
    split = next(ids for i in range(300) if len(ids := tokenizer.encode(chr(0x1F680 + i))) > 1)
    for ids in (whole, [*whole, split[0], *whole, split[-1], *whole]):
        body = {"prompt": ids, "echo": True, "logprobs": 0, "max_tokens": 0}
        choice = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]
        offsets, text = choice["logprobs"]["text_offset"], choice["text"]
        names = choice["logprobs"]["tokens"]
        assert offsets == sorted(offsets)
        assert offsets[0] == 0
        for name, offset in zip(names, offsets, strict=True):
            if not name.startswith("bytes:"):  # what follows half a character may begin with its replacement
                assert text[offset:].removeprefix("\ufffd").startswith(name), (name, offset, text)
