"""A real HTTP server that speaks as our engine or as vLLM does, and misbehaves as it is told."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

VOCAB_SIZE = 64
STOP_ID = 1
# What an engine does with a request; also a number, the seconds that it takes, or bytes, the body that it sends.
Play = str | float | bytes


def _draw(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


@dataclass
class ScriptedEngine:
    """Answers follow from prompt, seed and index. `play(n)` says what becomes of the n-th request for answers."""

    kind: str = "crosschip"
    play: Callable[[int], Play] = lambda number: "good"
    max_batch_size: int = 8
    load_s: float = 0.0
    may_load: threading.Event = field(default_factory=threading.Event)  # loads wait for it; set at first
    refuse_weights: bool = False
    never_signal: bool = False
    names: list[str] = field(default_factory=lambda: ["1"])  # of the weights, the last ones answer
    loads: list[dict[str, Any]] = field(default_factory=list)
    load_times: list[tuple[float, float]] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)  # of vLLM's update
    keys: set[str | None] = field(default_factory=set)
    most_at_once: int = 0
    at_once: int = 0
    is_well: bool = True
    lacks: tuple[str, ...] = ()
    raw_logprobs: bool = False  # vLLM's default: those before the temperature
    card: dict[str, Any] = field(default_factory=dict)  # what is otherwise in its list of models
    endless_models: bool = False  # the list of models never ends
    num_parts: int = 0  # of 64 KiB, that endless responses have sent
    slow_answers: int = 0  # so many questions for its models are answered after `slow_s`
    slow_s: float = 1.0
    cuts_off: bool = False  # no answer comes to its end
    fails_with: str = "out of memory"

    def __post_init__(self) -> None:
        self.may_load.set()

    def app(self) -> Starlette:
        posts = {
            "/v1/completions": self._complete,
            "/v1/weights": self._weights,
            "/pause": self._step,
            "/resume": self._step,
            "/collective_rpc": self._step,
            "/reset_prefix_cache": self._step,
            "/update_weight_version": self._step,
        }
        routes = [Route(path, work, methods=["POST"]) for path, work in posts.items() if path not in self.lacks]
        return Starlette(routes=[Route("/v1/models", self._models), *routes])

    async def _models(self, request: Request) -> Response:
        self.keys.add(request.headers.get("authorization"))
        if self.slow_answers:
            self.slow_answers -= 1
            await asyncio.sleep(self.slow_s)
        if self.endless_models:
            return StreamingResponse(self._endless())
        if not self.is_well:
            return JSONResponse({}, 500)
        card = {"id": "m", "owned_by": self.kind}
        if self.kind == "vllm":
            return JSONResponse({"data": [card]})
        card |= {"crosschip": {"max_batch_size": self.max_batch_size}}
        return JSONResponse({"data": [card | self.card], "crosschip": self._status()})

    async def _endless(self) -> AsyncIterator[bytes]:
        while True:
            self.num_parts += 1
            await asyncio.sleep(0)  # sending does not wait once nobody listens
            yield b" " * 2**16

    def _status(self) -> dict[str, Any]:
        return {"chip": "scripted", "weights_version": self.names[-1]}

    async def _weights(self, request: Request) -> Response:
        body = await request.json()
        self.loads.append(body)
        begun = time.monotonic()
        await asyncio.sleep(self.load_s)
        while not self.may_load.is_set():
            await asyncio.sleep(0.02)
        self.load_times.append((begun, time.monotonic()))
        if self.refuse_weights:
            return JSONResponse({"error": {"message": "these weights have a NaN"}}, 400)
        self.names.append(body["version"])
        return JSONResponse({"weights_version": body["version"], "crosschip": self._status()})

    async def _step(self, request: Request) -> Response:
        self.steps.append(request.url.path + (f"?{request.url.query}" if request.url.query else ""))
        body = await request.json()
        if request.url.path == "/collective_rpc":
            self.loads.append(body)
        return JSONResponse({"success": True})

    async def _complete(self, request: Request) -> Response:
        self.bodies.append(await request.json())
        number = len(self.bodies) - 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if self.play(number) == "hang":
                while not await request.is_disconnected():
                    await asyncio.sleep(0.02)
            await self._take_time(self.play(number), request)
            return self._played(self.play(number), self.bodies[number])
        finally:
            self.at_once -= 1

    async def _take_time(self, play: Play, request: Request) -> None:
        """As an engine does, which computes no longer for a client that has left."""
        until = time.monotonic() + (play if isinstance(play, int | float) else 0.0)
        while (left_s := until - time.monotonic()) > 0 and not await request.is_disconnected():
            await asyncio.sleep(min(0.02, left_s))

    def _played(self, play: Play, body: dict[str, Any]) -> Response:
        if isinstance(play, bytes):
            return Response(play, media_type="application/json")
        document = self.document(body)
        choice = document["choices"][-1]
        if play == "500":
            return Response(json.dumps({"error": {"message": self.fails_with}}), 500)
        if play == "400":
            return JSONResponse({"error": {"message": "the prompt is too long"}}, 400)
        if play == "429":
            return JSONResponse({"error": {"message": "too many"}}, 429)
        if play == "no json":
            return Response(b"<html>")
        if play == "endless":
            return StreamingResponse(self._endless())
        if play == "close":
            return StreamingResponse(_broken())
        if play == "length":
            choice["logprobs"]["token_logprobs"].append(-1.0)
        if play == "nan":
            choice["logprobs"]["token_logprobs"][0] = float("nan")
        if play == "wrong version":
            choice["weights_version"] = "0-000000000000"
        if play == "vocabulary":
            choice["token_ids"][0] = VOCAB_SIZE
        return Response(json.dumps(document), media_type="application/json")

    def document(self, body: dict[str, Any]) -> dict[str, Any]:
        choices = []
        for index in range(body["n"]):
            first = 2 if self.never_signal else _draw(body["prompt"], body["seed"], index) % 2 + 2
            ids = [first, 4 + _draw("more", body["seed"], index) % 8, STOP_ID]
            if self.cuts_off:
                ids = ids[:1] * body["max_tokens"]
            logprobs: dict[str, Any] = {"token_logprobs": [-0.5 - index / 100 - id_ / 1000 for id_ in ids]}
            if body["logprobs"]:
                gap = 12.0 / (1.0 if self.raw_logprobs else body["temperature"])  # the first token is all but certain
                logprobs["top_logprobs"] = [{"a": 0.0, "b": -gap}] * len(ids)
            choice = {"index": index, "text": "", "token_ids": ids, "logprobs": logprobs}
            choice["finish_reason"] = "length" if self.cuts_off else "stop"
            choices.append(choice | ({"prompt_token_ids": body["prompt"]} if index == 0 else {}))
        return {"choices": choices} | ({"crosschip": self._status()} if self.kind == "crosschip" else {})


async def _broken() -> Any:
    yield b'{"choices": ['
    raise ConnectionError("broken off")


@contextmanager
def served(*engines: ScriptedEngine) -> Iterator[list[str]]:
    """Each on a port of its own, in a thread of its own."""
    with ExitStack() as stack:
        yield [stack.enter_context(_in_thread(engine.app())) for engine in engines]


@contextmanager
def _in_thread(app: Starlette) -> Iterator[str]:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    config = uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
