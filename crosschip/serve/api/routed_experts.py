"""The experts that an answer's tokens took, as a client gets them: small integers, their shape beside them."""

from __future__ import annotations

import base64
from typing import Any

from numpy.typing import NDArray

from crosschip.serve.api.errors import ApiError
from crosschip.serve.api.schemas import CompletionRequest
from crosschip.serve.api.served import ServedModel

__all__ = ["check_routed_experts", "routed_experts"]

_PARAM = "return_routed_experts"


def check_routed_experts(served: ServedModel, request: CompletionRequest) -> None:
    """Refuse to return what is not recorded, or belongs to an answer that is longer than what the client sees."""
    if not request.return_routed_experts:
        return
    if not served.engine.info.records_routes:
        message = f"{_PARAM}: this server does not record routed experts; start it with --record-routes"
        raise ApiError(400, message, param=_PARAM, code="unsupported_parameter")
    if request.stop_strings:
        message = f"{_PARAM} and stop exclude each other: text may end within a token; use stop_token_ids"
        raise ApiError(400, message, param="stop", code="unsupported_parameter")


def routed_experts(routes: NDArray[Any]) -> dict[str, Any]:
    """[positions, layers with experts, experts per token] as base64 of the little-endian bytes, the last index fastest;
    position p is that of the p-th token of prompt and answer, and the last token of the answer has none.
    """
    data = routes.astype(routes.dtype.newbyteorder("<")).tobytes()
    return {"shape": list(routes.shape), "dtype": routes.dtype.name, "data": base64.b64encode(data).decode()}
