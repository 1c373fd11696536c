"""`crosschip serve`: load, bind, say loudly what is served, answer until told to end."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import uvicorn

from crosschip.certificate import Status
from crosschip.certificate.signing import read_public_key
from crosschip.serve.api.app import create_app
from crosschip.serve.api.ending import GRACE_S, EndingServer
from crosschip.serve.api.hosts import hosts_to_allow
from crosschip.serve.api.listening import (
    LOOPBACK,
    Tls,
    bind,
    log_to_stderr,
    url_of,
    uvicorn_config,
)
from crosschip.serve.api.served import ServedModel
from crosschip.serve.certificate import certified_or_refused, find_status
from crosschip.serve.engine.engine import Engine
from crosschip.serve.engine.loading import load_engine
from crosschip.serve.limits import Limits, load_keys
from crosschip.serve.tokenizer import ServingTokenizer

__all__ = ["EngineOptions", "background_server", "bind", "serve"]

logger = logging.getLogger("crosschip.serve")

_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}  # auto: the checkpoint's
SHUTDOWN_GRACE_S = 3  # answers under way get this long after SIGTERM, then they are ended


@dataclass(frozen=True)
class EngineOptions:
    """How the engine computes; see `load_engine`."""

    cache_tokens: int | None = None
    prefix_cache: bool = True
    deterministic: bool = False
    speculative: bool = False
    record_routes: bool = False


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
    public_key: Path | None = None,
    limits: Limits | None = None,
    tls: Tls | None = None,
    engine_options: EngineOptions | None = None,
    drain_s: float = SHUTDOWN_GRACE_S,
    tool_format: str | None = None,
    allowed_hosts: Sequence[str] = (),
) -> None:
    """Serve a model directory until SIGTERM or SIGINT. Port 0 lets the system choose; the choice is printed.

    Answers under way at the signal have `drain_s` to end. `tool_format` is found from the chat template unless named.
    With `public_key`, a PEM file, only certificates that its owner signed are believed, those of later weights too.
    `allowed_hosts` are names beside `host` and the loopback ones; see `hosts_to_allow`.

    Raises:
        ServeError: a certificate was required, the port is taken, the limits cannot be met, keys or TLS files cannot
            be read, or the tool format is not known.
        ModelError: a directory this code cannot run.
        HandoffError: the public key cannot be read.
    """
    limits = limits or Limits()
    signer = None if public_key is None else read_public_key(public_key)
    if limits.api_keys is not None:
        load_keys(limits.api_keys)  # told before anything slow happens
    if tls is not None:
        tls.check()
    listener = bind(host, port)
    log_to_stderr(logger)

    def find_certificate(of: Path, computed_in: str | None) -> Status:
        status = find_status(of, device, computed_in, _say, signer)
        if require_certificate:
            certified_or_refused(of, status)
        return status

    status = find_certificate(directory, None if dtype == "auto" else dtype)
    print(f"loading {directory} ...", flush=True)
    engine = load_engine(
        directory,
        max_batch_size=max_batch_size,
        max_model_len=max_model_len,
        dtype=_DTYPES[dtype],
        device=device,
        certificate=status,
        **vars(engine_options or EngineOptions()),
    )
    try:
        app = create_app(
            engine,
            model_name=model_name,
            limits=limits,
            find_certificate=find_certificate,
            tool_format=tool_format,
            allowed_hosts=hosts_to_allow(host, limits.api_keys is not None, allowed_hosts),
        )
    except BaseException:
        engine.close()
        raise
    server = EndingServer(uvicorn_config(app, grace_s=drain_s + GRACE_S, tls=tls), drain_s, break_off=engine.close)
    with server.ending_at_signals():
        try:
            _announce(app.state.served, url_of(host, listener, tls))
            _tell_if_open(host, limits)
            server.run(sockets=[listener])
        finally:
            engine.close()
    print("ended", flush=True)


@contextmanager
def background_server(engine: Engine, **app_options: Any) -> Iterator[str]:
    """Serve an engine on a free local port from a thread while the block runs; yields the URL."""
    listener: socket.socket = bind("127.0.0.1", 0)
    app_options = {"allowed_hosts": hosts_to_allow("127.0.0.1", asks_for_keys=False)} | app_options
    server = uvicorn.Server(uvicorn_config(create_app(engine, **app_options), grace_s=SHUTDOWN_GRACE_S + GRACE_S))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        engine.close()


def _say(line: str) -> None:
    print(line, flush=True)


def _announce(served: ServedModel, url: str) -> None:
    info, tokenizer = served.engine.info, served.tokenizer
    bar = "*" * 78
    print(f"{served.name}: {info.num_parameters / 1e6:.1f} M parameters, {info.dtype} on {info.chip}")
    print(f"up to {info.max_batch_size} answers at a time, {info.max_model_len} tokens each with its prompt")
    if tokenizer is None:
        print("no tokenizer in the directory: /v1/completions takes and gives token ids, chat is refused")
    elif not tokenizer.has_chat_template:
        print("no chat template in the directory: /v1/completions only, chat is refused")
    else:
        print(_told_tools(served, tokenizer))
    if info.certificate.is_certified:
        print("CERTIFIED: its files are the certified ones, for this engine, this kind of chip and this dtype")
    else:
        print(bar)
        print("UNCERTIFIED: nothing shows that this model answers here as it did on the chip that trained it")
        print(info.certificate.problem)
        print(bar)
        logger.warning("UNCERTIFIED: %s", info.certificate.problem)
    print(f"chat: {url}   API: {url}/v1   (Ctrl-C ends)", flush=True)


def _told_tools(served: ServedModel, tokenizer: ServingTokenizer) -> str:
    if not tokenizer.tool_support.shows_tools:
        return "no tools: the chat template does not know them, requests with tools are refused"
    if served.tool_format is None:
        return "no tools: how this model writes calls is not seen from its chat template (--tool-format names it)"
    return f"tools: calls are read as {served.tool_format.name}"


def _tell_if_open(host: str, limits: Limits) -> None:
    if host not in LOOPBACK and limits.api_keys is None:
        line = "OPEN: other machines can reach this address, and no API keys are asked for (--api-keys)"
        print(line, flush=True)
        logger.warning(line)
