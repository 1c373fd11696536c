"""A page whose name was made to point to this machine gets nothing from a server that asks for no keys."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from crosschip.serve.api.hosts import hosts_to_allow
from tests.serve.conftest import RunningServer, running_server


@pytest.mark.parametrize("path", ["/", "/v1/models", "/health", "/metrics"])
@pytest.mark.parametrize("host", ["rebound.example", "rebound.example:8000", "127.0.0.1.example", "[::2]:80"])
def test_another_name_is_refused(random_server: RunningServer, path: str, host: str) -> None:
    response = httpx.get(f"{random_server.url}{path}", headers={"host": host})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "host_not_allowed")
    assert host in error["message"]
    assert "--allowed-host" in error["message"]
    assert "content-security-policy" in response.headers


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST.:1", "127.0.0.1:65535", "[::1]:8000", ""])
def test_this_machines_names_are_taken(random_server: RunningServer, host: str) -> None:
    assert httpx.get(f"{random_server.url}/v1/models", headers={"host": host}).status_code == 200


def test_posts_are_refused_too(random_server: RunningServer) -> None:
    response = httpx.post(f"{random_server.url}/v1/completions", json={"prompt": [1]}, headers={"host": "x"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "host_not_allowed")


def test_names_are_held_to_where_a_page_could_do_harm() -> None:
    here = {"127.0.0.1", "localhost", "::1"}
    assert hosts_to_allow("127.0.0.1", asks_for_keys=False) == here
    assert hosts_to_allow("::1", asks_for_keys=False) == here
    assert hosts_to_allow("127.0.0.1", asks_for_keys=True) is None, "a page knows no key"
    assert hosts_to_allow("0.0.0.0", asks_for_keys=False) is None, "others ask by names that nobody knows here"
    assert hosts_to_allow("0.0.0.0", False, ["Chat.Example"]) == here | {"0.0.0.0", "chat.example"}
    assert hosts_to_allow("127.0.0.1", True, ["chat.example"]) == here | {"chat.example"}


def test_a_proxys_name_can_be_allowed(random_dir: Path) -> None:
    with running_server(random_dir, allowed_hosts=("chat.example",)) as server:
        for host, status in (("chat.example:443", 200), ("x", 400)):
            assert httpx.get(f"{server.url}/health", headers={"host": host}).status_code == status
