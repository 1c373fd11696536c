"""Serving engines as processes: how each is started over a model directory, until it answers or ends."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from crosschip.engines.environments import engine_python, engine_versions
from crosschip.errors import EngineError
from crosschip.orphans import end_with_parent

__all__ = [
    "ENGINES",
    "STILL_STARTING",
    "EngineCommand",
    "RunningEngine",
    "engine_command",
    "free_port",
    "running_engine",
]

ENGINES = ("native", "transformers", "vllm", "llamacpp", "command")
STILL_STARTING = "the engine did not answer within"
_POLL_S = 0.3
_END_S = 10.0
_PLACES = ("{model}", "{port}")
_HERE = Path(__file__).parent  # of the servers that run in an engine's own environment, where there is no crosschip
# Variables that change how an engine computes, wherever they were set; none that may hold a secret.
_TELLING = re.compile(r"^(VLLM_|LLAMA_|GGML_|OMP_NUM_THREADS$|MKL_NUM_THREADS$|KMP_|TORCH_|ATEN_|CROSSCHIP_SIM$)")
_SECRET = re.compile(r"API_?KEY|TOKEN|SECRET|PASSWORD")
# kv_lora_rank + qk_rope_head_dim for which vLLM has latent attention on CPUs: that of DeepSeek-V3.
_VLLM_LATENT_SIZE = 576


@dataclass(frozen=True)
class EngineCommand:
    """The words of a command with `{model}` and `{port}` in them, and what it needs in its environment."""

    words: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    engine: str = "command"

    def filled(self, model: Path, port: int) -> list[str]:
        """The command for a directory and a port."""
        return [word.replace("{model}", str(model)).replace("{port}", str(port)) for word in self.words]

    def environment_for(self, model: Path) -> dict[str, str]:
        """What the command needs in its environment for this model; what the user has set goes before it."""
        if self.engine == "vllm" and _latent_size(model) not in (None, _VLLM_LATENT_SIZE):
            return {**self.environment, "VLLM_MLA_DISABLE": "1"}
        return self.environment

    def description(self, environment: dict[str, str] | None = None) -> dict[str, Any]:
        """What is started, as a JSON document: engine, versions, words, and variables that change how it computes.

        The same model under another flag was seen 0.33 nats off, so whoever certifies an engine certifies these.
        """
        seen = {**self.environment, **os.environ} if environment is None else environment
        telling = {name: value for name, value in seen.items() if _TELLING.match(name) or name in self.environment}
        versions = engine_versions(self.engine, self.words[0])
        return {
            "engine": self.engine,
            "version": next((value for name, value in versions.items() if name != "python"), None),
            "versions": versions,
            "words": list(self.words),
            "environment": {name: value for name, value in sorted(telling.items()) if not _SECRET.search(name)},
        }


@dataclass
class RunningEngine:
    """An engine that was started: its address, or, where it ended or never answered, why."""

    url: str
    log: Path
    ended: str = ""
    command: EngineCommand | None = None
    environment: dict[str, str] = field(default_factory=dict)  # its whole one

    def description(self) -> dict[str, Any]:
        """What was started, as `EngineCommand.description` tells it."""
        assert self.command is not None, "made by running_engine"
        return self.command.description(self.environment)

    @property
    def is_up(self) -> bool:
        """Whether it answers."""
        return not self.ended

    def read_log(self) -> str:
        """What it printed."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""


