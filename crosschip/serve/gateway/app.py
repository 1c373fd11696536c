"""The gateway's ASGI app: OpenAI's endpoints over the fleet, its health, its figures, its administration."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

import crosschip
from crosschip.certificate import Status
from crosschip.serve.api.errors import ApiError, error_body, install_error_handlers
from crosschip.serve.api.hosts import HostLayer
from crosschip.serve.api.transport import CERTIFICATE_HEADER, OuterLayer
from crosschip.serve.gateway.admission import Admission, Overloaded
from crosschip.serve.gateway.drift import bound_of
from crosschip.serve.gateway.fleet import EngineState, Fleet
from crosschip.serve.gateway.forwarding import Forwarder
from crosschip.serve.gateway.health import HealthWatch
from crosschip.serve.gateway.metrics import GatewayMetrics
from crosschip.serve.gateway.settings import GatewaySettings
from crosschip.serve.gateway.upstream import Upstreams
from crosschip.serve.gateway.watch import ParityWatch
from crosschip.serve.limits import LimitsLayer, Paths, load_keys
from crosschip.serve.page import PAGE_PATHS, add_page

__all__ = ["Gateway", "create_gateway"]

# What a page of another origin may read of an answer's head.
_EXPOSED_HEADERS = [
    "Retry-After",
    "X-Request-Id",
    "X-Crosschip-Engine",
    "X-Crosschip-Chip",
    CERTIFICATE_HEADER,
]
_NOT_ASKED = Status("UNCERTIFIED", "the engine was not asked yet")
_NO_CERTIFICATE = Status("UNCERTIFIED", "its table names no certified directory")


@dataclass(frozen=True)
class Gateway:
    """The app and its parts, for whoever runs it."""

    app: FastAPI
    fleet: Fleet
    admission: Admission
    forwarder: Forwarder
    watches: dict[str, ParityWatch]
    metrics: GatewayMetrics

    def drain(self) -> None:
        """Take no new requests; what is under way goes on."""
        self.admission.drain()

    def break_off(self) -> None:
        """End what is still under way; clients are told."""
        self.admission.break_off()
        self.forwarder.break_off()


class _EngineName(BaseModel):
    model_config = ConfigDict(extra="forbid")

    engine: str | None = None


def create_gateway(
    settings: GatewaySettings,
    certificates: dict[str, Status] | None = None,
    require_certificate: bool = False,
    public_key: bytes | None = None,
    allowed_hosts: frozenset[str] | None = None,
) -> Gateway:
    """Put the gateway together; engines are asked once the app runs.

    Args:
        settings: the file GATEWAY.toml.
        certificates: what was found out about engines that do not tell it themselves, by name.
        require_certificate: send nothing to an engine that is UNCERTIFIED.
        public_key: the 32 bytes of the key that must have signed the certificates that bounds come from.
        allowed_hosts: the names by which the gateway may be asked (`hosts_to_allow`); None: any.

    Raises:
        ServeError: keys or a certificate that cannot be read.
    """
    known = {
        table.name: _NOT_ASKED if table.kind == "native" else (certificates or {}).get(table.name, _NO_CERTIFICATE)
        for table in settings.engines
    }
    forwarding = settings.forwarding
    fleet, metrics = Fleet(settings, known, require_certificate), GatewayMetrics()
    admission = Admission(fleet, forwarding.max_waiting, forwarding.max_wait_s)
    watches = {table.model: ParityWatch(table, bound_of(table, public_key), metrics) for table in settings.parity}
    upstreams = Upstreams(settings)
    forwarder = Forwarder(fleet, admission, upstreams, metrics, watches, forwarding, settings.health)
    health = HealthWatch(fleet, upstreams, admission, metrics, settings.health)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(health.run()), *(asyncio.create_task(w.run()) for w in watches.values())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for watch in watches.values():
                watch.close()
            await upstreams.close()

    app = FastAPI(
        title="crosschip gateway", version=crosschip.__version__, docs_url=None, redoc_url=None, lifespan=lifespan
    )
    gateway = Gateway(app, fleet, admission, forwarder, watches, metrics)
    _add_layers(app, settings, metrics, allowed_hosts)
    for path in ("/v1/chat/completions", "/v1/completions"):
        app.router.routes.append(Route(path, forwarder, methods=["POST"]))
    _add_models(app, gateway)
    _add_state(app, gateway)
    _add_administration(app, gateway)
    add_page(app)
    return gateway


def _add_layers(
    app: FastAPI, settings: GatewaySettings, metrics: GatewayMetrics, allowed_hosts: frozenset[str] | None
) -> None:
    """The last one added is the first one asked."""
    install_error_handlers(app)

    @app.exception_handler(Overloaded)
    async def _overloaded(_: Request, error: Overloaded) -> JSONResponse:
        body = error_body(error.status, error.message, error.param, error.code)
        return JSONResponse(body, error.status, {"Retry-After": str(error.retry_after_s)})

    keys = load_keys(settings.limits.api_keys) if settings.limits.api_keys else None
    paths = Paths(without_key=Paths.without_key | PAGE_PATHS)
    app.add_middleware(LimitsLayer, limits=settings.limits, keys=keys, paths=paths, registry=metrics.registry)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # clients send headers of their own, and the origins are listed
            expose_headers=_EXPOSED_HEADERS,
        )
    if allowed_hosts is not None:
        app.add_middleware(HostLayer, allowed=allowed_hosts)
    app.add_middleware(OuterLayer, certificate=None, max_body_bytes=settings.limits.max_body_bytes)


def _add_models(app: FastAPI, gateway: Gateway) -> None:
    fleet = gateway.fleet

    @app.get("/v1/models")
    async def list_models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [_card(gateway, model) for model in fleet.models]})

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> JSONResponse:
        if name not in fleet.models:
            raise ApiError(404, f"the model {name!r} is not served here", "model", "model_not_found")
        return JSONResponse(_card(gateway, name))


def _card(gateway: Gateway, model: str) -> dict[str, Any]:
    """OpenAI's model object. What its engines say of it beside holds for the first one that is up."""
    fleet, watch = gateway.fleet, gateway.watches.get(model)
    engines = fleet.of_model(model)
    up = [engine for engine in engines if fleet.is_usable(engine) and engine.card]
    card = dict(up[0].card) if up else {"object": "model", "created": 0, "owned_by": "crosschip"}
    about = card.get("crosschip")
    uncertified = [engine for engine in engines if not engine.certificate.is_certified]
    told: dict[str, Any] = {"certificate": "UNCERTIFIED" if uncertified else "CERTIFIED"}
    if watch is not None and watch.alarms:
        told["alarms"] = [f"the answers of {name} drift" for name in watch.alarms]
    if uncertified:
        told["certificate_problem"] = f"engine {uncertified[0].name}: {uncertified[0].certificate.problem}"
    shown = [
        {
            "name": engine.name,
            "chip": engine.table.chip,
            "group": engine.table.group,
            "up": fleet.is_usable(engine),
            "certificate": engine.certificate.word,
            "weights_version": engine.weights_version or None,
        }
        for engine in engines
    ]
    return card | {"id": model, "crosschip": (about if isinstance(about, dict) else {}) | told | {"engines": shown}}


