"""What an engine will not take is refused as what it is: a client's fault, a full queue, or an engine's end."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from crosschip.errors import ServeError
from crosschip.serve.api.chat import _encode
from crosschip.serve.api.errors import ApiError
from crosschip.serve.api.generation import Generation, PlannedChoice
from crosschip.serve.api.schemas import ChatRequest
from crosschip.serve.engine.engine import Engine, EngineInfo
from crosschip.serve.engine.refusals import EngineClosed, QueueFull
from crosschip.serve.engine.request import SamplingParams
from crosschip.serve.engine.scheduler import Scheduler


@pytest.mark.parametrize(("ids", "words"), [([], "no tokens"), ([5, 300], "token id 300 is outside the vocabulary")])
def test_a_conversation_that_becomes_no_prompt_is_refused(ids: list[int], words: str) -> None:
    tokenizer: Any = SimpleNamespace(
        render_chat=lambda *_: "text", encode_chat=lambda *_: ids, certainly_exceeds=lambda *_: False
    )
    engine = SimpleNamespace(info=SimpleNamespace(vocab_size=300, max_model_len=64))
    served: Any = SimpleNamespace(tokenizer=tokenizer, engine=engine)
    plan: Any = SimpleNamespace(shown=[])
    request = ChatRequest.model_validate({"messages": [{"role": "user", "content": "Hi"}]})
    with pytest.raises(ApiError, match=words) as refusal:
        _encode(served, request, plan)
    assert (refusal.value.status, refusal.value.param) == (400, "messages")


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (QueueFull("512 requests are waiting already", "try again later"), 429, "engine_overloaded"),
        (EngineClosed("the engine is closed", "start the server again"), 503, "server_ended"),
        (ServeError("top_p is 1.5", "give above 0, at most 1"), 400, None),
    ],
)
def test_only_a_full_queue_asks_to_come_again(error: ServeError, status: int, code: str | None) -> None:
    def refuse(*_: Any) -> Any:
        raise error

    engine: Any = SimpleNamespace(submit_all=refuse, load=SimpleNamespace(alive=True))

    async def ask() -> None:
        Generation(engine, [PlannedChoice([1], SamplingParams(1), None)], 1)

    with pytest.raises(ApiError) as refusal:
        asyncio.run(ask())
    assert (refusal.value.status, refusal.value.code) == (status, code)


def test_an_engine_says_whether_it_is_full_or_closed(tmp_path: Any) -> None:
    info, runner = EngineInfo(tmp_path, "cpu", "float32", 300, 0, 64, 1), SimpleNamespace()
    engine = Engine(runner, Scheduler(1, 64, 64), info, max_waiting=0)
    with pytest.raises(QueueFull, match="0 requests are waiting already"):
        engine.submit([1], SamplingParams(1))
    engine.close()
    with pytest.raises(EngineClosed):
        engine.submit([1], SamplingParams(1))
