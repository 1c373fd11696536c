"""`crosschip chat`: a conversation in the terminal, with a server or with a model directory.

Standard input that is not a terminal is read one line a turn, so that the command can stand in a pipe.
"""

from __future__ import annotations

import json
import os
import re
import ssl
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import httpx

from crosschip.errors import ServeError
from crosschip.golden.scoring_http import authorization
from crosschip.serve.api.listening import LOOPBACK

__all__ = ["chat_terminal"]

# What a model writes is shown, not obeyed: control characters, escape sequences among them, are left out.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


def chat_terminal(
    target: str,
    *,
    temperature: float | None = None,
    max_tokens: int | None = None,
    device: str = "auto",
    lines: TextIO | None = None,
    out: TextIO | None = None,
) -> None:
    """Chat until `/quit`, the end of input, or Ctrl-C at the prompt; Ctrl-C in an answer stops only that.

    Args:
        target: the URL of a running server, or a model directory, which is then loaded and served to this chat alone.
            A server that wants an API key gets that of the variable CROSSCHIP_API_KEY.
        temperature: None takes the model's default.
        max_tokens: of each answer; None takes what fits.
        device: where a directory's model runs.
        lines: standard input unless given.
        out: standard output unless given.

    Raises:
        ServeError: nothing answers at the URL, it refuses the key, the directory does not exist, or a piped turn was
            refused.
        GoldenError: a key that no header can carry.
        ModelError: a directory this code cannot run.
    """
    lines, out = lines or sys.stdin, out or sys.stdout
    with ExitStack() as stack:
        url = target.rstrip("/").removesuffix("/v1")
        if not target.startswith(("http://", "https://")):
            url = stack.enter_context(_served_here(Path(target), device, out))
        client = stack.enter_context(_client(url))
        options = {"temperature": temperature, "max_tokens": max_tokens}
        chat = _Chat(client, {name: value for name, value in options.items() if value is not None}, out)
        chat.greet()
        _converse(chat, lines, out)


def _client(url: str) -> httpx.Client:
    """HTTP to the server, with the user's key. A proxy of the environment is for other machines than this one."""
    headers = authorization(os.environ.get("CROSSCHIP_API_KEY"))
    timeout = httpx.Timeout(10, read=None)
    try:
        if httpx.URL(url).host not in LOOPBACK:
            return httpx.Client(base_url=url, headers=headers, timeout=timeout)
    except httpx.InvalidURL as error:
        raise ServeError(f"{url} is no address: {error}", "give http://HOST:PORT of `crosschip serve`") from None
    # The environment's certificates (SSL_CERT_FILE) hold still; without it httpx would take its own alone.
    certificates = ssl.create_default_context()
    return httpx.Client(base_url=url, headers=headers, timeout=timeout, trust_env=False, verify=certificates)


def _served_here(directory: Path, device: str, out: TextIO) -> Any:
    if not directory.is_dir():
        raise ServeError(
            f"{directory} is neither a model directory nor a URL",
            "give a directory with config.json and safetensors, or http://HOST:PORT of `crosschip serve`",
        )
    print(f"loading {directory} ...", file=out, flush=True)
    # Only a chat that must compute needs torch and a server.
    from crosschip.serve.api.server import background_server
    from crosschip.serve.certificate import find_status
    from crosschip.serve.engine.loading import load_engine

    status = find_status(directory, device, None, tell=lambda line: print(line, file=out, flush=True))
    return background_server(load_engine(directory, max_batch_size=1, device=device, certificate=status))


def _converse(chat: _Chat, lines: TextIO, out: TextIO) -> None:
    at_terminal = lines.isatty()
    for line in _turns(lines, at_terminal, out):
        if line in ("/quit", "/exit"):
            return
        if line == "/new":
            chat.messages.clear()
        elif line:
            try:
                chat.turn(line)
            except ServeError as error:
                if not at_terminal:  # a pipe must not go on as if the turn had been answered
                    raise
                print(f"\n{error}", file=out, flush=True)


def _turns(lines: TextIO, at_terminal: bool, out: TextIO) -> Iterator[str]:
    """Lines without their end. At a terminal each is asked for, with editing where readline is there."""
    if not at_terminal:
        try:
            yield from (line.strip() for line in lines)
        except UnicodeDecodeError as error:
            remedy = f"convert it, for example with `iconv -t {error.encoding}`"
            raise ServeError(f"the input is no text in {error.encoding}: {error.reason}", remedy) from None
        return
    with suppress(ImportError):
        import readline  # noqa: F401  (input() edits lines once it is imported)
    while True:
        try:
            yield input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print(file=out)
            return


