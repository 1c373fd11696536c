"""The ASGI app: OpenAI's endpoints over one engine, and the chat page."""

from __future__ import annotations

from asyncio import to_thread
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

import crosschip
from crosschip.serve.api.chat import ChatCall
from crosschip.serve.api.completions import CompletionCall
from crosschip.serve.api.errors import ApiError, install_error_handlers
from crosschip.serve.api.hosts import HostLayer
from crosschip.serve.api.metrics import ServerMetrics
from crosschip.serve.api.schemas import ChatRequest, CompletionRequest
from crosschip.serve.api.served import ServedModel, describe_served
from crosschip.serve.api.transport import CERTIFICATE_HEADER, EventStream, OuterLayer, finish_unless_gone
from crosschip.serve.api.weights import CertificateFinder, add_weights
from crosschip.serve.engine.engine import Engine
from crosschip.serve.limits import Limits, LimitsLayer, Paths, load_keys
from crosschip.serve.page import PAGE_PATHS, add_page

__all__ = ["create_app"]


def create_app(
    engine: Engine,
    *,
    model_name: str | None = None,
    max_body_bytes: int | None = None,
    limits: Limits | None = None,
    find_certificate: CertificateFinder | None = None,
    tool_format: str | None = None,
    allowed_hosts: frozenset[str] | None = None,
) -> FastAPI:
    """The API and the page over a running engine.

    Args:
        engine: what computes; its directory's tokenizer and generation settings are read here.
        model_name: what clients call the model; None takes the directory's name.
        max_body_bytes: longer request bodies are refused with 413; None leaves it to the limits.
        limits: keys, rates, lengths and times.
        find_certificate: of new weights, while the server runs.
        tool_format: in which form the model writes tool calls (`crosschip.serve.tools.FORMATS`); None finds it.
        allowed_hosts: the names by which the server may be asked (`hosts_to_allow`); None: any.

    Raises:
        ServeError: files beside the weights that cannot be read, a file of keys, or a format that is not known.
    """
    limits = limits or Limits()
    if max_body_bytes is not None:
        limits = limits.model_copy(update={"max_body_bytes": max_body_bytes})
    served = describe_served(engine, model_name, tool_format)
    # The framework's own documentation pages fetch scripts from elsewhere; /openapi.json remains.
    app = FastAPI(title="crosschip", version=crosschip.__version__, docs_url=None, redoc_url=None)
    app.state.served = served
    metrics = ServerMetrics(served)
    install_error_handlers(app)
    _add_models(app, served)
    _add_state(app, served, metrics)
    _add_answers(app, served, metrics)
    add_weights(app, served, find_certificate)
    add_page(app)
    _add_layers(app, engine, limits, metrics, allowed_hosts)
    return app


def _add_layers(
    app: FastAPI, engine: Engine, limits: Limits, metrics: ServerMetrics, allowed_hosts: frozenset[str] | None
) -> None:
    """The last one added is the first one asked. The page is no secret: what it shows comes over the API."""
    paths = Paths(without_key=Paths.without_key | PAGE_PATHS)
    keys = load_keys(limits.api_keys) if limits.api_keys else None
    app.add_middleware(LimitsLayer, limits=limits, keys=keys, paths=paths, registry=metrics.registry)
    if allowed_hosts is not None:
        app.add_middleware(HostLayer, allowed=allowed_hosts)
    word = lambda: engine.info.certificate.word  # noqa: E731
    app.add_middleware(OuterLayer, certificate=word, max_body_bytes=limits.max_body_bytes)


def _add_models(app: FastAPI, served: ServedModel) -> None:
    @app.get("/v1/models")
    async def list_models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [_model_card(served)], "crosschip": served.status})

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> JSONResponse:
        if name != served.name:
            raise ApiError(404, f"the model {name!r} is not served here", "model", "model_not_found")
        return JSONResponse(_model_card(served))


def _add_state(app: FastAPI, served: ServedModel, metrics: ServerMetrics) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        load = served.engine.load
        counts = {"running": load.running, "waiting": load.waiting, "free_slots": load.free_slots}
        body = {"status": "ok" if load.alive else "the engine has stopped", **counts, "crosschip": served.status}
        return JSONResponse(body, status_code=200 if load.alive else 503)

    @app.get("/ready")
    async def ready() -> JSONResponse:
        is_ready = served.engine.load.alive
        return JSONResponse({"ready": is_ready}, status_code=200 if is_ready else 503)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_answers(app: FastAPI, served: ServedModel, metrics: ServerMetrics) -> None:
    # Calls are planned in a thread: encoding a long text must not hold up the streams of others.
    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await _answer(await to_thread(ChatCall, served, body), body.stream, request, metrics)

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await _answer(await to_thread(CompletionCall, served, body), body.stream, request, metrics)


async def _answer(
    call: ChatCall | CompletionCall, stream: bool | None, request: Request, metrics: ServerMetrics
) -> Response:
    """Start the call, so that a refusal still has a status of its own, and answer; whatever happens, it ends."""
    generation = call.start()

    def end() -> None:
        generation.abort()
        metrics.note(generation)

    def certificate() -> str | None:
        """Of the weights that it was begun on."""
        return generation.info.certificate.word if generation.info is not None else None

    if stream:
        return EventStream(call.stream(generation), end, certificate)
    try:
        answer = JSONResponse(await finish_unless_gone(request, call.complete(generation)))
        if (word := certificate()) is not None:
            answer.headers[CERTIFICATE_HEADER] = word
        return answer
    finally:
        end()


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
        "shows_tools": tokenizer is not None and tokenizer.tool_support.shows_tools,
        "tool_format": served.tool_format.name if served.tool_format else None,
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
