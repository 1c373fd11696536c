"""`crosschip serve`: load, bind, say loudly what is served, answer until told to end."""

from __future__ import annotations

import errno
import logging
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
import uvicorn
from fastapi import FastAPI

from crosschip.errors import ServeError
from crosschip.serve.api.app import create_app
from crosschip.serve.api.served import ServedModel
from crosschip.serve.engine.engine import Engine
from crosschip.serve.engine.loading import load_engine

__all__ = ["background_server", "bind", "serve"]

logger = logging.getLogger("crosschip.serve")

_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}  # auto: the checkpoint's
SHUTDOWN_GRACE_S = 3  # answers under way get this long after SIGTERM, then they are ended


def serve(
    directory: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    max_batch_size: int = 16,
    max_model_len: int | None = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    device: str = "auto",
    model_name: str | None = None,
    require_certificate: bool = False,
    max_body_bytes: int = 16 * 2**20,
) -> None:
    """Serve a model directory until SIGTERM or SIGINT. Port 0 lets the system choose; the choice is printed.

    Raises:
        ServeError: a certificate was required, the port is taken, or the limits cannot be met.
        ModelError: a directory this code cannot run.
    """
    if require_certificate:
        raise ServeError(
            f"{directory} has no certificate, and --require-certificate refuses to serve without",
            "serve it without --require-certificate; certificates are not built yet",
        )
    listener = bind(host, port)
    _log_to_stderr()
    print(f"loading {directory} ...", flush=True)
    engine = load_engine(
        directory, max_batch_size=max_batch_size, max_model_len=max_model_len, dtype=_DTYPES[dtype], device=device
    )
    try:
        app = create_app(engine, model_name=model_name, max_body_bytes=max_body_bytes)
        _announce(app.state.served, f"http://{_url_host(host)}:{listener.getsockname()[1]}")
        with _signals_end_cleanly():
            _Server(_uvicorn_config(app), engine).run(sockets=[listener])
    finally:
        engine.close()
    print("ended", flush=True)


class _Server(uvicorn.Server):
    """Ends the engine a while after the signal to end: answers under way then get their last event, and end."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal (uvicorn)."""
        last_moment = threading.Timer(SHUTDOWN_GRACE_S, self._engine.close)
        last_moment.daemon = True
        last_moment.start()
        super().handle_exit(sig, frame)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, bound before anything slow happens.

    Raises:
        ServeError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        remedy = "give another --host"
        if error.errno == errno.EADDRINUSE:
            remedy = "end what listens there, or give another --port (0 lets the system choose)"
        elif error.errno == errno.EACCES:
            remedy = "ports under 1024 need a privilege; give another --port"
        raise ServeError(f"cannot listen on {host}:{port}: {error.strerror or error}", remedy) from error
    return listener


@contextmanager
def background_server(engine: Engine, **app_options: Any) -> Iterator[str]:
    """Serve an engine on a free local port from a thread while the block runs; yields the URL."""
    listener = bind("127.0.0.1", 0)
    server = uvicorn.Server(_uvicorn_config(create_app(engine, **app_options)))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        engine.close()


def _uvicorn_config(app: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=SHUTDOWN_GRACE_S + 5,
        server_header=False,
        lifespan="off",
    )


@contextmanager
def _signals_end_cleanly() -> Iterator[None]:
    """The server takes SIGTERM and SIGINT, ends, and then raises them again; here they have done their work."""
    caught = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda *_: None) for number in caught]
    try:
        yield
    finally:
        for number, handler in zip(caught, before, strict=True):
            signal.signal(number, handler)


def _log_to_stderr() -> None:
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        logger.addHandler(handler)


def _announce(served: ServedModel, url: str) -> None:
    info, tokenizer = served.engine.info, served.tokenizer
    bar = "*" * 78
    print(f"{served.name}: {info.num_parameters / 1e6:.1f} M parameters, {info.dtype} on {info.chip}")
    print(f"up to {info.max_batch_size} answers at a time, {info.max_model_len} tokens each with its prompt")
    if tokenizer is None:
        print("no tokenizer in the directory: /v1/completions takes and gives token ids, chat is refused")
    elif not tokenizer.has_chat_template:
        print("no chat template in the directory: /v1/completions only, chat is refused")
    if info.certificate == "UNCERTIFIED":
        print(bar)
        print("UNCERTIFIED: nothing shows that this model answers here as it did on the chip that trained it")
        print(bar)
    print(f"chat: {url}   API: {url}/v1   (Ctrl-C ends)", flush=True)


def _url_host(host: str) -> str:
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
    return f"[{shown}]" if ":" in shown and not shown.startswith("[") else shown
