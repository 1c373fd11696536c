"""The verbs that answer: serve, chat."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from crosschip.cli.options import ChipOption, HostOption, PortOption
from crosschip.errors import ServeError

if TYPE_CHECKING:
    from crosschip.serve.api.listening import Tls
    from crosschip.serve.limits import Limits

__all__ = ["chat", "serve"]

_FOR_GATEWAY = ("gateway", "host", "port", "require_certificate", "public_key", "tls_cert", "tls_key", "allowed_host")


def _number(value: float) -> float:
    """An option's bounds do not hold for what is no number."""
    if math.isnan(value):
        raise typer.BadParameter(f"{value} is no number")
    return value


def serve(
    context: typer.Context,
    directory: Annotated[
        Path | None,
        typer.Argument(metavar="DIR", help="A model directory in the published layout.", show_default=False),
    ] = None,
    gateway: Annotated[
        Path | None,
        typer.Option(
            "--gateway",
            metavar="FILE",
            help="Serve the engines that this TOML file names, instead of a directory.",
            show_default=False,
        ),
    ] = None,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    chip: ChipOption = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], typer.Option(help="Compute type; auto is the checkpoint's own.")
    ] = "auto",
    max_batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Requests computed together.")] = 16,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            min=2, metavar="N", help="Tokens of prompt and answer; else the model's limit.", show_default=False
        ),
    ] = None,
    cache_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Tokens of all requests that the cache holds; else what fits.", show_default=False
        ),
    ] = None,
    prefix_cache: Annotated[
        bool, typer.Option("--prefix-cache/--no-prefix-cache", help="Compute a beginning that prompts share once.")
    ] = True,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="An answer does not depend on what else is computed; slower.")
    ] = False,
    speculative: Annotated[
        bool, typer.Option("--speculative", help="Draft tokens with the model's multi-token-prediction module.")
    ] = False,
    record_routes: Annotated[
        bool, typer.Option("--record-routes", help="Keep which experts tokens take, for training to replay them.")
    ] = False,
    model_name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The name in the API; else the directory's.", show_default=False),
    ] = None,
    tool_format: Annotated[
        Literal["hermes", "deepseek-v3", "deepseek-v3.1", "llama-3.1"] | None,
        typer.Option(
            "--tool-format",
            help="How the model writes tool calls; else found from its chat template.",
            show_default=False,
        ),
    ] = None,
    require_certificate: Annotated[
        bool, typer.Option("--require-certificate", help="Refuse a model without a valid certificate.")
    ] = False,
    public_key: Annotated[
        Path | None,
        typer.Option(
            "--public-key",
            metavar="FILE",
            help="Believe only certificates that this key signed (PEM, FILE.pub).",
            show_default=False,
        ),
    ] = None,
    api_keys: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Ask for API keys: the file of their hashes.", show_default=False),
    ] = None,
    new_key: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Make an API key, print it and its lines for the file.", show_default=False),
    ] = None,
    admin: Annotated[bool, typer.Option("--admin", help="With --new-key: a key that may administrate.")] = False,
    requests_per_minute: Annotated[
        float | None, typer.Option(metavar="N", help="For each key, or all clients together.", show_default=False)
    ] = None,
    max_concurrent: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Requests under way for each key.", show_default=False),
    ] = None,
    max_prompt_chars: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Characters of a prompt.", show_default=False)
    ] = None,
    max_request_s: Annotated[
        float | None, typer.Option(metavar="S", help="Seconds that an answer may take.", show_default=False)
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Certificate chain for HTTPS, PEM.", show_default=False)
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Its private key, PEM.", show_default=False)
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Another name by which it may be asked, as behind a proxy; repeatable.",
            show_default=False,
        ),
    ] = None,
    drain_s: Annotated[
        float,
        typer.Option(
            min=0,
            max=86_400,
            metavar="S",
            help="How long answers under way have after the signal to end.",
            callback=_number,
        ),
    ] = 3.0,
) -> None:
    """Serve a model: an OpenAI-compatible API at /v1 and a chat page at /. Or be the gateway to several engines."""
    if new_key is not None:
        _print_new_key(new_key, admin)
        return
    tls = _tls(tls_cert, tls_key)
    limits = {
        "api_keys": api_keys,
        "requests_per_minute": requests_per_minute,
        "max_concurrent": max_concurrent,
        "max_prompt_chars": max_prompt_chars,
        "max_request_s": max_request_s,
    }
    if gateway is not None:
        _refuse_beside_gateway(context)
        from crosschip.serve.gateway.server import serve_gateway

        serve_gateway(
            gateway,
            host,
            port,
            require_certificate=require_certificate,
            public_key=public_key,
            tls=tls,
            allowed_hosts=allowed_host or (),
        )
        return
    if directory is None:
        raise ServeError("nothing to serve was named", "give a model directory, or --gateway FILE")
    from crosschip.serve import serve as serve_directory
    from crosschip.serve.api.server import EngineOptions

    serve_directory(
        directory,
        host=host,
        port=port,
        max_batch_size=max_batch_size,
        max_model_len=max_model_len,
        dtype=dtype,
        device=chip,
        model_name=model_name,
        require_certificate=require_certificate,
        public_key=public_key,
        limits=_limits(limits),
        tls=tls,
        engine_options=EngineOptions(cache_tokens, prefix_cache, deterministic, speculative, record_routes),
        drain_s=drain_s,
        tool_format=tool_format,
        allowed_hosts=allowed_host or (),
    )


def _print_new_key(name: str, admin: bool) -> None:
    from crosschip.serve.limits import new_key

    secret, lines = new_key(name, admin)
    print(f"the key, shown once:\n\n{secret}\n\nfor the file of --api-keys or limits.api_keys:\n\n{lines}")


def _tls(certificate: Path | None, key: Path | None) -> Tls | None:
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise ServeError("--tls-cert and --tls-key belong together", "give both, or neither for plain HTTP")
    from crosschip.serve.api.listening import Tls

    return Tls(certificate, key)


def _refuse_beside_gateway(context: typer.Context) -> None:
    """What was asked for is done or refused: most options are about an engine of one's own."""
    for name, value in context.params.items():
        source = context.get_parameter_source(name)
        if name in _FOR_GATEWAY or source is None or source.name != "COMMANDLINE":
            continue
        if name == "directory":
            raise ServeError(f"--gateway and the directory {value} exclude each other", "give one of them")
        option = "--" + name.replace("_", "-")
        raise ServeError(f"{option} means nothing beside --gateway", f"write it into the file, or leave {option} out")


def _limits(values: Mapping[str, object]) -> Limits:
    from pydantic import ValidationError

    from crosschip.serve.limits import Limits

    try:
        return Limits.model_validate(values)
    except ValidationError as error:
        fault = error.errors()[0]
        name = str(fault["loc"][0]).replace("_", "-")
        raise ServeError(f"--{name} {fault['input']}: {fault['msg']}", "give another value") from None


def chat(
    target: Annotated[
        str,
        typer.Argument(
            metavar="DIR_OR_URL",
            help="A model directory, or a server's address; a key that it wants is taken from CROSSCHIP_API_KEY.",
        ),
    ],
) -> None:
    """Chat in the terminal with a model directory or with a running server."""
    from crosschip.serve import chat_terminal

    chat_terminal(target)
