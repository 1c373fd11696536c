"""`crosschip chat`: in a pipe, in a terminal, against a URL and against a directory."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from crosschip.errors import ServeError
from crosschip.serve import chat_terminal
from tests.serve.conftest import CONVERSATIONS, REASONING, RunningServer


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
