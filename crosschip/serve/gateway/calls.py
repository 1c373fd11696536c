"""A request as it arrives at the gateway: what must be known of it to pass it on, and what is refused here."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from crosschip.serve.api.errors import ApiError, shown
from crosschip.serve.gateway.fleet import Ask
from crosschip.serve.gateway.settings import EngineTable

__all__ = ["Call", "read_call"]

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


@dataclass
class Call:
    """One request: its body as bytes, which engines are sent, and as a document, by which it is routed."""

    path: str
    body: bytes
    document: dict[str, Any]
    ask: Ask
    request_id: str
    is_stream: bool
    begun: bool = field(default=False)  # whether a part of the answer was sent to the client
    is_through: bool = field(default=False)  # whether the client was sent the last of it

    def body_for(self, table: EngineTable) -> bytes:
        """The body as it came, or with the name that the engine has for the model."""
        if self.document.get("model") == (table.upstream_model or table.model):
            return self.body
        return json.dumps(self.document_for(table)).encode()

    def document_for(self, table: EngineTable) -> dict[str, Any]:
        """The same as a document."""
        return self.document | {"model": table.upstream_model or table.model}


async def read_call(request: Request, models: Sequence[str]) -> Call:
    """Read a request for an answer.

    Raises:
        ApiError: it is no JSON object, names no model that is served here, or does not say whether it is to stream.
    """
    if not request.headers.get("content-type", "").lower().startswith("application/json"):
        raise ApiError(400, "send a JSON object with Content-Type: application/json")
    body = await request.body()
    document = _parsed(body)
    model = document.get("model")
    if model is None and len(models) == 1:
        model = models[0]
    if not isinstance(model, str):
        raise ApiError(400, f"model is missing; one of {', '.join(map(repr, models))}", param="model")
    if model not in models:
        served = ", ".join(map(repr, models))
        raise ApiError(404, f"the model {model!r} is not served here; {served} is", "model", "model_not_found")
    return Call(
        path=request.url.path,
        body=body,
        document=document,
        ask=Ask.of(model, document),
        request_id=_request_id(request),
        is_stream=_is_stream(document),
    )


def _is_stream(document: dict[str, Any]) -> bool:
    """What engines may read as true, the number 1 perhaps, is waited for in another way than what is true."""
    stream = document.get("stream")
    if stream is None or isinstance(stream, bool):
        return bool(stream)
    raise ApiError(400, f"stream = {shown(stream)} is neither true nor false", param="stream")


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(document, dict):
        raise ApiError(400, f"the body is a {type(document).__name__}, not a JSON object")
    return document


def _request_id(request: Request) -> str:
    given = request.headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