def _add_state(app: FastAPI, gateway: Gateway) -> None:
    fleet, admission, metrics = gateway.fleet, gateway.admission, gateway.metrics

    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether the process lives; not whether it can answer."""
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """Whether each model has an engine that takes requests."""
        without = [model for model in fleet.models if not fleet.usable_of_model(model)]
        is_ready = not without and not admission.draining
        body = {"ready": is_ready, "draining": admission.draining, "models_without_engine": without}
        return JSONResponse(body, 200 if is_ready else 503)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        for model in fleet.models:
            metrics.waiting.labels(model).set(admission.num_waiting(model))
        for engine in fleet.engines:
            metrics.show_engine(engine)
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/parity")
    async def parity() -> JSONResponse:
        alarms = sorted({name for watch in gateway.watches.values() for name in watch.alarms})
        return JSONResponse({"alarms": alarms, "watches": [watch.describe() for watch in gateway.watches.values()]})


def _add_administration(app: FastAPI, gateway: Gateway) -> None:
    fleet, admission = gateway.fleet, gateway.admission

    @app.get("/admin/engines")
    async def engines() -> JSONResponse:
        return JSONResponse({"engines": [engine.describe() for engine in fleet.engines]})

    @app.post("/admin/drain")
    async def drain(body: _EngineName) -> JSONResponse:
        if body.engine is None:
            admission.drain()
        else:
            _engine(fleet, body.engine).draining = True
            admission.assign()
        return _state(body)

    @app.post("/admin/undrain")
    async def undrain(body: _EngineName) -> JSONResponse:
        if body.engine is None:
            admission.draining = False
        else:
            _engine(fleet, body.engine).draining = False
            admission.assign()
        return _state(body)

    def _state(body: _EngineName) -> JSONResponse:
        under_way = admission.num_under_way if body.engine is None else _engine(fleet, body.engine).in_flight
        return JSONResponse({"engine": body.engine, "draining": _is_draining(body.engine), "under_way": under_way})

    def _is_draining(name: str | None) -> bool:
        return admission.draining if name is None else _engine(fleet, name).draining


def _engine(fleet: Fleet, name: str) -> EngineState:
    engine = fleet.named(name)
    if engine is None:
        names = ", ".join(repr(each.name) for each in fleet.engines)
        raise ApiError(404, f"there is no engine {name!r}; there are {names}", "engine", "engine_not_found")
    return engine
