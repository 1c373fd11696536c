"""crosschip with an engine that goes on with the old weights and says otherwise (fault H2)."""

from __future__ import annotations

import runpy
from pathlib import Path

from crosschip.serve.engine.engine import Engine


def _keep_old(engine: Engine, directory: Path) -> str:
    return "2"


if __name__ == "__main__":
    Engine.update_weights = _keep_old  # type: ignore[method-assign, assignment]
    runpy.run_module("crosschip", run_name="__main__")
