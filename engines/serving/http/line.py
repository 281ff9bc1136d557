"""Requests that wait for a model, in the order in which they came."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from tocom_export.variant import Variant

from ...engine import Images, Outputs
from .refusals import CLOSE, SOON, Refusal

FULL, LATE = 503, 504
"""Status of what was not run in time."""


@dataclass(frozen=True)
class Answer:
    """What a request gets."""

    outputs: Outputs
    """Each (B, ...), by name."""
    variant: Variant
    """What answered."""
    arrived: float
    """When the request began to wait; of ``time.monotonic``, as the others."""
    start: float
    """Of the run."""
    end: float


@dataclass(eq=False)
class Ticket:
    """A request that waits; times are of ``time.monotonic``."""

    images: Images
    """(B, C, H, W) float32."""
    variant: str | None
    """The one that it asks for; None is whichever is in force."""
    settle: Callable[[Answer | Exception], None]
    """Called once, from the thread that runs the model."""
    deadline: float = math.inf
    """When an answer is of no use any more."""
    arrived: float = field(default_factory=time.monotonic)

    @property
    def count(self) -> int:
        """Images."""
        return len(self.images)


@dataclass(frozen=True)
class Look:
    """What is seen of a line."""

    waits: Sequence[float] = ()
    """Seconds that each image has waited, in the order in which they came."""
    left: Sequence[float] = ()
    """Seconds until its deadline."""

    def slacks(self, slo: float) -> list[float]:
        """Seconds that each has left of a latency wanted, or until its deadline."""
        pairs = zip(self.waits, self.left, strict=True)
        return [min(slo - waited, left) for waited, left in pairs]


class Line:
    """A queue of requests, of which those for the same variant leave together.

    Many threads may join and leave; one takes.

    Args:
        most: images that wait at a time.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._waiting: deque[Ticket] = deque()
        self._images = 0
        self._closed = False
        self._changed = threading.Condition()

    def __len__(self) -> int:
        """Images that wait."""
        return self._images

    def join(self, ticket: Ticket) -> None:
        """Wait at the end.

        Raises:
            Refusal: there is no room, or the line is closed.
        """
        with self._changed:
            if self._closed:
                raise refuse_stopping()
            # A request that is larger than the line is let in where nobody waits.
            if self._waiting and self._images + ticket.count > self.most:
                raise refuse_full()
            self._waiting.append(ticket)
            self._images += ticket.count
            self._changed.notify()

    def leave(self, ticket: Ticket) -> bool:
        """Wait no more; False where it has been taken by now."""
        with self._changed:
            try:
                self._waiting.remove(ticket)
            except ValueError:
                return False
            self._images -= ticket.count
            return True

    def wake(self) -> None:
        """Have who waits for something to take look, though nobody came."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> list[Ticket]:
        """Let nobody join any more, and send away who waits."""
        with self._changed:
            self._closed = True
            waiting, self._waiting, self._images = list(self._waiting), deque(), 0
            self._changed.notify_all()
            return waiting

    def wait(self, most: int, delay: float, idle: float) -> Look | None:
        """Wait until there is something to take.

        Args:
            most: images that are taken together.
            delay: seconds that a request waits for others to go with it.
            idle: seconds to wait where nobody comes.

        Returns:
            What waits, which may be nothing; None once the line is closed.
        """
        with self._changed:
            if not self._waiting and not self._closed:
                self._changed.wait(idle)
            if not self._waiting:
                return None if self._closed else Look()
            first = self._waiting[0]
            while not self._closed and self._waiting and self._waiting[0] is first:
                left = first.arrived + delay - time.monotonic()
                if left <= 0 or sum(t.count for t in choose_batch(self._waiting, most)) >= most:
                    break
                self._changed.wait(left)
            if not self._waiting:
                return Look()
            now = time.monotonic()
            each = [ticket for ticket in self._waiting for _ in range(ticket.count)]
            waits = [max(0.0, now - ticket.arrived) for ticket in each]
            return Look(waits, [ticket.deadline - now for ticket in each])

    def take(self, most: int) -> tuple[list[Ticket], list[Ticket]]:
        """The next requests to run together, and those whose deadline is over.

        Args:
            most: images.
        """
        now = time.monotonic()
        with self._changed:
            late = [ticket for ticket in self._waiting if ticket.deadline <= now]
            gone = set(map(id, late))
            self._waiting = deque(t for t in self._waiting if id(t) not in gone)
            batch = choose_batch(self._waiting, most)
            gone = set(map(id, batch))
            self._waiting = deque(t for t in self._waiting if id(t) not in gone)
            self._images -= sum(ticket.count for ticket in late + batch)
            return batch, late


def choose_batch(waiting: Iterable[Ticket], most: int) -> list[Ticket]:
    """The first request and those after it that ask for the same, as far as they fit.

    Nobody overtakes one that asks for the same variant.
    """
    batch: list[Ticket] = []
    count = 0
    for ticket in waiting:
        if batch and ticket.variant != batch[0].variant:
            continue
        if batch and count + ticket.count > most:
            break
        batch.append(ticket)
        count += ticket.count
    return batch


def refuse_full() -> Refusal:
    """More requests wait than may."""
    return Refusal(FULL, "too many requests wait; try again.", SOON)


def refuse_late() -> Refusal:
    """A request's time was up before its turn came."""
    return Refusal(LATE, "the request's timeout was over before it was its turn.")


def refuse_stopping() -> Refusal:
    """No request is taken any more."""
    return Refusal(503, "the server is stopping.", {**SOON, **CLOSE})
