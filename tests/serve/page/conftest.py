from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.page.scripted import ScriptedServer, scripted_server
from tests.serve.page.visiting import Visit


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedServer]:
    with scripted_server() as started:
        yield started


@pytest.fixture
def scripted(server: ScriptedServer) -> ScriptedServer:
    """The server without what the test before has told it."""
    server.forget()
    return server


@pytest.fixture
def visit(browser: Any, scripted: ScriptedServer) -> Iterator[Visit]:
    """A visit that must end without a complaint of the browser; tests that provoke one take it out."""
    visited = Visit(browser, scripted.url, viewport={"width": 1100, "height": 720})
    yield visited
    visited.context.close()
    assert visited.hosts == {"127.0.0.1"}, "no request leaves this machine"
    assert visited.complaints == []
