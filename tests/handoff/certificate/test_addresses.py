"""An engine behind an address: what it tells of itself stands in the certificate, and what it does not tell, too."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from crosschip.errors import GoldenError
from crosschip.golden.scoring_engine import open_scorer
from crosschip.handoff.answers import compare_answers
from crosschip.handoff.certificate.engine_codec import EngineCodec, told_by
from crosschip.handoff.handing_off import certify_directory

Answers = dict[str, object]


@pytest.fixture
def answering() -> Iterator[Callable[[Answers], str]]:
    """The address of an engine that answers some paths, with text or with what a function makes of the request."""
    servers = []

    def start(answers: Answers) -> str:
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                said = answers.get(self.path)
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else {}
                said = said(body) if callable(said) else said
                if said is None:
                    self.send_error(404)
                    return
                data = said if isinstance(said, bytes) else json.dumps(said).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_POST = do_GET

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("answers", "version"),
    [
        ({"/version": {"version": "0.32.0"}}, "0.32.0"),
        ({"/props": {"build_info": "b6100-abc"}}, "b6100-abc"),
        ({"/version": {"version": 3}, "/props": b"text"}, None),
        ({}, None),
    ],
)
def test_the_version_is_asked_and_what_is_not_told_is_not_covered(
    answering: Callable[[Answers], str],
    copied: Callable[[str], Path],
    bundle_dir: Path,
    answers: Answers,
    version: str | None,
) -> None:
    url = answering(answers)
    assert told_by(url) == ({} if version is None else {"version": version})
    document = certify_directory(copied("hf"), bundle_dir, engines=[url], chip="cpu").certificate.document
    replay = next(each for each in document["replays"] if each["engine"]["name"] == url)
    assert replay["engine"].get("version") == version
    unknown = "flags" if version else "version and flags"
    assert any(f"the engine's {unknown}: what answers" in words for words in document["not_covered"])


@pytest.mark.parametrize(("begin", "end"), [("<s>", ""), ("", "</s>"), ("<s>", "</s>"), ("", "")])
def test_what_an_engine_adds_by_itself_is_asked(answering: Callable[[Answers], str], begin: str, end: str) -> None:
    def tokenize(body: dict[str, object]) -> object:
        added = ([1] if begin else []), ([2] if end else [])
        return {"tokens": [*added[0], 7, *added[1]] if body["add_special"] else [7]}

    url = answering({"/tokenize": tokenize, "/props": {"bos_token": "<s>", "eos_token": "</s>"}})
    assert EngineCodec(url).added() == (begin, end)


def test_an_address_as_clients_of_openai_write_it_tells_its_version_as_well(
    answering: Callable[[Answers], str],
) -> None:
    assert told_by(f"{answering({'/version': {'version': '0.32.0'}})}/v1/") == {"version": "0.32.0"}


def test_an_engine_that_drips_its_version_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crosschip.handoff.certificate.engine_codec._ASKED_S", 0.5)

    class Dripping(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):  # the other side went
                for _ in range(300):
                    self.wfile.write(b" ")
                    time.sleep(0.1)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Dripping)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    began = time.monotonic()
    assert told_by(f"http://127.0.0.1:{server.server_port}") == {}
    assert time.monotonic() - began < 20
    server.shutdown()
    server.server_close()


def test_an_address_with_a_password_is_refused_and_not_shown(copied: Callable[[str], Path], bundle_dir: Path) -> None:
    url = "http://me:open-sesame@127.0.0.1:9/v1"
    asked: list[Callable[[], object]] = [
        lambda: certify_directory(copied("hf"), bundle_dir, engines=[url], chip="cpu"),
        lambda: compare_answers(url, url),
        lambda: open_scorer(url),
    ]
    for ask in asked:
        with pytest.raises(GoldenError, match=r"address of 127.0.0.1:9 holds a name or a password") as caught:
            ask()
        assert "sesame" not in str(caught.value)
