"""The serve room: the engine, its OpenAI-compatible API, the chat page and the chat in the terminal.

The names below are loaded at their first use: talking to a server over HTTP needs neither torch nor FastAPI.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crosschip.serve.api.app import create_app
    from crosschip.serve.api.server import serve
    from crosschip.serve.chat import chat_terminal
    from crosschip.serve.engine.loading import load_engine

__all__ = ["chat_terminal", "create_app", "load_engine", "serve"]

_PLACES = {
    "chat_terminal": "crosschip.serve.chat",
    "create_app": "crosschip.serve.api.app",
    "load_engine": "crosschip.serve.engine.loading",
    "serve": "crosschip.serve.api.server",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
