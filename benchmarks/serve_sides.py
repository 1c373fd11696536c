"""The engines that `serve.py` compares: each started as a process group of its own, asked over HTTP or over a pipe."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from crosschip.engines import EngineCommand, engine_command, engine_python, engine_versions, free_port
from crosschip.errors import EngineError

HTTP = ("native", "vllm", "llamacpp")
OFFLINE = ("native", "transformers", "vllm")
SLOTS = 64  # requests that each engine may compute together
_START_S = 600.0
ROOT = Path(__file__).parent.parent
_WORKER = ROOT / "benchmarks" / "serve_offline.py"
_MAX_LENGTH = 128


@dataclass
class Side:
    """An engine that is up. `run` answers prompts, so many at once, and tells figures and what was said."""

    engine: str
    mode: str
    process: subprocess.Popen[bytes]
    description: dict[str, Any]
    url: str = ""
    model_name: str = ""
    stopped: bool = field(default=False)

    def stop(self) -> None:
        """Let it have no time at all."""
        if not self.stopped:
            os.killpg(self.process.pid, signal.SIGSTOP)
            self.stopped = True

    @contextmanager
    def running_alone(self) -> Iterator[None]:
        """Let it go on while the block runs. All others are stopped already."""
        os.killpg(self.process.pid, signal.SIGCONT)
        self.stopped = False
        time.sleep(0.2)
        yield
        self.stop()

    def run(self, prompts: list[list[int]], new: int, at_once: int) -> tuple[dict[str, float], list[Any]]:
        """Throughput of whole answers; over HTTP also the times of streamed ones, to the second half of the prompts."""
        if self.mode == "offline":
            return _run_offline(self.process, prompts, new)
        half = len(prompts) // 2
        whole = asyncio.run(_ask_all(self, prompts[:half], new, at_once, stream=False))
        streamed = asyncio.run(_ask_all(self, prompts[half:], new, at_once, stream=True))
        answers = streamed.answers
        assert all(answer.num_tokens == new for answer in answers), [answer.num_tokens for answer in answers]
        figures = {
            "tokens_per_s": half * new / whole.seconds,
            "streamed_tokens_per_s": half * new / streamed.seconds,
            "first_token_s": statistics.median(answer.first_s for answer in answers),
            "per_token_s": statistics.median(answer.per_token_s for answer in answers),
        }
        return figures, [answer.text for answer in answers]


def left_out(engines: Sequence[str]) -> dict[str, str]:
    """Engines that are not installed here, with what to do."""
    return {
        engine: f"there is no .engines/{engine}; `make engines` makes it"
        for engine in engines
        if engine != "native" and engine_python(engine) is None
    }


@contextmanager
def started_sides(
    mode: str, engines: Sequence[str], model: Path, threads: int
) -> Iterator[tuple[list[Side], dict[str, str]]]:
    """Start them one after the other; each is stopped as soon as it is up. Those that do not start are told."""
    up: list[Side] = []
    failed: dict[str, str] = {}
    with ExitStack() as stack:
        for engine in engines:
            print(f"starting {engine} ({mode}) ...", flush=True)
            start = _start_server if mode == "http" else _start_worker
            try:
                side = start(engine, model, threads, stack)
            except EngineError as error:
                failed[engine] = error.problem
                print(f"{engine}: {error.problem}", flush=True)
                continue
            side.stop()
            up.append(side)
        yield up, failed


def _start_server(engine: str, model: Path, threads: int, stack: ExitStack) -> Side:
    """A server, once it lists its model."""
    if engine == "llamacpp":
        model = _as_gguf(model)
    command = _server_command(engine)
    port = free_port()
    log = model.parent / f"{engine}-http.log"
    words, environment = command.filled(model, port), command.environment_for(model)
    process = _started(words, environment, threads, log, stack)
    url = f"http://127.0.0.1:{port}"
    until = time.monotonic() + _START_S
    while time.monotonic() < until and process.poll() is None:
        with suppress(httpx.HTTPError):
            listed = httpx.get(f"{url}/v1/models", timeout=5.0, trust_env=False)
            if listed.status_code == 200:
                name = listed.json()["data"][0]["id"]
                return Side(engine, "http", process, _description(engine, command, environment), url, name)
        time.sleep(0.3)
    raise EngineError(f"it did not answer; its log ends {_end_of(log)!r}", "read the log")


def _start_worker(engine: str, model: Path, threads: int, stack: ExitStack) -> Side:
    """A process with the engine in it, once it says that it is ready."""
    python = sys.executable if engine == "native" else str(engine_python(engine))
    environment = engine_command("vllm").environment_for(model) if engine == "vllm" else {}
    command = EngineCommand((python, str(_WORKER), engine, "{model}", str(SLOTS)), environment, engine)
    log = model.parent / f"{engine}-offline.log"
    process = _started(command.filled(model, 0), environment, threads, log, stack, piped=True)
    assert process.stdout is not None
    if process.stdout.readline() != b"ready\n":
        raise EngineError(f"it did not start; its log ends {_end_of(log)!r}", "read the log")
    return Side(engine, "offline", process, _description(engine, command, environment))


def _server_command(engine: str) -> EngineCommand:
    command = engine_command(engine, chip="cpu", max_length=_MAX_LENGTH, dtype="float32")
    more = {
        "native": ("--max-batch-size", str(SLOTS), "--dtype", "float32"),
        "vllm": ("--max-num-seqs", str(SLOTS)),
        "llamacpp": (str(SLOTS),),
    }
    return EngineCommand((*command.words, *more[engine]), command.environment, engine)


def _started(
    words: list[str], environment: dict[str, str], threads: int, log: Path, stack: ExitStack, piped: bool = False
) -> subprocess.Popen[bytes]:
    counts = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    # By itself vLLM leaves a core to its server and binds all threads that it was told of to the rest.
    counts["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
    pipe = subprocess.PIPE if piped else subprocess.DEVNULL
    with log.open("wb") as file:
        process = subprocess.Popen(
            words,
            stdin=pipe,
            stdout=pipe if piped else file,
            stderr=file,
            env={**os.environ, **environment, **counts, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
    stack.callback(_end, process)
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the whole group, stopped or not."""
    for number in (signal.SIGCONT, signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        if number == signal.SIGTERM:
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
    process.wait()


def _as_gguf(model: Path) -> Path:
    file = model.parent / "model.gguf"
    words = [sys.executable, "-m", "crosschip.handoff.gguf", str(model), "--outfile", str(file), "--outtype", "float32"]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0:
        raise EngineError(f"no GGUF file could be made: {done.stderr[-300:] or done.stdout[-300:]}", "see the message")
    return file


def _description(engine: str, command: EngineCommand, environment: dict[str, str]) -> dict[str, Any]:
    words = ["python", *(word.removeprefix(f"{ROOT}/") for word in command.words[1:])]
    return {"versions": engine_versions(engine, command.words[0]), "words": words, **environment}


def _end_of(log: Path) -> str:
    return log.read_text(errors="replace")[-300:]


def _run_offline(
    process: subprocess.Popen[bytes], prompts: list[list[int]], new: int
) -> tuple[dict[str, float], list[Any]]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps({"prompts": prompts, "new": new}).encode() + b"\n")
    process.stdin.flush()
    document = json.loads(process.stdout.readline())
    assert all(len(answer) == new for answer in document["answers"]), [len(answer) for answer in document["answers"]]
    return {"tokens_per_s": len(prompts) * new / document["seconds"]}, document["answers"]


