"""The verbs that answer: serve, chat."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from crosschip.cli.options import ChipOption, HostOption, PortOption

__all__ = ["chat", "serve"]


def serve(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A model directory in the published layout.")],
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
    model_name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The name in the API; else the directory's.", show_default=False),
    ] = None,
    require_certificate: Annotated[
        bool, typer.Option("--require-certificate", help="Refuse a model without a valid certificate.")
    ] = False,
) -> None:
    """Serve a model: an OpenAI-compatible API at /v1 and a chat page at /."""
    from crosschip.serve import serve as serve_directory

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
    )


def chat(
    target: Annotated[str, typer.Argument(metavar="DIR_OR_URL", help="A model directory, or a server's address.")],
) -> None:
    """Chat in the terminal with a model directory or with a running server."""
    from crosschip.serve import chat_terminal

    chat_terminal(target)
