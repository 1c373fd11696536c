"""`crosschip chat`: in a pipe, in a terminal, against a URL and against a directory."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from crosschip.errors import ServeError
from crosschip.serve import chat_terminal
from tests.serve.conftest import CONVERSATIONS, REASONING, RunningServer
from tests.serve.gateway.conftest import in_thread


def test_each_line_of_a_pipe_is_a_turn(taught_server: RunningServer) -> None:
    out = io.StringIO()
    lines = io.StringIO("What is 12 + 30?\n\n/new\nSay hello.\n/quit\nCount.\n")
    chat_terminal(taught_server.url, lines=lines, out=out)
    text = out.getvalue()
    assert "taught-tiny (UNCERTIFIED)" in text
    assert f"<think>{REASONING}</think>\n\n{CONVERSATIONS[0][2]}\n" in text
    assert CONVERSATIONS[1][2] in text
    assert "1 2 3" not in text, "nothing after /quit"
    assert "\x1b" not in text


def test_a_directory_is_served_to_this_chat_alone(taught_dir: Path) -> None:
    out = io.StringIO()
    chat_terminal(str(taught_dir), device="cpu", lines=io.StringIO("Say hello.\n"), out=out)
    assert CONVERSATIONS[1][2] in out.getvalue()


def test_what_is_not_there_is_told() -> None:
    with pytest.raises(ServeError, match="crosschip serve DIR"):
        chat_terminal("http://127.0.0.1:9", lines=io.StringIO(), out=io.StringIO())
    with pytest.raises(ServeError, match="no address"):
        chat_terminal("http://HOST:PORT", lines=io.StringIO(), out=io.StringIO())
    with pytest.raises(ServeError, match="neither a model directory nor a URL"):
        chat_terminal("/nowhere", lines=io.StringIO(), out=io.StringIO())


def test_a_refused_turn_ends_a_pipe_with_an_error(bare_server: RunningServer) -> None:
    with pytest.raises(ServeError, match="no tokenizer"):
        chat_terminal(bare_server.url, lines=io.StringIO("Hi\n"), out=io.StringIO())


def test_talking_to_a_server_loads_no_torch(taught_server: RunningServer) -> None:
    program = (
        "import sys\nfrom crosschip.serve import chat_terminal\n"
        f"chat_terminal({taught_server.url!r})\nassert not {{'torch', 'fastapi'}} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], input="Say hello.\n", text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert CONVERSATIONS[1][2] in done.stdout


ANSWER = {"choices": [{"delta": {"content": "one\u2028two"}}]}


@pytest.fixture
def keyed_url() -> Iterator[str]:
    """A server that wants the key `secret`, and writes all characters as they are."""

    def is_known(request: Request) -> bool:
        return request.headers.get("authorization") == "Bearer secret"

    async def models(request: Request) -> Response:
        return JSONResponse({"data": [{"id": "m"}]} if is_known(request) else {}, 200 if is_known(request) else 401)

    async def chat(request: Request) -> Response:
        stream = f"data: {json.dumps(ANSWER, ensure_ascii=False)}\r\n\r\ndata: [DONE]\n\n"
        return Response(stream if is_known(request) else "", 200 if is_known(request) else 403)

    routes = [Route("/v1/models", models), Route("/v1/chat/completions", chat, methods=["POST"])]
    with in_thread(Starlette(routes=routes), lifespan=False) as url:
        yield url


def test_a_server_with_keys_is_given_that_of_the_environment(keyed_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setenv("CROSSCHIP_API_KEY", "secret\n")
    chat_terminal(keyed_url, lines=io.StringIO("Hi\n"), out=out)
    assert "one\u2028two\n" in out.getvalue(), "a separator of lines in an answer ends no event"
    for key, words in (("wrong", "refuses the API key"), (None, "who has no API key")):
        monkeypatch.setenv("CROSSCHIP_API_KEY", key) if key else monkeypatch.delenv("CROSSCHIP_API_KEY")
        with pytest.raises(ServeError, match=f"{words}.*\n.*CROSSCHIP_API_KEY"):
            chat_terminal(keyed_url, lines=io.StringIO(), out=out)


@contextmanager
def server_that_streams(*data: str) -> Iterator[tuple[str, list[Any]]]:
    """Its address, and the messages that it was sent."""
    asked: list[Any] = []

    async def models(_: Request) -> Response:
        return JSONResponse({"data": [{"id": "m"}]})

    async def chat(request: Request) -> Response:
        asked.append((await request.json())["messages"])
        return Response("".join(f"data:{each}\n\n" for each in data))

    routes = [Route("/v1/models", models), Route("/v1/chat/completions", chat, methods=["POST"])]
    with in_thread(Starlette(routes=routes), lifespan=False) as url:
        yield url, asked


@pytest.mark.parametrize("data", ["{", "7", "{}", '{"choices": [7]}', '{"choices": [{"text": "x"}]}'])
def test_what_is_no_part_of_an_answer_is_told(data: str) -> None:
    with server_that_streams(data) as (url, _), pytest.raises(ServeError, match="no part of a chat's answer"):
        chat_terminal(url, lines=io.StringIO("Hi\n"), out=io.StringIO())


def test_halves_of_a_character_and_letters_that_the_terminal_lacks() -> None:
    parts = [
        f'{{"choices": [{{"delta": {{"content": "{text}"}}}}], "error": null}}' for text in (r"\ud83d", r"\ude00ß")
    ]
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with server_that_streams(*parts, "[DONE]") as (url, asked):
        chat_terminal(url, lines=io.StringIO("Hi\udcff\nAnd?\n"), out=out)
    assert [message["content"] for message in asked[1]] == ["Hi\ufffd", "\U0001f600ß", "And?"]
    with server_that_streams("[DONE]") as (url, _), pytest.raises(ServeError, match="no text in utf-8"):
        chat_terminal(url, lines=io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"), out=out)


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_no_proxy_is_asked_for_this_machine(keyed_url: str, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.setenv("CROSSCHIP_API_KEY", "secret")
    out = io.StringIO()
    chat_terminal(keyed_url, lines=io.StringIO("Hi\n"), out=out)
    assert "one" in out.getvalue()


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, program: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ |= {"TERM": "xterm"}
            os.environ.pop("NO_COLOR", None)
            os.execv(sys.executable, [sys.executable, "-c", program])
        self.text = ""

    def wait_for(self, words: str) -> None:
        """Read until the words come; what was read up to their end is not looked at again."""
        self.wait_until(lambda: words in self.text, words)
        self.text = self.text.partition(words)[2]

    def wait_until(self, seen: Callable[[], bool], what: str) -> None:
        while not seen():
            readable, _, _ = select.select([self.fd], [], [], 60)
            assert readable, f"no {what!r} in {self.text!r}"
            try:
                self.text += os.read(self.fd, 4096).decode(errors="replace")
            except OSError:
                raise AssertionError(f"the program ended without {what!r}: {self.text!r}") from None

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def end(self) -> int:
        """The exit code; a program that does not end is killed and fails the test."""
        for _ in range(600):
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError(f"the program did not end: {self.text!r}")


def test_at_a_terminal_reasoning_is_dim_and_ctrl_c_stops_the_answer(
    taught_server: RunningServer, random_server: RunningServer
) -> None:
    chat = "from crosschip.serve import chat_terminal; chat_terminal({url!r}, temperature=0)"
    terminal = Terminal(chat.format(url=taught_server.url))
    terminal.wait_for("> ")
    terminal.type("What is 12 + 30?\n")
    terminal.wait_for("\x1b[2mThe")
    terminal.wait_for("\x1b[0m")
    terminal.wait_for("= 12`.")
    terminal.type("/quit\n")
    assert terminal.end() == 0

    terminal = Terminal(chat.format(url=random_server.url))
    terminal.wait_for("> ")
    terminal.type("What is this?\n")
    terminal.wait_for("this?")
    terminal.wait_until(lambda: len(terminal.text) > 20, "answer")
    os.kill(terminal.pid, signal.SIGINT)
    terminal.wait_for("[stopped]")
    terminal.wait_for("\n> ")
    terminal.type("/quit\n")
    assert terminal.end() == 0
