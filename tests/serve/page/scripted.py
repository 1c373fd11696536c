"""A real server with the real page and headers, whose answers are written beforehand: what no tiny model would say."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from crosschip.serve.api.errors import error_body
from crosschip.serve.api.server import bind
from crosschip.serve.api.transport import OuterLayer
from crosschip.serve.page import add_page

STATUS = {
    "certificate": "UNCERTIFIED",
    "certificate_problem": "no certificate.json",
    "model_dir": "/models/scripted",
    "chip": "cpu",
    "weights_version": 3,
}


@dataclass
class Script:
    """One answer: its parts, and how it ends.

    `ending` is "done", "quiet" (the stream ends without a word), "cut" (the connection breaks), "error" (an error
    event) or "hang" (nothing more comes).
    """

    parts: list[str] = field(default_factory=lambda: ["Yes."])
    reasoning: list[str] = field(default_factory=list)
    ending: str = "done"
    finish: str = "stop"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: dict[str, Any] | str | None = None
    stream_headers: dict[str, str] = field(default_factory=dict)
    pause_s: float = 0.0
    fields: dict[str, Any] = field(default_factory=lambda: {"crosschip": STATUS})


class ScriptedServer:
    """Gives the next of `scripts` to each question; `bodies` are the questions."""

    def __init__(self) -> None:
        self.url = ""
        self.forget()

    def forget(self) -> None:
        """As it was when it started."""
        self.scripts: list[Script] = []
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.status: dict[str, Any] = dict(STATUS)
        self.models = ["scripted"]
        self.cards: dict[str, dict[str, Any]] = {}  # by a model's name: fields that its card has otherwise
        self.api_key: str | None = None
        self.key_status = 401  # of who has not the right one
        self.num_ended = 0  # streams whose client is gone or served

    def app(self) -> FastAPI:
        app = FastAPI(docs_url=None)
        app.add_middleware(OuterLayer, certificate=None, max_body_bytes=2**20)
        add_page(app)

        @app.get("/v1/models")
        async def models(request: Request) -> Response:
            if refused := self._refused(request):
                return refused
            about = self.status | {"has_tokenizer": True, "has_chat_template": True, "num_parameters": 8_000_000}
            card = {"object": "model", "max_model_len": 2048, "crosschip": about}
            cards = [card | {"id": name} | self.cards.get(name, {}) for name in self.models]
            return JSONResponse({"object": "list", "data": cards})

        @app.post("/v1/chat/completions", response_model=None)
        async def chat(request: Request) -> Response:
            if refused := self._refused(request):
                return refused
            self.bodies.append(await request.json())
            script = self.scripts.pop(0) if self.scripts else Script()
            if isinstance(script.body, str):
                return Response(script.body, script.status, script.headers)
            if script.status != 200:
                return JSONResponse(script.body, script.status, script.headers)
            return StreamingResponse(
                self._stream(script), headers=script.stream_headers, media_type="text/event-stream"
            )

        return app

    def _refused(self, request: Request) -> Response | None:
        given = request.headers.get("authorization")
        self.keys.append(given)
        if self.api_key is None or given == f"Bearer {self.api_key}":
            return None
        status = self.key_status
        return JSONResponse(error_body(status, "no valid API key", code="invalid_api_key"), status)

    async def _stream(self, script: Script) -> AsyncGenerator[bytes]:
        num_tokens = 0
        try:
            for name, parts in (("reasoning_content", script.reasoning), ("content", script.parts)):
                for part in parts:
                    num_tokens += 1
                    yield _event(_chunk(script, {name: part}, num_tokens, len(script.reasoning)))
                    await asyncio.sleep(script.pause_s)
            if script.ending == "cut":
                raise ConnectionResetError("as the script says")
            if script.ending == "hang":
                await asyncio.sleep(3600)
            if script.ending == "error":
                yield _event(error_body(500, "the engine was killed", code="engine_error"))
            if script.ending == "done":
                yield _event(_chunk(script, {}, num_tokens, len(script.reasoning), script.finish))
                yield b"data: [DONE]\n\n"
        finally:
            self.num_ended += 1


def _chunk(
    script: Script, delta: dict[str, str], num_tokens: int, num_reasoning: int, finish: str | None = None
) -> Any:
    usage = {
        "prompt_tokens": 9,
        "completion_tokens": num_tokens,
        "completion_tokens_details": {"reasoning_tokens": min(num_tokens, num_reasoning)},
        "decode_s": 0.02 * (num_tokens - 1),
    }
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "x", "model": "scripted", "choices": [choice], "usage": usage} | script.fields


def _event(document: Any) -> bytes:
    return f"data: {json.dumps(document)}\n\n".encode()


@contextmanager
def scripted_server() -> Iterator[ScriptedServer]:
    """The server on a free port, in a thread."""
    scripted = ScriptedServer()
    listener = bind("127.0.0.1", 0)
    config = uvicorn.Config(scripted.app(), log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    scripted.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        yield scripted
    finally:
        server.should_exit = True
        thread.join()
