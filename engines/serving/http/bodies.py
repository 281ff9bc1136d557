"""Reading what a request brings along, never more of it than there may be."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Mapping,
    MutableMapping,
)
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from typing import Any

from .line import refuse_stopping
from .refusals import CLOSE, SOON, Gone, Refusal

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
"""ASGI's: the next part of a request."""
_SECONDS = 60.0
"""That a body may take to arrive."""
_ANY_HEADER = 32
"""Added to zlib's window: gzip or zlib, whichever its first bytes say."""


class Budget:
    """Bytes of requests that are in memory at a time; for the event loop's thread alone."""

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0
        self._reading: set[asyncio.Future[bytes]] = set()
        self._closed = False

    def hold(self, count: int) -> None:
        """Take up some.

        Raises:
            Refusal: there is no room for them now.
        """
        if self.held + count > self.most:
            raise Refusal(503, "too many requests are being read; try again.", {**SOON, **CLOSE})
        self.held += count

    def release(self, count: int) -> None:
        """Give them back."""
        self.held -= count

    async def read(self, parts: Coroutine[Any, Any, bytes]) -> bytes:
        """A body that arrives in parts.

        Raises:
            Refusal: it is slow in coming, or the budget was closed before all of it was there.
        """
        task = asyncio.ensure_future(parts)
        self._reading.add(task)
        try:
            return await asyncio.wait_for(task, _SECONDS)
        except asyncio.TimeoutError:
            raise Refusal(408, f"the body took more than {_SECONDS:g} s.", CLOSE) from None
        except asyncio.CancelledError:
            if self._closed:
                raise refuse_stopping() from None
            raise
        finally:
            self._reading.discard(task)

    def close(self) -> None:
        """Wait for no body any more."""
        self._closed = True
        for task in self._reading:
            task.cancel()


@asynccontextmanager
async def hold_body(
    receive: Receive,
    headers: Mapping[str, str],
    most: int,
    budget: Budget,
    executor: Executor,
    option: str = "",
) -> AsyncIterator[bytes]:
    """A request's body, as it was before gzip or deflate; counted until the block ends.

    Args:
        most: bytes, as they come and as they are unpacked.
        option: of the command line, that says how many they are.

    Raises:
        Refusal: it is too large (413), in a coding that isn't known (415), damaged (400), or slow
            in coming (408).
        Gone: the connection ended before it did.
    """
    coding = headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("identity", "gzip", "deflate"):
        raise Refusal(415, f"Content-Encoding {coding!r}: gzip and deflate are known.", CLOSE)
    if int(headers.get("content-length", "0")) > most:
        raise refuse_large(most, option)
    held = 0

    def hold(count: int) -> None:
        nonlocal held
        budget.hold(count)
        held += count

    try:
        body = await budget.read(_read(receive, most, hold, option))
        if coding != "identity":
            loop = asyncio.get_running_loop()
            packed = len(body)
            body = await loop.run_in_executor(executor, unpack, body, most, option)
            hold(max(0, len(body) - packed))
        yield body
    finally:
        budget.release(held)


async def _read(receive: Receive, most: int, hold: Callable[[int], None], option: str) -> bytes:
    parts: list[bytes] = []
    count = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        part: bytes = message.get("body", b"")
        count += len(part)
        if count > most:
            raise refuse_large(most, option)
        hold(len(part))
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts) if len(parts) > 1 else part


def unpack(body: bytes, most: int, option: str = "") -> bytes:
    """What gzip or zlib packed.

    Raises:
        Refusal: it is damaged, ends early or goes on after its end, or gives more than ``most``.
    """
    stream = zlib.decompressobj(zlib.MAX_WBITS + _ANY_HEADER)
    try:
        found = stream.decompress(body, most + 1)
    except zlib.error:
        raise Refusal(400, "the body is not what its Content-Encoding says.") from None
    if len(found) > most:
        raise refuse_large(most, option)
    if not stream.eof or stream.unused_data:
        raise Refusal(400, "the body's Content-Encoding ends early, or before the body does.")
    return found


async def wait_until_gone(receive: Receive) -> None:
    """Return when the connection ends on which an answer is awaited."""
    while (await receive())["type"] != "http.disconnect":
        pass


def refuse_large(most: int, option: str) -> Refusal:
    """A body has more bytes than are taken."""
    text = f"the body has more than {most} bytes, which is all that is taken here"
    return Refusal(413, f"{text}; the server's {option} says so." if option else f"{text}.")
