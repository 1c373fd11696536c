"""Serving engines as processes of their own: how each is started over a model directory, and ended again."""

from crosschip.engines.environments import engine_python, engine_versions
from crosschip.engines.processes import (
    ENGINES,
    STILL_STARTING,
    EngineCommand,
    RunningEngine,
    engine_command,
    free_port,
    running_engine,
)

__all__ = [
    "ENGINES",
    "STILL_STARTING",
    "EngineCommand",
    "RunningEngine",
    "engine_command",
    "engine_python",
    "engine_versions",
    "free_port",
    "running_engine",
]
