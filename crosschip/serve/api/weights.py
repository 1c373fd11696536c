"""`POST /v1/weights`: other weights of the same model, while the server goes on answering. For admins alone."""

from __future__ import annotations

import logging
from asyncio import to_thread
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from crosschip.certificate import Status
from crosschip.errors import CrosschipError
from crosschip.serve.api.errors import ApiError
from crosschip.serve.api.served import ServedModel

__all__ = ["CertificateFinder", "add_weights"]

logger = logging.getLogger("crosschip.serve")

# Hashes a directory's files and says whether its certificate covers this engine in a dtype; raises where one must.
CertificateFinder = Callable[[Path, str], Status]

_NOT_LOOKED_FOR = Status("UNCERTIFIED", "nobody looked for a certificate of these weights")


class WeightsRequest(BaseModel):
    """Where the weights are, what answers shall call them (else they are counted up), what becomes of answers under
    way, and how long to wait for those."""

    model_config = ConfigDict(extra="forbid")

    path: Annotated[str, Field(min_length=1, max_length=4096)]
    version: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] | Annotated[int, Field(ge=0)] | None = None
    in_flight: Literal["finish", "abort"] = "finish"
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 600.0


def add_weights(app: FastAPI, served: ServedModel, find_certificate: CertificateFinder | None) -> None:
    """Add the endpoint. The answer comes when the new weights answer, or with the reason why the old ones go on."""

    def update(body: WeightsRequest) -> dict[str, Any]:
        directory = Path(body.path)
        served.engine.check_weights(directory)  # before its files are hashed
        # The engine goes on in the dtype it was started in, whatever the new files are in.
        dtype = served.engine.info.dtype
        certificate = find_certificate(directory, dtype) if find_certificate is not None else _NOT_LOOKED_FOR
        version = served.engine.update_weights(
            directory,
            version=None if body.version is None else str(body.version),
            in_flight=body.in_flight,
            certificate=certificate,
            timeout_s=body.timeout_s,
        )
        if not certificate.is_certified:
            logger.warning("UNCERTIFIED, version %s: %s", version, certificate.problem)
        return {"object": "weights", "weights_version": version, "crosschip": served.status}

    @app.post("/v1/weights")
    async def update_weights(body: WeightsRequest) -> JSONResponse:
        if "\x00" in body.path:
            raise ApiError(400, "path holds a zero byte", param="path")
        try:
            return JSONResponse(await to_thread(update, body))
        except CrosschipError as error:
            raise ApiError(400, f"{error.problem}; {error.remedy}", "path", "weights_refused") from error
