"""A pool whose variant is picked by load, for servers that hand over requests in calls."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial

from ..bench.timing import time_engines
from ..verify import sample_images
from .backlog import Backlog
from .policy import Load
from .pool import EnginePool
from .service_times import LARGEST
from .steering import Steering

_LARGER = 4
"""The batch that is timed beside single images; larger ones are taken to be in proportion."""
_SECONDS = 0.2
"""How long each is timed for."""


def measure_seconds(pool: EnginePool, largest: int) -> dict[str, dict[int, float]]:
    """Variant → batch → its seconds, measured here and now, in turns."""
    sizes = sorted({1, min(_LARGER, largest)})
    runs = {
        (name, size): partial(pool.open(name).run, sample_images(pool.spec, size))
        for name in pool.variants
        for size in sizes
    }
    timings = time_engines(runs, 1, _SECONDS, at_most=2 * _SECONDS)
    return {
        name: {size: timings[name, size].median_ms / 1000 for size in sizes}
        for name in pool.variants
    }


class Steered:
    """Picks the variant of each call of a server by :class:`Steering`. For one thread.

    All images of a call are answered when the last of them is, so each has to wait for all.

    Args:
        slo: latency wanted, seconds from arrival to answer.
        capacity, delay: as of :class:`Backlog`.
    """

    def __init__(
        self,
        pool: EnginePool,
        slo: float,
        capacity: int,
        delay: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        largest = min(capacity, LARGEST)
        seconds, accuracy = measure_seconds(pool, largest), pool.bundle.accuracy
        self._steering = Steering(seconds, slo, accuracy, variants=pool.variants, max_batch=largest)
        self._state = self._steering.start()
        self._backlog = Backlog(capacity, delay)
        self._clock = clock

    def begin(self, images: int) -> None:
        """A call of so many images begins."""
        now = self._clock()
        waited = self._backlog.begin(now, images)
        self._load = Load(now, images, waited, [self._steering.slo - waited] * images)

    def choose(self) -> str:
        """The variant for the call that began."""
        state = self._steering.step(self._state, self._load)
        self._state = dataclasses.replace(state, left=0)  # all of them are run
        return state.variant

    def knows(self, variant: str) -> bool:
        """Whether it has timed a variant; a reload may have brought others."""
        return variant in self._steering.seconds

    def observe(self, variant: str, images: int, seconds: float) -> None:
        """A batch of so many images took so long."""
        self._state = self._steering.observe(self._state, variant, seconds, images)

    def end(self) -> None:
        """The call has been answered."""
        self._backlog.end(self._clock())
