"""`crosschip serve --gateway` as a process: keys, drains, signals, TLS."""

from __future__ import annotations

import re
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from crosschip.certificate.document import seal_of, write_certificate
from crosschip.serve.limits import new_key
from tests.certificate.conftest import CHIP, document_of, replay_of
from tests.serve.conftest import RunningServer, logged_process
from tests.serve.gateway.conftest import (
    DONE,
    HEAD,
    LAST,
    QUESTION,
    TOKEN,
    ScriptedEngine,
    delta,
    event,
    make_tls,
    scripted,
    wait_until,
)


@contextmanager
def gateway_process(file: Path, *options: str) -> Iterator[tuple[RunningServer, str]]:
    command = [sys.executable, "-m", "crosschip", "serve", "--gateway", str(file), "--port", "0", *options]
    with logged_process(command, r"gateway: (https?://\S+)") as running:
        yield running, running.url


def write(path: Path, url: str, more: str = "") -> Path:
    path.write_text(f'[[engines]]\nname = "a"\nurl = "{url}"\nmodel = "m"\n[health]\ninterval_s = 0.1\n{more}')
    return path


def wait_until_ready(url: str, **options: object) -> None:
    wait_until(lambda: httpx.get(f"{url}/ready", **options).status_code == 200, "it is ready")  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_answers_end(tmp_path: Path, number: int) -> None:
    engine = ScriptedEngine(play=[HEAD, TOKEN, 1.5, TOKEN, LAST, DONE])
    with scripted(engine) as [engine_url], gateway_process(write(tmp_path / "g.toml", engine_url)) as (gateway, url):
        wait_until_ready(url)
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=QUESTION | {"stream": True}) as response:
            parts = response.iter_raw()
            first = next(parts)
            gateway.process.send_signal(number)
            assert first + b"".join(parts) == b"".join(part for part in engine.play if isinstance(part, bytes))
        assert gateway.process.wait(20) == 0
        rest = "".join(gateway.log)
        assert "Traceback" not in rest, rest
        assert rest.endswith("ended\n")


def test_what_does_not_end_in_time_is_told(tmp_path: Path) -> None:
    engine = ScriptedEngine(play=[HEAD, TOKEN, 60])
    file = "[forwarding]\ndrain_s = 0.5\n"
    with (
        scripted(engine) as [engine_url],
        gateway_process(write(tmp_path / "g.toml", engine_url, file)) as (gateway, url),
    ):
        wait_until_ready(url)
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=QUESTION | {"stream": True}) as response:
            parts = response.iter_raw()
            next(parts)
            gateway.process.send_signal(signal.SIGTERM)
            assert b"gateway_ended" in b"".join(parts)
        assert gateway.process.wait(20) == 0
        wait_until(lambda: engine.cancelled == 1, "the engine is told, too")


def test_admins_drain_engines_and_others_do_not(tmp_path: Path) -> None:
    alice, lines = new_key("alice")
    root, admin_lines = new_key("root", admin=True)
    (tmp_path / "keys.toml").write_text(lines + admin_lines)
    engine = ScriptedEngine()
    file = '[limits]\napi_keys = "keys.toml"\nmax_concurrent = 4\n'
    with scripted(engine) as [engine_url], gateway_process(write(tmp_path / "g.toml", engine_url, file)) as (_, url):
        wait_until_ready(url)
        user, admin = ({"authorization": f"Bearer {secret}"} for secret in (alice, root))
        drain = f"{url}/admin/drain"
        assert httpx.post(f"{url}/v1/chat/completions", json=QUESTION).status_code == 401
        assert httpx.post(f"{url}/v1/chat/completions", json=QUESTION, headers=user).status_code == 200
        assert httpx.post(drain, json={"engine": "a"}).status_code == 401
        assert httpx.post(drain, json={"engine": "a"}, headers=user).status_code == 403
        assert httpx.get(f"{url}/admin/engines", headers=user).status_code == 403
        assert httpx.post(drain, json={"engine": "zzz"}, headers=admin).status_code == 404
        assert httpx.post(drain, json={"engnie": "a"}, headers=admin).status_code == 400
        drained = httpx.post(drain, json={"engine": "a"}, headers=admin)
        assert drained.json() == {"engine": "a", "draining": True, "under_way": 0}
        assert httpx.post(f"{url}/v1/chat/completions", json=QUESTION, headers=user).status_code == 503
        httpx.post(f"{url}/admin/undrain", json={"engine": "a"}, headers=admin)
        assert httpx.get(f"{url}/admin/engines", headers=admin).json()["engines"][0]["draining"] is False
        httpx.post(drain, json={}, headers=admin)
        assert httpx.get(f"{url}/ready").json()["draining"] is True
        refused = httpx.post(f"{url}/v1/chat/completions", json=QUESTION, headers=user)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        httpx.post(f"{url}/admin/undrain", json={}, headers=admin)
        assert httpx.post(f"{url}/v1/chat/completions", json=QUESTION, headers=user).status_code == 200


