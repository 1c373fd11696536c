"""How HTTP is read: uvicorn's protocol over llhttp, which takes a quarter less time for each event of a stream than the
one in pure Python, and which by itself would keep a head of any length, and wait for it for ever.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["BoundedHttp"]

_MOST_BYTES = 64 * 2**10  # of a request's address and headers, as in uvicorn's other protocol
_HEAD_S = 30.0  # from a connection's beginning, or a later request's first byte, to the end of the headers
_FRAMING = 16  # bytes around a part of a body, which may be one byte long


class BoundedHttp(HttpToolsProtocol):
    """Closes a connection that sends more than any client has to say besides a body (headers or framing without end),
    and one whose request does not come: neither answering nor waiting between two requests, it would hold its place.
    """

    _head_limit: asyncio.TimerHandle | None = None
    _num_other = 0  # bytes of this request that are no body
    _num_body = 0  # bytes of body in what is being read
    _ended = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there (asyncio)."""
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone (asyncio)."""
        self._end_expecting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Something came (asyncio)."""
        self._num_body, self._ended = 0, False
        super().data_received(data)
        if self._ended:
            self._num_other = 0
        else:
            self._num_other = max(0, self._num_other + len(data) - (1 + _FRAMING) * self._num_body)
        if self._num_other > _MOST_BYTES and not self.transport.is_closing():
            self._refuse()
        if not self._is_answering:
            self._expect_head()

    def on_headers_complete(self) -> None:
        """The head has come whole (httptools)."""
        self._end_expecting()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of the body (httptools)."""
        self._num_body += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request has come whole (httptools)."""
        self._ended = True
        super().on_message_complete()

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _expect_head(self) -> None:
        """Bytes that come before its end give a head no more time."""
        if self._head_limit is None:
            self._head_limit = self.loop.call_later(_HEAD_S, self.transport.close)

    def _end_expecting(self) -> None:
        if self._head_limit is not None:
            self._head_limit.cancel()
            self._head_limit = None

    def _refuse(self) -> None:
        message = f"the address and headers of a request are longer than {_MOST_BYTES} bytes"
        self.logger.warning(message)
        if self._is_answering:
            self.transport.close()
        else:
            self.send_400_response(message)
