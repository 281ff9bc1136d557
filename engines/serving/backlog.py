"""How long requests may have waited, where a server hands them over in calls and doesn't say."""

from __future__ import annotations

_PAUSE = 0.002
"""Seconds between two calls of a busy server at the most, beside what it waits for on purpose."""


class Backlog:
    """A bound on the wait of the oldest request in a call, told from the calls alone.

    A call takes all that waits, up to ``capacity`` images. So what is in one came after the last
    one began, unless that was full; and where nothing ran for a while, nothing was waiting.

    Args:
        capacity: images in a call at the most.
        delay: seconds that the server waits for a call to fill.
    """

    def __init__(self, capacity: int, delay: float) -> None:
        self._capacity, self._delay = capacity, delay
        self._since = self._ended = -float("inf")

    def begin(self, now: float, images: int) -> float:
        """Seconds that the oldest request of the call that begins can have waited."""
        if now - self._ended > self._delay + _PAUSE:
            self._since = now - self._delay
        waited = now - self._since
        if images < self._capacity:
            self._since = now
        return waited

    def end(self, now: float) -> None:
        """The call has been answered."""
        self._ended = now
