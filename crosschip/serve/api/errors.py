"""Errors in OpenAI's form, so that its clients raise the exception their users know."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

__all__ = ["ApiError", "error_body", "install_error_handlers", "shown"]

_MOST_FAULTS = 100  # of one body that are looked at


class ApiError(Exception):
    """A request that is answered with an error: HTTP status, message, and the parameter at fault."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The JSON document of an error."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def shown(value: Any, most: int = 100) -> str:
    """A value of a request as messages repeat it: its first characters."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def _respond(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    return JSONResponse(error_body(status, message, param, code), status_code=status, headers=headers)


def _describe_validation(error: RequestValidationError) -> tuple[str, str | None]:
    """The first fault in words, and the parameter it is about.

    Of what may be of several types it says where the value fails that fits best: the most deeply nested fault.
    """
    faults = [(fault, _place(fault["loc"])) for fault in error.errors()[:_MOST_FAULTS]]
    same = [(fault, place) for fault, place in faults if place[:1] == faults[0][1][:1]]
    fault, location = max(same, key=lambda each: len(each[1]))
    if fault["type"] == "json_invalid":
        return f"the body is not JSON: {fault.get('ctx', {}).get('error', fault['msg'])}", None
    if not location or not isinstance(location[0], str):
        return "the body is not a JSON object; send one with Content-Type: application/json", None
    place = ".".join(str(part) for part in location)
    if fault["type"] == "missing":
        return f"{place} is missing", location[0]
    return f"{place} = {shown(fault.get('input'))}: {fault['msg']}", location[0]


def _place(location: tuple[str | int, ...]) -> list[str | int]:
    """Without the body itself, and without pydantic's names of types, such as `list[int]`."""
    return [part for part in location if part != "body" and not (isinstance(part, str) and "[" in part)]


def install_error_handlers(app: FastAPI) -> None:
    """Make every refusal, also those of the framework, come in OpenAI's form."""

    @app.exception_handler(ApiError)
    async def _api_error(_: Request, error: ApiError) -> JSONResponse:
        return _respond(error.status, error.message, error.param, error.code)

    @app.exception_handler(RequestValidationError)
    async def _validation_error(_: Request, error: RequestValidationError) -> JSONResponse:
        message, param = _describe_validation(error)
        return _respond(400, message, param)

    @app.exception_handler(HTTPException)
    async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
        code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
        return _respond(error.status_code, f"{request.method} {request.url.path}: {error.detail}", code=code)