def test_tls_by_files(tmp_path: Path) -> None:
    certificate, key = make_tls(tmp_path)
    options = ("--tls-cert", str(certificate), "--tls-key", str(key))
    engine = ScriptedEngine()
    with (
        scripted(engine) as [engine_url],
        gateway_process(write(tmp_path / "g.toml", engine_url), *options) as (_, url),
    ):
        assert url.startswith("https://")
        trust = ssl.create_default_context(cafile=str(certificate))
        wait_until_ready(url, verify=trust)
        response = httpx.post(f"{url}/v1/chat/completions", json=QUESTION, verify=trust)
        assert response.status_code == 200
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{url.replace('https', 'http')}/health")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tls-cert", "x"], "--tls-key"),
        (["--tls-cert", "x", "--tls-key", "y"], "TLS with x and y"),
        (["--max-concurrent", "3"], "--max-concurrent means nothing"),
        (["--max-batch-size", "16"], "--max-batch-size means nothing"),
        (["somewhere"], "exclude each other"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, options: list[str], words: str) -> None:
    file = write(tmp_path / "g.toml", "http://127.0.0.1:9")
    command = [sys.executable, "-m", "crosschip", "serve", "--gateway", str(file), "--port", "0", *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert words in ended.stderr, ended.stderr


def test_cross_origin_requests_are_closed_by_default(tmp_path: Path) -> None:
    origin = {"origin": "https://chat.example", "access-control-request-method": "POST"}
    engine = ScriptedEngine()
    path = tmp_path / "g.toml"
    with scripted(engine) as [engine_url]:
        with gateway_process(write(path, engine_url)) as (_, url):
            assert "access-control-allow-origin" not in httpx.options(f"{url}/v1/completions", headers=origin).headers
        text = write(path, engine_url).read_text()
        path.write_text('cors_origins = ["https://chat.example"]\n' + text)
        with gateway_process(path) as (_, url):
            allowed = httpx.options(f"{url}/v1/completions", headers=origin).headers["access-control-allow-origin"]
            assert allowed == "https://chat.example"
            asked = {"access-control-request-headers": "authorization, content-type, x-api-key, x-stainless-os"}
            assert httpx.options(f"{url}/v1/completions", headers=origin | asked).status_code == 200
            exposed = httpx.get(f"{url}/v1/models", headers=origin).headers["access-control-expose-headers"]
            assert {"Retry-After", "X-Request-Id", "X-Crosschip-Certificate"} <= set(exposed.split(", "))
            other = origin | {"origin": "https://evil.example"}
            assert "access-control-allow-origin" not in httpx.options(f"{url}/v1/completions", headers=other).headers


def test_an_engine_without_its_certificate_is_told_at_the_start(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    with scripted(engine) as [engine_url], gateway_process(write(tmp_path / "g.toml", engine_url)) as (gateway, _):
        assert "a: UNCERTIFIED: its table names no certified directory\n" in gateway.log


def test_a_certificate_of_another_chip_is_told_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "handed").mkdir()
    (tmp_path / "handed" / "config.json").write_text("{}")
    document = document_of(tmp_path / "handed", replays=[replay_of(engine={"name": "vllm"})])
    write_certificate(tmp_path / "handed", {**document, "seal": seal_of(document)})
    lines = []
    for name, chip_kind in (("right", CHIP), ("typo", "cpu (Intle, Xeon)")):
        lines += [f'[[engines]]\nname = "{name}"\nurl = "http://127.0.0.1:9"\nmodel = "m"\nkind = "vllm"']
        lines += [f'certified = {{ directory = "handed", chip_kind = "{chip_kind}", dtype = "float32" }}']
    (tmp_path / "g.toml").write_text("\n".join(lines))
    with gateway_process(tmp_path / "g.toml") as (gateway, _):
        assert "right: CERTIFIED\n" in gateway.log
        why = f"the certificate covers the chip {CHIP}, not cpu (Intle, Xeon)"
        assert f"typo: UNCERTIFIED: {why}\n" in gateway.log


def test_a_new_key_is_printed_once() -> None:
    command = [sys.executable, "-m", "crosschip", "serve", "--new-key", "alice", "--admin"]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    secret = re.search(r"^csk-\S{40,}$", printed, re.MULTILINE)
    assert secret is not None
    assert 'name = "alice"' in printed
    assert "admin = true" in printed
    assert printed.count(secret[0]) == 1


def test_a_hung_client_does_not_keep_the_gateway_from_ending(tmp_path: Path) -> None:
    engine = ScriptedEngine(play=[HEAD, *[event(delta("x" * 2**20))] * 64, 60])
    file = "[forwarding]\ndrain_s = 0.5\nslow_client_s = 1.0\n"
    with (
        scripted(engine) as [engine_url],
        gateway_process(write(tmp_path / "g.toml", engine_url, file)) as (gateway, url),
    ):
        wait_until_ready(url)
        begun, end = threading.Event(), threading.Event()

        def read_a_little() -> None:
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=QUESTION | {"stream": True}) as response:
                next(response.iter_raw(100))
                begun.set()
                end.wait(30)

        thread = threading.Thread(target=read_a_little, daemon=True)
        thread.start()
        assert begun.wait(20)
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.process.wait(30) == 0
        end.set()
        thread.join(10)


def test_it_is_asked_by_this_machines_names_and_those_it_is_told(tmp_path: Path) -> None:
    with scripted(ScriptedEngine()) as [engine_url]:
        file = write(tmp_path / "g.toml", engine_url)
        for options, expected in (((), [200, 400]), (("--allowed-host", "chat.example"), [200, 200])):
            with gateway_process(file, *options) as (_, url):
                hosts = ({"host": "localhost"}, {"host": "chat.example:443"})
                assert [httpx.get(f"{url}/health", headers=host).status_code for host in hosts] == expected
