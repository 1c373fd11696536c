"""New weights for vLLM's OpenAI server, over HTTP: `POST /collective_rpc` with `reload_weights`.

The endpoints exist where the server was started with `VLLM_SERVER_DEV_MODE=1`. As read in the sources of 0.32:
`/pause?mode=wait` lets requests under way end and begins none, `reload_weights(weights_path=...)` reads a directory in
place, `/reset_prefix_cache` forgets what the old weights computed, `/update_weight_version` names them, `/resume` goes
on. Versions without `/pause` or `/update_weight_version` answer 404 there; since whoever calls this has no request
under way, they are not needed. Whether a version knows `weights_path` shows in its answer: those that do not say 500.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import httpx

from crosschip.train.rl.rollouts.errors import BadAnswer
from crosschip.train.rl.rollouts.publishing import Publication

__all__ = ["load_into_vllm"]

Post = Callable[[str, dict[str, Any], dict[str, str]], Awaitable[httpx.Response]]

_NOT_THERE = (404, 405)


async def load_into_vllm(post: Post, publication: Publication) -> None:
    """Replace the weights. `post(path, body, query)` sends one request.

    A server whose reload failed is left paused: nobody knows which weights it has.

    Raises:
        BadAnswer: a step failed; the message says which.
    """
    paused = await _step(post, "/pause", {}, {"mode": "wait"}, may_lack=True) is not None
    reload = {"method": "reload_weights", "kwargs": {"weights_path": str(publication.path)}}
    await _step(post, "/collective_rpc", reload, {})
    reset = await _step(post, "/reset_prefix_cache", {}, {})
    if isinstance(reset, dict) and reset.get("success") is False:
        raise BadAnswer("failed", "/reset_prefix_cache: its cache still holds what the old weights computed")
    await _step(post, "/update_weight_version", {"new_version": publication.name}, {}, may_lack=True)
    if paused:
        await _step(post, "/resume", {}, {})


async def _step(post: Post, path: str, body: dict[str, Any], query: dict[str, str], may_lack: bool = False) -> Any:
    """What the step answers (True for nothing); None where the server lacks it and may."""
    response = await post(path, body, query)
    if response.status_code in _NOT_THERE:
        if may_lack:
            return None
        raise BadAnswer("refused", f"{path} is not there; start vLLM with VLLM_SERVER_DEV_MODE=1")
    if response.status_code >= 300:
        raise BadAnswer("failed", f"{path}: HTTP {response.status_code} {response.text[:300]}")
    try:
        return response.json()
    except Exception:  # nothing, or nothing that can be read: the status says that the step is done
        return True
