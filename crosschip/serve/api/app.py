"""The ASGI app: OpenAI's endpoints over one engine, and the chat page."""

from __future__ import annotations

from asyncio import to_thread
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response

import crosschip
from crosschip.serve.api.chat import ChatCall
from crosschip.serve.api.completions import CompletionCall
from crosschip.serve.api.errors import ApiError, install_error_handlers
from crosschip.serve.api.schemas import ChatRequest, CompletionRequest
from crosschip.serve.api.served import ServedModel, describe_served
from crosschip.serve.api.transport import EventStream, OuterLayer, finish_unless_gone
from crosschip.serve.engine.engine import Engine

__all__ = ["create_app"]

PAGE_DIRECTORY = Path(__file__).parents[1] / "page"
PAGE_FILES = {
    "/": ("index.html", "text/html"),
    "/chat.css": ("chat.css", "text/css"),
    "/chat.js": ("chat.js", "text/javascript"),
    "/render.js": ("render.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


def create_app(engine: Engine, *, model_name: str | None = None, max_body_bytes: int = 16 * 2**20) -> FastAPI:
    """The API and the page over a running engine.

    Args:
        engine: what computes; its directory's tokenizer and generation settings are read here.
        model_name: what clients call the model; None takes the directory's name.
        max_body_bytes: longer request bodies are refused with 413.

    Raises:
        ServeError: files beside the weights that cannot be read.
    """
    served = describe_served(engine, model_name)
    # The framework's own documentation pages fetch scripts from elsewhere; /openapi.json remains.
    app = FastAPI(title="crosschip", version=crosschip.__version__, docs_url=None, redoc_url=None)
    app.state.served = served
    app.add_middleware(OuterLayer, certificate=engine.info.certificate, max_body_bytes=max_body_bytes)
    install_error_handlers(app)
    _add_models(app, served)
    _add_answers(app, served)
    _add_page(app)
    return app


def _add_models(app: FastAPI, served: ServedModel) -> None:
    @app.get("/v1/models")
    async def list_models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [_model_card(served)], "crosschip": served.status})

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> JSONResponse:
        if name != served.name:
            raise ApiError(404, f"the model {name!r} is not served here", "model", "model_not_found")
        return JSONResponse(_model_card(served))

    @app.get("/health")
    async def health() -> JSONResponse:
        load = served.engine.load
        counts = {"running": load.running, "waiting": load.waiting, "free_slots": load.free_slots}
        body = {"status": "ok" if load.alive else "the engine has stopped", **counts, "crosschip": served.status}
        return JSONResponse(body, status_code=200 if load.alive else 503)


def _add_answers(app: FastAPI, served: ServedModel) -> None:
    # Calls are planned in a thread: encoding a long text must not hold up the streams of others.
    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await _answer(await to_thread(ChatCall, served, body), body.stream, request)

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await _answer(await to_thread(CompletionCall, served, body), body.stream, request)


async def _answer(call: ChatCall | CompletionCall, stream: bool | None, request: Request) -> Response:
    """Start the call, so that a refusal still has a status of its own, and answer; whatever happens, it ends."""
    generation = call.start()
    if stream:
        return EventStream(call.stream(generation), at_end=generation.abort)
    try:
        return JSONResponse(await finish_unless_gone(request, call.complete(generation)))
    finally:
        generation.abort()


def _add_page(app: FastAPI) -> None:
    def add(path: str, file_name: str, media_type: str) -> None:
        @app.get(path, include_in_schema=False)
        async def page_file() -> FileResponse:
            headers = {"Cache-Control": "no-cache"}
            return FileResponse(PAGE_DIRECTORY / file_name, media_type=media_type, headers=headers)

    for path, (file_name, media_type) in PAGE_FILES.items():
        add(path, file_name, media_type)


def _model_card(served: ServedModel) -> dict[str, Any]:
    """OpenAI's model object, with what the page and curious clients want to know."""
    info, tokenizer, sampling = served.engine.info, served.tokenizer, served.sampling
    about = {
        "dtype": info.dtype,
        "num_parameters": info.num_parameters,
        "vocab_size": info.vocab_size,
        "max_batch_size": info.max_batch_size,
        "has_tokenizer": tokenizer is not None,
        "has_chat_template": tokenizer is not None and tokenizer.has_chat_template,
        "default_sampling": {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k},
    }
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "crosschip",
        "max_model_len": info.max_model_len,
        "crosschip": served.status | about,
    }
