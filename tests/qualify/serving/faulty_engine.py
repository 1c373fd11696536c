"""A proxy before a real engine that plants what engines were seen to do wrong, over real HTTP, whole and broken."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx

_LONG = 6
CHANGE = -0.3  # nats, on a planted position


@dataclass
class Faults:
    """What is planted; everything off by default. Lengths are in tokens of the prompt, paths are the API's."""

    scores_off_beyond_length: int | None = None  # in requests longer than this, at all positions beyond it
    prefix_off_in_long: int | None = None  # in requests longer than this, at every position
    generated_off_beyond_length: int | None = None
    drops_chunk: bool = False
    splits_characters: bool = False
    ignores_stop: bool = False
    ignores_stop_tokens: bool = False
    suppresses_end: bool = False
    off_on_cache_hit: bool = False
    off_in_batches: bool = False
    cuts_in_batches: bool = False
    empties_in_batches: bool = False
    cuts_on_cache_hit: bool = False
    samples_greedy: bool = False
    bans_a_token: bool = False  # another token than the likeliest, consistently
    loses_last_score: bool = False  # of answers with more than a few
    one_token_less: bool = False
    changes_echo: bool = False
    wrong_finish_reason: bool = False
    leaves_out_a_streamed_score: bool = False
    no_done: bool = False
    truncates_json: bool = False
    hangs: bool = False
    trickles: bool = False
    cuts_off: bool = False
    server_error: bool = False
    only_beyond_length: int = 0  # the last five: only for requests with longer prompts
    refuses_echo: bool = False  # what engines are not able to do, and say so
    refuses_logprobs: bool = False
    refuses_ids: bool = False
    refuses_chats: bool = False
    refuses_beyond_length: int | None = None
    nonsense: random.Random | None = None  # draws what stands where something else should
    seen: set[str] = field(default_factory=set)
    in_flight: int = 0
    num_sampled: int = 0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    upstream: str
    faults: Faults
    client: httpx.Client

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        answer = self.client.get(self.upstream + self.path)
        data = _make_nonsense(answer.content, self.faults.nonsense) if self.faults.nonsense else answer.content
        self._send(answer.status_code, data, answer.headers.get("content-type", "application/json"))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        faults = self.faults
        faults.in_flight += 1
        try:
            if faults.off_in_batches or faults.cuts_in_batches or faults.empties_in_batches:
                time.sleep(0.05)
            is_batch = faults.in_flight > 1
            self._answer(body, is_batch)
        finally:
            faults.in_flight -= 1

    def _answer(self, body: dict[str, Any], is_batch: bool) -> None:
        faults, length = self.faults, _prompt_length(body)
        if length > faults.only_beyond_length and self._breaks(body):
            return
        refused = _refusal(faults, body, self.path)
        if refused:
            self._send(400, json.dumps({"error": {"message": refused}}).encode(), "application/json")
            return
        _change_request(faults, body, self.path)
        seen = json.dumps(body.get("prompt"))
        is_hit = seen in faults.seen and not body.get("echo")
        faults.seen.add(seen)
        answer = self.client.post(self.upstream + self.path, json=body)
        data = answer.content
        if answer.status_code == 200:
            data = _change_stream(faults, data) if body.get("stream") else data
            if not body.get("stream"):
                data = _change_document(faults, data, body, is_batch, is_hit)
            data = _make_nonsense(data, faults.nonsense) if faults.nonsense else data
        self._send(answer.status_code, data, answer.headers["content-type"])

    def _breaks(self, body: dict[str, Any]) -> bool:
        """The answers that are none."""
        faults = self.faults
        if faults.hangs:
            time.sleep(30)
            self.close_connection = True
            return True
        if faults.server_error:
            self._send(500, b'{"error": {"message": "vector core exception"}}', "application/json")
            return True
        if faults.cuts_off or faults.trickles or faults.truncates_json:
            data = self.client.post(self.upstream + self.path, json=body).content
            if faults.truncates_json:
                self._send(200, data[: len(data) // 2], "application/json")
                return True
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            for start in range(len(data) // 2):
                self.wfile.write(data[start : start + 1])
                if faults.trickles:
                    self.wfile.flush()
                    time.sleep(0.2)
            self.close_connection = True
            return True
        return False

    def _send(self, status: int, data: bytes, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _prompt_length(body: dict[str, Any]) -> int:
    prompt = body.get("prompt")
    return len(prompt) if isinstance(prompt, list) else 0


def _refusal(faults: Faults, body: dict[str, Any], path: str) -> str:
    if faults.refuses_echo and body.get("echo"):
        return "Only no echo is supported"  # llama.cpp's words
    if faults.refuses_logprobs and body.get("logprobs"):
        return "logprobs are not supported"
    if faults.refuses_ids and isinstance(body.get("prompt"), list):
        return "prompt must be a string"
    if faults.refuses_chats and "chat" in path:
        return "no chat template"
    if faults.refuses_beyond_length is not None and _prompt_length(body) > faults.refuses_beyond_length:
        return "the prompt is too long"
    return ""


_JUNK = (None, True, -1, 0, 7, 1e400, "", "none", "�", [], [[]], {}, {"": None}, [1, "a", None], 10**400)


def _make_nonsense(data: bytes, rng: random.Random) -> bytes:
    """Another value somewhere in a document, or bytes that are no document."""
    if rng.random() < 0.7:
        return data
    if rng.random() < 0.1:
        return rng.choice((b"", b"\xff\xfe", b"<html>", b"[" * 100_000, data[: len(data) // 2], data + b"}"))
    try:
        document = json.loads(data)
    except ValueError:  # a stream
        lines = data.split(b"\n")
        place = rng.randrange(len(lines))
        lines[place] = b"data: " + json.dumps(rng.choice(_JUNK)).encode()
        return b"\n".join(lines)
    return json.dumps(_with_junk(document, rng)).encode()


def _with_junk(value: Any, rng: random.Random) -> Any:
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return rng.choice(_JUNK)
    copy: Any = value.copy()
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    copy[key] = _with_junk(value[key], rng)
    return copy


def _change_request(faults: Faults, body: dict[str, Any], path: str) -> None:
    if faults.ignores_stop:
        body.pop("stop", None)
    if faults.one_token_less:
        body["max_tokens"] = max(1, body.get("max_tokens", 16) - 1)
    if faults.ignores_stop_tokens:
        body.pop("stop_token_ids", None)
    if faults.suppresses_end and "chat" in path:
        body["ignore_eos"] = True
    if faults.samples_greedy and _prompt_length(body) > 8:
        faults.num_sampled += 1
        body |= {"temperature": 2.0, "seed": faults.num_sampled}


def _change_document(faults: Faults, data: bytes, body: dict[str, Any], is_batch: bool, is_hit: bool) -> bytes:
    document = json.loads(data)
    length = _prompt_length(body)
    for choice in document["choices"]:
        logprobs = choice.get("logprobs") or {}
        num = len(logprobs.get("tokens") or [])
        num_prompt = length if body.get("echo") else 0
        beyond, long, new = (
            faults.scores_off_beyond_length,
            faults.prefix_off_in_long,
            faults.generated_off_beyond_length,
        )
        if beyond is not None and num_prompt:
            _shift(logprobs, range(beyond, num))
        if long is not None and length > long:
            _shift(logprobs, range(num_prompt))
        if new is not None and length > new:
            _shift(logprobs, range(num_prompt, num))
        if (is_batch and faults.off_in_batches) or (is_hit and faults.off_on_cache_hit):
            _shift(logprobs, range(num))
        if is_batch and faults.empties_in_batches:
            _cut(document, choice, 0)
        if (is_batch and faults.cuts_in_batches) or (is_hit and faults.cuts_on_cache_hit):
            _cut(document, choice, num // 2)
        if faults.bans_a_token and num > num_prompt:
            logprobs["top_logprobs"][-1]["token_id:1"] = logprobs["token_logprobs"][-1]  # all together stay below 1
            logprobs["token_logprobs"][-1] -= 9.0
            logprobs["top_logprobs"][-1][logprobs["tokens"][-1]] = logprobs["token_logprobs"][-1]
        if faults.loses_last_score and num > _LONG:
            choice["logprobs"] = {name: values[:-1] for name, values in logprobs.items()}
        if faults.changes_echo and body.get("echo"):
            choice["text"] = choice["text"].swapcase()
    return json.dumps(document).encode()


def _shift(logprobs: dict[str, Any], places: range) -> None:
    """Other numbers, as a consistent engine would give them: the token's own score and its entry among the best."""
    for place in places:
        if logprobs["token_logprobs"][place] is not None:
            logprobs["token_logprobs"][place] += CHANGE
            name = logprobs["tokens"][place]
            logprobs["top_logprobs"][place] = {name: logprobs["token_logprobs"][place]}


def _cut(document: dict[str, Any], choice: dict[str, Any], num: int) -> None:
    """The beginning of an answer as the whole of it."""
    names = (choice.get("logprobs") or {}).get("tokens") or []
    choice["text"] = choice["text"][: len(choice["text"]) * num // max(1, len(names))]
    if choice.get("logprobs"):
        choice["logprobs"] = {name: values[:num] for name, values in choice["logprobs"].items()}
    document["usage"]["completion_tokens"] = num


def _change_stream(faults: Faults, data: bytes) -> bytes:
    events = data.decode().split("\n\n")
    kept, with_text = [], 0
    for event in events:
        if faults.no_done and event == "data: [DONE]":
            continue
        if event.startswith("data: {"):
            document = json.loads(event[6:])
            for choice in document.get("choices") or []:
                with_text += bool(_text(choice))
                if faults.splits_characters:
                    _split(choice)
                if faults.leaves_out_a_streamed_score and with_text == 2:
                    choice["logprobs"] = None
                if faults.wrong_finish_reason and choice.get("finish_reason"):
                    choice["finish_reason"] = "stop" if choice["finish_reason"] == "length" else "length"
            if faults.drops_chunk and with_text == 3:
                with_text += 1
                continue
            event = "data: " + json.dumps(document)
        kept.append(event)
    return "\n\n".join(kept).encode()


def _text(choice: dict[str, Any]) -> str:
    return str(choice.get("text") or (choice.get("delta") or {}).get("content") or "")


def _split(choice: dict[str, Any]) -> None:
    holder, key = (choice, "text") if "text" in choice else (choice.get("delta") or {}, "content")
    if holder.get(key):
        holder[key] = "".join("��" if ord(character) > 0x7FF else character for character in holder[key])


@contextmanager
def faulty_engine(upstream: str, port: int = 0) -> Iterator[tuple[str, Faults]]:
    """The proxy's address, and the faults to be switched on; with none it changes nothing."""
    faults = Faults()
    with httpx.Client(timeout=60, limits=httpx.Limits(max_connections=64), trust_env=False) as client:
        handler = type("Handler", (_Handler,), {"upstream": upstream, "faults": faults, "client": client})
        server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", faults
        finally:
            server.shutdown()
            server.server_close()
