"""A connection that ends well where a request is slow in coming, or broken in its midst."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_SECONDS = 30.0
"""That the headers of a request may take, the first one's from when the connection is made."""


class Connection(H11Protocol):
    """Uvicorn's, which by itself waits for headers as long as they take.

    Between requests its own ``timeout_keep_alive`` holds. Of a body that is broken when its request
    is being answered, or has been, Uvicorn would log two faults of ours, a page each.
    """

    _slow: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by the loop, as the others are."""
        super().connection_made(transport)
        self._slow = self.loop.call_later(_SECONDS, self.timeout_keep_alive_handler)

    def data_received(self, data: bytes) -> None:
        """Some of a request, or of several."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._forget()
        elif self._slow is None:  # the first part of another request's headers
            self._slow = self.loop.call_later(_SECONDS, self.timeout_keep_alive_handler)

    def send_400_response(self, msg: str) -> None:
        """To what isn't HTTP, and nothing else after it."""
        try:
            super().send_400_response(msg)
        except h11.LocalProtocolError:  # it had its answer before the rest came
            self.transport.close()
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """It has ended."""
        self._forget()
        super().connection_lost(exc)

    def _forget(self) -> None:
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None
