"""Our own engine as a child process on the machine that trains, on a chip of its own.

It ends with whoever started it: the kernel kills it when the thread that started it ends, so that neither a kill -9 of
the trainer nor its crash leaves an engine behind that holds a chip. (Linux; elsewhere it ends by `close` alone.)
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx

from crosschip.rundir import write_text
from crosschip.train.rl.rollouts.errors import BadAnswer
from crosschip.train.rl.rollouts.publishing import Publication

__all__ = ["LocalEngine", "LocalSettings"]

_POLL_S = 0.1
_END_S = 10.0
_NUM_LOG_LINES = 12
_URL = re.compile(r"^chat: (http://\S+)", re.MULTILINE)  # what `crosschip serve` prints when it listens
# Runs before the engine, in its process: asks the kernel to kill it when its parent ends, and becomes the engine. It is
# a program of its own and no function between fork and exec: that would run in a copy of a process with many threads.
_BIND = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, which survives exec
    if os.getppid() != int(sys.argv[1]):
        os._exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True)
class LocalSettings:
    """How an engine is started here. `num_threads` None leaves it half of the usable cores; `max_model_len` None the
    model's own limit."""

    directory: Path  # of its log and its file of keys
    chip: str = "auto"
    dtype: str = "auto"
    max_batch_size: int = 64
    max_model_len: int | None = None
    num_threads: int | None = None
    record_routes: bool = True
    deterministic: bool = False
    start_timeout_s: float = 300.0


class LocalEngine:
    """The process, its address, and the key that lets the trainer change its weights.

    `start` must be called from a thread that lives as long as the engine shall.
    """

    def __init__(self, name: str, settings: LocalSettings) -> None:
        self.name, self.settings = name, settings
        self.key = "csk-" + secrets.token_urlsafe(32)
        self.log = settings.directory / f"{name}.log"
        self._keys = settings.directory / f"{name}.keys.toml"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The process, if one was started."""
        return self._process.pid if self._process is not None else None

    @property
    def death(self) -> str | None:
        """How it ended; None while it runs."""
        code = self._process.poll() if self._process is not None else None
        if code is None:
            return None
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return f"it ended {how}; the end of {self.log}:\n{self.log_end()}"

    def log_end(self) -> str:
        """The last lines that it printed."""
        if not self.log.exists():
            return "(nothing)"
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_NUM_LOG_LINES:]
        return "\n".join(f"    {line}" for line in lines) or "(nothing)"

    async def start(self, publication: Publication) -> str:
        """Start it over a directory of weights; returns its address as soon as it is ready.

        Raises:
            BadAnswer: it ended, or was not ready in time; with the last lines of its log.
        """
        await self.end()
        self._begin(publication)
        ends = time.monotonic() + self.settings.start_timeout_s
        async with httpx.AsyncClient(trust_env=False, timeout=5.0) as client:
            while time.monotonic() < ends:
                if self.death is not None:
                    raise BadAnswer("failed", f"before it was ready {self.death}")
                url = _URL.search(self.log.read_text(encoding="utf-8", errors="replace"))
                if url is not None and await _is_ready(client, url[1]):
                    return url[1]
                await asyncio.sleep(_POLL_S)
        lines = self.log_end()
        await self.end()
        raise BadAnswer(
            "slow", f"not ready within {self.settings.start_timeout_s:g} s; the end of {self.log}:\n{lines}"
        )

    async def end(self) -> None:
        """End it, at first politely."""
        process, self._process = self._process, None
        if process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                break
            until = time.monotonic() + _END_S
            while process.poll() is None and time.monotonic() < until:
                await asyncio.sleep(_POLL_S / 2)
            if process.poll() is not None:
                break
        process.poll()

    def _begin(self, publication: Publication) -> None:
        from crosschip.chips.host import usable_cores  # its package imports torch

        directory = self.settings.directory
        directory.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(self.key.encode()).hexdigest()
        write_text(self._keys, f'[[keys]]\nname = "trainer"\nhash = "sha256:{digest}"\nadmin = true\n')
        num_threads = self.settings.num_threads or max(1, usable_cores() // 2)
        threads = {name: str(num_threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        if self.log.exists():
            self.log.replace(self.log.with_suffix(".previous.log"))  # why the one before ended
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _BIND, str(os.getpid()), *self._command(publication)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **threads, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # Ctrl-C is the trainer's, which ends its engine when it is done
            )

    def _command(self, publication: Publication) -> list[str]:
        settings = self.settings
        words = [sys.executable, "-m", "crosschip", "serve", str(publication.path)]
        words += ["--host", "127.0.0.1", "--port", "0"]
        words += ["--chip", settings.chip, "--dtype", settings.dtype, "--api-keys", str(self._keys)]
        words += ["--max-batch-size", str(settings.max_batch_size), "--model-name", self.name, "--drain-s", "0"]
        if settings.max_model_len is not None:
            words += ["--max-model-len", str(settings.max_model_len)]
        words += ["--record-routes"] if settings.record_routes and publication.facts.has_experts else []
        return words + (["--deterministic"] if settings.deterministic else [])


async def _is_ready(client: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await client.get(f"{url}/ready")).status_code == 200
    except httpx.HTTPError:
        return False
