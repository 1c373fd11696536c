"""How HTTP is read: uvicorn's protocol over llhttp, which takes a quarter less time for each event of a stream than the
one in pure Python, and which by itself would keep a head of any length.
"""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["BoundedHttp"]

_MOST_BYTES = 64 * 2**10  # of a request's address and headers, as in uvicorn's other protocol
_FRAMING = 16  # bytes around a part of a body, which may be one byte long


class BoundedHttp(HttpToolsProtocol):
    """Closes a connection that sends more than any client has to say besides a body: headers or framing without end."""

    _num_other = 0  # bytes of this request that are no body
    _num_body = 0  # bytes of body in what is being read
    _ended = False

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

    def on_body(self, body: bytes) -> None:
        """A part of the body (httptools)."""
        self._num_body += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request has come whole (httptools)."""
        self._ended = True
        super().on_message_complete()

    def _refuse(self) -> None:
        message = f"the address and headers of a request are longer than {_MOST_BYTES} bytes"
        self.logger.warning(message)
        if self.cycle is None or self.cycle.response_complete:
            self.send_400_response(message)
        else:
            self.transport.close()