@dataclass
class _Streamed:
    """One streamed answer, by the client's clock."""

    num_tokens: int
    text: str
    first_s: float
    per_token_s: float


@dataclass
class _All:
    seconds: float
    answers: list[_Streamed]


async def _ask_all(side: Side, prompts: list[list[int]], new: int, at_once: int, stream: bool) -> _All:
    """So many clients, each with its next prompt as soon as it has an answer. JSON is read after the clock stopped."""
    waiting = list(reversed(prompts))
    lines: list[tuple[list[int], float, list[tuple[float, bytes]]]] = []

    async def client() -> None:
        while waiting:
            prompt = waiting.pop()
            lines.append((prompt, time.perf_counter(), await _ask(side, prompt, new, stream)))

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(at_once)))
    seconds = time.perf_counter() - begun
    by_prompt = {tuple(prompt): _read(begun_s, said) for prompt, begun_s, said in lines} if stream else {}
    return _All(seconds, [by_prompt[tuple(prompt)] for prompt in prompts] if stream else [])


async def _ask(side: Side, prompt: list[int], new: int, stream: bool) -> list[tuple[float, bytes]]:
    """One request over a socket of its own: a client as light as can be, since it shares the cores with the engine."""
    body: dict[str, Any] = {"model": side.model_name, "prompt": prompt, "max_tokens": new, "temperature": 0}
    body |= {"ignore_eos": True, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    content = json.dumps(body).encode()
    place = urlsplit(side.url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port, limit=2**22)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content)
    status = await reader.readline()
    if b" 200 " not in status:
        raise EngineError(f"{side.engine} answers {status!r}: {(await reader.read(2000))!r}", "see its log")
    said = []
    async for line in reader:
        if not stream or line.startswith(b"data: {"):
            said.append((time.perf_counter(), line))
        elif line.startswith(b"data: [DONE]"):
            break
    writer.close()
    return said


def _read(begun_s: float, said: list[tuple[float, bytes]]) -> _Streamed:
    chunks = [(at_s, json.loads(line.removeprefix(b"data: "))) for at_s, line in said]
    usage = [chunk["usage"] for _, chunk in chunks if chunk.get("usage")]
    parts = [(at_s, chunk["choices"][0]) for at_s, chunk in chunks if chunk.get("choices")]
    num_tokens = int(usage[-1]["completion_tokens"])
    first, last = parts[0][0], parts[-1][0]
    text = "".join(choice.get("text") or "" for _, choice in parts)
    return _Streamed(num_tokens, text, first - begun_s, (last - first) / max(1, num_tokens - 1))