@dataclass
class _Chat:
    """The conversation so far, and where it is held."""

    client: httpx.Client
    options: dict[str, Any]
    out: TextIO

    def __post_init__(self) -> None:
        self.messages: list[dict[str, str]] = []
        self._styled = self.out.isatty() and "NO_COLOR" not in os.environ

    def greet(self) -> None:
        """Say what answers here, and in which state."""
        try:
            response = self.client.get("/v1/models")
            _refuse_without_key(response)
            response.raise_for_status()
            card = response.json()["data"][0]
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, IndexError) as error:
            raise ServeError(
                f"no OpenAI-compatible server at {self.client.base_url}: {error}",
                "start one with `crosschip serve DIR`, or give the directory itself",
            ) from error
        self.options["model"] = card["id"]
        status = card.get("crosschip", {}).get("certificate", "UNCERTIFIED")
        self._write(f"{card['id']} ({status})   /new begins again, /quit ends, Ctrl-C stops an answer\n")

    def turn(self, text: str) -> None:
        """Ask, and write the answer as it comes; an answer that was stopped stays in the conversation as it is."""
        self.messages.append({"role": "user", "content": _whole(text)})
        answer: list[str] = []
        try:
            self._stream(answer)
        except KeyboardInterrupt:
            self._write((_PLAIN if self._styled else "") + "\n[stopped]")
        except (httpx.HTTPError, ServeError) as error:
            self.messages.pop()
            self._write(_PLAIN if self._styled else "")
            if isinstance(error, ServeError):
                raise
            raise ServeError(f"the server went away: {error}", "see its log, and start it again") from error
        self.messages.append({"role": "assistant", "content": _whole("".join(answer))})
        self._write("\n")

    def _stream(self, answer: list[str]) -> None:
        body = {"messages": self.messages, "stream": True, **self.options}
        reasoning = False
        with self.client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                _refuse_without_key(response)
                raise _refusal(response.text)
            for delta in _deltas(response):
                if thought := delta.get("reasoning_content"):
                    self._write(("" if reasoning else self._opening) + _shown(thought))
                    reasoning = True
                if content := delta.get("content"):
                    self._write((self._closing + "\n\n" if reasoning else "") + _shown(content))
                    reasoning = False
                    answer.append(content)
        if reasoning:
            self._write(self._closing)

    @property
    def _opening(self) -> str:
        """What sets reasoning apart: dim letters, or tags where there are no letters to dim."""
        return _DIM if self._styled else "<think>"

    @property
    def _closing(self) -> str:
        return _PLAIN if self._styled else "</think>"

    def _write(self, text: str) -> None:
        encoding = self.out.encoding or "utf-8"
        self.out.write(text.encode(encoding, "replace").decode(encoding))
        self.out.flush()


def _whole(text: str) -> str:
    """With the halves of a surrogate pair joined, which may come in two parts; one alone is no character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _shown(text: str) -> str:
    return _CONTROL.sub("", text)


def _lines(response: httpx.Response) -> Iterator[str]:
    """An event stream's lines. httpx's own would end at U+2028, too, which may stand in an answer."""
    held = ""
    for text in response.iter_text():
        *whole, held = (held + text).split("\n")
        yield from (line.removesuffix("\r") for line in whole)
    yield held


def _refuse_without_key(response: httpx.Response) -> None:
    if response.status_code not in (401, 403):
        return
    has_sent = "authorization" in response.request.headers
    raise ServeError(
        f"the server at {response.request.url.host} refuses " + ("the API key" if has_sent else "who has no API key"),
        "export CROSSCHIP_API_KEY=... with a key that it knows (`crosschip serve --new-key NAME` makes one)",
    )


def _deltas(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in _lines(response):
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or data == "[DONE]":
            continue
        try:
            chunk = json.loads(data)
            if chunk.get("error") is not None:
                raise _refusal(data)
            deltas = [choice["delta"] for choice in chunk["choices"]]
        except (ValueError, KeyError, TypeError, AttributeError):
            problem = f"the server sent what is no part of a chat's answer: {data[:80]!r}"
            raise ServeError(problem, "give the address of an OpenAI-compatible server") from None
        yield from deltas


def _refusal(body: str) -> ServeError:
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = body[:300]
    return ServeError(f"the server refused: {message}", "shorten the conversation with /new, or mend what it names")
