"""What all requests to one server share: its models, its limits, and whether it is stopping."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from ...engine import Images
from .bodies import Budget, Receive, wait_until_gone
from .line import Answer, Ticket, refuse_full, refuse_late, refuse_stopping
from .metrics import Metrics
from .refusals import Gone, Refusal
from .service import Service
from .telling import Seldom
from .yielding import give_way

_HELD = 256 * 2**20
"""Bytes of requests that are read at a time, at most; more where one alone may be larger."""
_PATIENCE = 20.0
"""Seconds that the last requests have for their answers, once the server is stopping. With what
comes after that the end is within 30, which is what Kubernetes waits for."""
_BODIES = 3.0
"""Seconds that bodies have to arrive whole, then."""
_LINGER = 0.25
"""Seconds without a request after which it ends: one that is on its way is still told."""
_STRANGERS = 10.0
"""Seconds between two words on who asks for what is an administrator's."""
T = TypeVar("T")


class Site:
    """The state of a server.

    Args:
        services: by their names.
        token: of its administrators; None takes none of their wishes.
        largest_image: bytes of the image files in a request.
    """

    def __init__(
        self, services: Mapping[str, Service], token: str | None, largest_image: int
    ) -> None:
        self.services, self.token, self.largest_image = services, token, largest_image
        largest = max([largest_image, *(s.form.largest for s in services.values())])
        self.budget = Budget(max(_HELD, 2 * largest))
        # Decoding, unpacking and parsing that would keep others waiting.
        self.workers = min(4, os.cpu_count() or 1)
        self.executor = ThreadPoolExecutor(self.workers, "prepare", initializer=give_way)
        self.metrics = Metrics(services)
        self.strangers = Seldom(_STRANGERS)
        self.since = time.time()
        self.stopping_since: float | None = None
        """Of ``time.monotonic``; None until it stops."""
        self.working = 0
        """Requests that are being answered."""
        self.worked = time.monotonic()
        """When the last one was."""

    def find(self, name: str) -> Service:
        """A model by its name.

        Raises:
            Refusal: there is none.
        """
        if service := self.services.get(name):
            return service
        raise Refusal(
            404, f"there is no model {name[:64]!r}; there are {', '.join(self.services)}."
        )

    @property
    def stopping(self) -> bool:
        """Whether new requests are refused."""
        return self.stopping_since is not None

    def check_open(self) -> None:
        """Raise Refusal where the server is stopping."""
        if self.stopping:
            raise refuse_stopping()

    def check_room(self, service: Service) -> None:
        """Raise Refusal where as many wait as may, those among them that wait to be prepared."""
        waiting = len(service.line) + max(0, service.preparing - self.workers)
        if waiting >= service.line.most:
            raise refuse_full()

    async def prepare(self, service: Service, deadline: float, call: Callable[[], T]) -> T:
        """Do beside the event loop what a request needs before or after its run.

        Args:
            deadline: of ``time.monotonic``; after it, it isn't begun.

        Raises:
            Refusal: there is no room, or the time is up.
        """

        def begin() -> T:
            if time.monotonic() > deadline:
                raise refuse_late()
            return call()

        self.check_room(service)
        service.preparing += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.executor, begin)
        finally:
            service.preparing -= 1

    def stop(self) -> None:
        """Take no more requests; those that were taken are answered."""
        self.stopping_since = self.stopping_since or time.monotonic()

    @property
    def finished(self) -> bool:
        """Whether it has stopped, and nobody awaits an answer, or has for too long."""
        if self.stopping_since is None:
            return False
        now, last = time.monotonic(), max(self.stopping_since, self.worked)
        return (self.working == 0 and now - last > _LINGER) or now - self.stopping_since > _PATIENCE

    def tick(self) -> bool:
        """Called several times a second by the event loop; whether the server is to end.

        Once it is stopping, those are told who are too late.
        """
        if self.stopping_since is not None:
            if time.monotonic() - self.stopping_since > _BODIES:
                self.budget.close()
            if self.finished:
                for service in self.services.values():
                    service.turn_away()
        return self.finished

    def close(self) -> None:
        """Once all have their answers: let threads and engines go."""
        self.executor.shutdown(cancel_futures=True)
        for service in self.services.values():
            service.close()


async def ask(
    service: Service,
    images: Images,
    variant: str | None,
    deadline: float,
    receive: Receive,
) -> Answer:
    """Wait in a model's line and get the answer.

    Args:
        images: (B, C, H, W) float32.
        deadline: of ``time.monotonic``; who is still waiting then is taken out of the line.
        receive: ASGI's, of the request: who hangs up is taken out of the line, too.

    Raises:
        Refusal: there is no room, or the time is up, or the images can't be used.
        Gone: the connection has ended.
    """
    loop = asyncio.get_running_loop()
    answered: asyncio.Future[Answer | Exception] = loop.create_future()

    def settle(found: Answer | Exception) -> None:
        def tell() -> None:
            if not answered.done():
                answered.set_result(found)

        with suppress(RuntimeError):  # the loop was ended by a second signal
            loop.call_soon_threadsafe(tell)

    ticket = Ticket(images, variant, settle, deadline)
    service.line.join(ticket)
    gone = loop.create_task(wait_until_gone(receive))
    try:
        left = deadline - time.monotonic()
        timeout = None if left == float("inf") else max(0.0, left)
        either: set[asyncio.Future[Any]] = {answered, gone}
        await asyncio.wait(either, timeout=timeout, return_when="FIRST_COMPLETED")
        if not answered.done():
            if service.line.leave(ticket):
                raise Gone if gone.done() else refuse_late()
            if gone.done():
                raise Gone(counted=True)
            await asyncio.wait(either, return_when="FIRST_COMPLETED")
            if not answered.done():
                raise Gone(counted=True)
        found = answered.result()
        if isinstance(found, Exception):
            raise found
        return found
    finally:
        gone.cancel()
        answered.cancel()
