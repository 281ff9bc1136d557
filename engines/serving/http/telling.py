"""The server's log: what an administrator changes, who is turned away, and each request."""

from __future__ import annotations

import logging
import threading
import time

from starlette.requests import Request

log = logging.getLogger("tocom_export.serve")
"""What a person should see; faults are warnings and errors."""
access = logging.getLogger("tocom_export.serve.access")
"""A line for each request, at the level INFO."""


class Seldom:
    """Logs a warning of a kind that may come in floods: at once, then as often as named at most.

    Safe to share among threads.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._next, self._held = 0.0, 0

    def warn(self, text: str, *args: object) -> None:
        """Log it, and how many of its kind were not since the last time; or count it."""
        now = time.monotonic()
        with self._lock:
            if now < self._next:
                self._held += 1
                return
            self._next, held, self._held = now + self._seconds, self._held, 0
        log.warning(text + (f" ({held} more since it was last said)" if held else ""), *args)


def set_levels(verbosity: int) -> None:
    """What is logged: with -q errors alone, with -v each request, too."""
    log.setLevel(logging.ERROR if verbosity < 0 else logging.INFO)
    access.setLevel(logging.INFO if verbosity > 0 else logging.WARNING)


def name_client(request: Request) -> str:
    """Who asks."""
    return request.client.host if request.client else "?"


def name_place(request: Request) -> str:
    """What is asked for, as it was sent: printable ASCII, without what stands behind a ?."""
    return bytes(request.scope["raw_path"]).decode("ascii", "replace")


def note_request(request: Request, status: int, began: float) -> None:
    """A request was answered.

    Args:
        began: of ``time.monotonic``.
    """
    if access.isEnabledFor(logging.INFO):
        took = 1000 * (time.monotonic() - began)
        access.info(
            "%s %s %s %d %.1f ms",
            name_client(request), request.method, name_place(request), status, took,
        )  # fmt: skip
