"""HTTP to an engine that is examined: every wait ends, whatever the engine does.

A request has two limits, `silence_s` without a byte and `total_s` for the whole answer, so that an engine which
trickles bytes ends it as well. A question whose connection is lost is asked again while the engine is there: networks
and proxies drop connections, too.
"""

from __future__ import annotations

import json
import time
from typing import Any, TypedDict, Unpack

import httpx

from crosschip.errors import GoldenError

__all__ = [
    "ConnectionLostError",
    "EngineBrokeError",
    "NoAnswerInTimeError",
    "ScoringHttp",
    "TimeOverError",
    "Waits",
    "authorization",
    "check_address",
    "json_of",
    "words_of",
]

MOST_BYTES = 256 << 20  # 20 log-probs at each of 128 k positions are about 100 MB
_TIMES_AGAIN, _AGAIN_AFTER_S = 2, 0.5
_SHOWN = 300  # characters of a strange answer that a message shows


class EngineBrokeError(Exception):
    """No proper answer: the engine hung, broke off, failed or sent what is no log-probs. It is part of the replay."""


class ConnectionLostError(EngineBrokeError):
    """There is no connection to the engine, or it ended before the answer did."""


class NoAnswerInTimeError(EngineBrokeError):
    """The engine was silent for too long, or its answer took too long."""


class TimeOverError(EngineBrokeError):
    """The time of the whole replay ended within a request: nothing follows for or against the engine."""


class Waits(TypedDict, total=False):
    """How long a request may be silent, and take in all; and the end of the whole replay, by time.monotonic, beyond
    which no request goes on."""

    silence_s: float
    total_s: float
    deadline: float | None


def authorization(api_key: str | None, variable: str = "CROSSCHIP_API_KEY") -> dict[str, str]:
    """The header that carries a key, without white space around it, as a file's end leaves; none without a key.

    `variable` of the environment is where the user has put it.

    Raises:
        GoldenError: the key holds what no header can carry. The message does not show it: reports and logs are public.
    """
    key = (api_key or "").strip()
    wrong = next((place for place, each in enumerate(key, start=1) if not " " <= each <= "~"), None)
    if wrong is not None:
        problem = f"the API key cannot be sent: its character {wrong} is no printable ASCII"
        raise GoldenError(problem, f"set {variable} to the key alone, one line of letters, digits and signs")
    return {"Authorization": f"Bearer {key}"} if key else {}


def check_address(url: str) -> None:
    """Refuse an address that certificates and reports, which others read, must not show.

    Raises:
        GoldenError: it holds a name or a password.
    """
    _, at, host = url.partition("://")[2].partition("/")[0].rpartition("@")
    if at:
        raise GoldenError(
            f"the address of {host} holds a name or a password, and would stand in what is written about it",
            "leave that out and set CROSSCHIP_API_KEY to a key that the engine takes",
        )


class ScoringHttp:
    """Requests to one address, which heed no proxy settings. Safe to use from several threads at once."""

    def __init__(
        self, url: str, *, api_key: str | None = None, keep_alive: bool = True, **waits: Unpack[Waits]
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise GoldenError(f"{url!r} is not an address", "give one like http://127.0.0.1:8000")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._silence_s, self._total_s = waits.get("silence_s", 300.0), waits.get("total_s", 600.0)
        self._deadline = waits.get("deadline")
        self._lost: list[ConnectionLostError] = []  # after which the question was asked again
        limits = httpx.Limits() if keep_alive else httpx.Limits(max_keepalive_connections=0)
        authorities = httpx.create_ssl_context()  # with SSL_CERT_FILE, though no proxies of the environment
        self._http = httpx.Client(headers=authorization(api_key), limits=limits, trust_env=False, verify=authorities)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    @property
    def notes(self) -> list[str]:
        """What an answer does not show, in words: connections that were lost on the way to it."""
        if not self._lost:
            return []
        return [f"why the connection was lost {len(self._lost)} times, the last: {self._lost[-1]}; all was asked again"]

    def exchange(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, bytes]:
        """Status and content of an answer; a POST is sent again when its connection is lost and the engine is there.

        Raises:
            EngineBrokeError: none came, or not within its time; a `TimeOverError` where the replay's own time ended.
        """
        for _ in range(_TIMES_AGAIN if method == "POST" else 0):
            try:
                return self._exchange_once(method, path, body)
            except ConnectionLostError as error:
                time.sleep(_AGAIN_AFTER_S)  # a full queue of connections empties
                if not self._is_there():
                    raise
                self._lost.append(error)
        return self._exchange_once(method, path, body)

    def _is_there(self) -> bool:
        """Whether it lists its models; a `TimeOverError` says nothing of that and goes on."""
        try:
            return self._exchange_once("GET", "/v1/models", None)[0] == 200
        except (ConnectionLostError, NoAnswerInTimeError):
            return False

    def _exchange_once(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, bytes]:
        until = time.monotonic() + self._total_s
        until = until if self._deadline is None else min(until, self._deadline)
        data = bytearray()
        try:
            with self._http.stream(method, self.url + path, json=body, timeout=self._timeout(until)) as response:
                for part in response.iter_bytes():
                    data += part
                    if time.monotonic() > until:
                        raise httpx.ReadTimeout(f"still sending after {self._total_s:.0f} s")
                    if len(data) > MOST_BYTES:
                        raise EngineBrokeError(f"over {MOST_BYTES >> 20} MB in one answer")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._told(error) from None
        return response.status_code, bytes(data)

    def _told(self, error: httpx.HTTPError | httpx.InvalidURL) -> EngineBrokeError:
        words = f"{type(error).__name__}: {error}"
        if isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError):
            return ConnectionLostError(words)
        if not isinstance(error, httpx.TimeoutException):
            return EngineBrokeError(words)
        is_late = self._deadline is not None and time.monotonic() >= self._deadline
        return TimeOverError("the time of the replay was over") if is_late else NoAnswerInTimeError(words)

    def _timeout(self, until: float) -> httpx.Timeout:
        left_s = max(0.05, until - time.monotonic())
        return httpx.Timeout(min(self._silence_s, left_s), connect=min(10.0, left_s), pool=None)

    def model_card(self) -> dict[str, Any]:
        """What the engine says of its first model.

        Raises:
            GoldenError: nobody answers, or it lists none.
        """
        try:
            status, content = self.exchange("GET", "/v1/models")
            if status != 200:
                raise EngineBrokeError(f"HTTP {status}: {words_of(content)}")
            card = json_of(content)["data"][0]
            if not isinstance(card["id"], str):
                raise TypeError("the model's id is no text")
        except (EngineBrokeError, KeyError, IndexError, TypeError) as error:
            words = str(error) if isinstance(error, EngineBrokeError) else f"{type(error).__name__} {error}"
            problem = f"no model is listed at {self.url}/v1/models: {words}"
            remedy = "start the engine and wait until it is ready, or check the address"
            if words.startswith(("HTTP 401", "HTTP 403")):
                remedy = "set CROSSCHIP_API_KEY to a key that the engine takes"
            raise GoldenError(problem, remedy) from None
        return dict(card)


def json_of(content: bytes) -> Any:
    """The document in an answer.

    Raises:
        EngineBrokeError: it is none, or brackets within brackets without end.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise EngineBrokeError(f"an answer of another form: {error}: {words_of(content)}") from None


def words_of(content: bytes) -> str:
    """The beginning of an answer, for a message."""
    return content[:_SHOWN].decode(errors="replace")