def engine_command(
    engine: str,
    python: Path | None = None,
    template: str | None = None,
    *,
    chip: str = "auto",
    max_length: int = 1024,
    dtype: str = "auto",
) -> EngineCommand:
    """How an engine is started. `python` is the interpreter of an environment that has it, by default that of
    `make engines`; `chip` is the native engine's.

    Raises:
        EngineError: an engine that is not known here, or one whose interpreter or command is missing.
    """
    if engine in ("transformers", "vllm", "llamacpp") and python is None and template is None:
        python = engine_python(engine)
    if python is not None and not (python.is_file() and os.access(python, os.X_OK)):
        raise EngineError(f"{python} is no program", "give the interpreter of the engine's environment")
    if engine == "command" or template is not None:
        if template is None or not all(place in template for place in _PLACES):
            raise EngineError(
                f"the engine's command is {template!r}",
                "give one with {model} and {port} in it, as 'serve {model} {port}'",
            )
        return EngineCommand(tuple(shlex.split(template)))
    if engine == "native":
        serve = ("-m", "crosschip", "serve", "{model}", "--port", "{port}", "--chip", chip, "--max-batch-size", "8")
        return EngineCommand((sys.executable, *serve), engine=engine)
    if engine == "transformers":
        server = str(_HERE / "transformers_server.py")
        return EngineCommand((str(python or sys.executable), server, "{model}", "{port}", dtype), engine=engine)
    if engine in ("vllm", "llamacpp") and python is None:
        raise EngineError(
            f"{engine} lives in an environment of its own",
            "make it with `make engines`, or give its interpreter: --engine-python PATH",
        )
    if engine == "vllm":
        return _vllm(str(python), max_length, dtype)
    if engine == "llamacpp":
        server = str(_HERE / "llamacpp_server.py")
        return EngineCommand((str(python), server, "{model}", "{port}", str(max_length)), engine=engine)
    raise EngineError(
        f"the engine {engine!r} is not known here", f"choose among {', '.join(ENGINES)}, or give its command"
    )


def _vllm(python: str, max_length: int, dtype: str) -> EngineCommand:
    words = (python, "-m", "vllm.entrypoints.openai.api_server", "--model", "{model}", "--port", "{port}")
    options = ("--host", "127.0.0.1", "--max-model-len", str(max_length), "--dtype", dtype, "--max-num-seqs", "16")
    # The cache is small, like the model; what the user sets is kept.
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return EngineCommand((*words, *options, "--served-model-name", "dry"), environment, "vllm")


def _latent_size(model: Path) -> int | None:
    """Numbers that latent attention keeps per token; None for other attention, or a directory that nobody can read."""
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        return int(config["kv_lora_rank"]) + int(config["qk_rope_head_dim"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def running_engine(
    command: EngineCommand, model: Path, log: Path, start_s: float, extra: dict[str, str] | None = None
) -> Iterator[RunningEngine]:
    """Start the engine, wait until it lists its model, and end it with all its children in the end.

    Whatever goes wrong at the start is told in `ended`, not raised: it is what the rehearsal is for.
    """
    port = free_port()
    environment = {**command.environment_for(model), **os.environ, **(extra or {}), "PYTHONUNBUFFERED": "1"}
    engine = RunningEngine(f"http://127.0.0.1:{port}", log, command=command, environment=environment)
    with log.open("wb") as file:
        try:
            process = subprocess.Popen(
                command.filled(model, port),
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
                preexec_fn=functools.partial(end_with_parent, os.getpid()),
            )
        except OSError as error:
            raise EngineError(f"{command.words[0]} cannot be started: {error}", "check the path") from None
        try:
            engine.ended = _wait(engine.url, process, start_s)
            yield engine
        finally:
            _end(process)


def _wait(url: str, process: subprocess.Popen[bytes], start_s: float) -> str:
    """Empty as soon as the engine lists a model, else why it does not."""
    until = time.monotonic() + start_s
    while time.monotonic() < until:
        code = process.poll()
        if code is not None:
            how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            return f"the engine ended {how} before it answered"
        try:
            if httpx.get(f"{url}/v1/models", timeout=5.0, trust_env=False).status_code == 200:
                return ""
        except httpx.HTTPError:  # not yet
            pass
        time.sleep(_POLL_S)
    return f"{STILL_STARTING} {start_s:.0f} s"


def free_port() -> int:
    """A port of the loopback interface that nothing listened on a moment ago."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the session that was started: the engine and the workers it made."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=_END_S)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
