"""Servers of models that know tools: one of each family with random weights, and one that was taught to call."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.conftest import RunningServer, running_server
from tests.serve.tools.speaking import FAMILIES, save_random, save_taught


@pytest.fixture(scope="session")
def caller_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_taught(tmp_path_factory.mktemp("models") / "caller-tiny")


@pytest.fixture(scope="session")
def caller(caller_dir: Path) -> Iterator[RunningServer]:
    with running_server(caller_dir, max_batch_size=4) as server:
        yield server


@pytest.fixture(scope="session", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def family_server(family: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    directory = save_random(family, tmp_path_factory.mktemp("family") / f"{family}-tiny")
    with running_server(directory, max_batch_size=4) as server:
        yield server
