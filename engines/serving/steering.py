"""Which degree to serve at, so that requests are answered in time and as well as that allows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from tocom_export.errors import InputError

_HEADROOM = 0.8
"""Of the latency wanted, what is planned with: service times scatter."""
_CALM = 0.5
"""Of the latency wanted, what a slower degree must be good for before it is taken again."""
_MEMORY = 0.1
"""How much one measurement counts against those before it."""


@dataclass(frozen=True)
class Load:
    """What a server sees when it is about to start a request."""

    now: float
    """Seconds of any clock that doesn't go back."""
    queued: int
    """Requests that wait, the one about to start among them."""
    waited: float
    """Seconds that it has waited."""


@dataclass(frozen=True)
class State:
    """What is remembered between two requests."""

    degree: int
    slowdown: float = 1.0
    """Of this machine at present: measured times over those that were expected."""
    calm_since: float | None = None
    """Since when the next slower degree would have done."""


@dataclass(frozen=True)
class Steering:
    """Picks the degree of each request from the queue and the measured times.

    A pure function: all that changes is in the :class:`State`, which the caller keeps. A faster
    degree is taken at once when the oldest or the newest request that waits would be late, as
    many degrees up as it takes; the next slower one only after it would have done for ``hold``
    seconds, so that the degree does not flutter.

    Args:
        seconds: degree → how long one request takes, measured where it will be served.
        slo: latency wanted, seconds from arrival to answer.
        accuracy: degree → accuracy, such as :attr:`Bundle.accuracy`; a degree that is neither
            faster nor better than another is left out. Without it a lower degree counts as
            better.
        floor, ceiling: lowest and highest degree to use.
        hold: seconds.
        workers: requests that are served at a time.

    Raises:
        InputError: no degree lies within floor and ceiling, or a number is not positive.
    """

    seconds: Mapping[int, float]
    slo: float
    accuracy: Mapping[int, float] = dataclasses.field(default_factory=dict)
    floor: int | None = None
    ceiling: int | None = None
    hold: float = 1.0
    workers: int = 1

    def __post_init__(self) -> None:
        if not self.seconds or not self.ladder:
            raise InputError("steering: no degree lies within floor and ceiling.")
        positive = (self.slo, self.workers, *self.seconds.values())
        if not (all(number > 0 for number in positive) and self.hold >= 0):  # NaN isn't, either
            raise InputError("steering: times, latency and workers are positive numbers.")

    @cached_property
    def ladder(self) -> tuple[int, ...]:
        """The degrees worth using, the best first, each faster than those before it."""
        lowest = self.floor if self.floor is not None else min(self.seconds)
        highest = self.ceiling if self.ceiling is not None else max(self.seconds)
        usable = [degree for degree in self.seconds if lowest <= degree <= highest]
        known = all(degree in self.accuracy for degree in usable)

        def quality(degree: int) -> float:
            return self.accuracy[degree] if known else -degree

        rungs: list[int] = []
        for degree in sorted(usable, key=lambda d: (-quality(d), self.seconds[d])):
            if not rungs or self.seconds[degree] < self.seconds[rungs[-1]]:
                rungs.append(degree)
        return tuple(rungs)

    def start(self) -> State:
        """Before the first request: the best degree."""
        return State(self.ladder[0])

    def step(self, state: State, load: Load) -> State:
        """The state for the request about to start; its ``degree`` is the one to serve at."""
        ladder = self.ladder
        now = ladder.index(state.degree)
        needed = next(
            (i for i, degree in enumerate(ladder) if self._late(degree, state, load) <= _HEADROOM),
            len(ladder) - 1,
        )
        if needed > now:
            return State(ladder[needed], state.slowdown)
        if now == 0 or self._late(ladder[now - 1], state, load) > _CALM:
            return dataclasses.replace(state, calm_since=None)
        since = load.now if state.calm_since is None else state.calm_since
        if load.now - since < self.hold:
            return dataclasses.replace(state, calm_since=since)
        return State(ladder[now - 1], state.slowdown)

    def measured(self, state: State, degree: int, seconds: float) -> State:
        """The state after a request at ``degree`` took so many seconds, its wait not counted.

        Raises:
            InputError: the degree is not one of these, or the time no positive number.
        """
        if degree not in self.seconds or not 0 < seconds < math.inf:
            raise InputError(f"steering: degree {degree} can't have taken {seconds} s.")
        seen = seconds / self.seconds[degree]
        slowdown = (1 - _MEMORY) * state.slowdown + _MEMORY * seen
        return dataclasses.replace(state, slowdown=slowdown)

    def _late(self, degree: int, state: State, load: Load) -> float:
        """Latency of the oldest or newest request that waits, the larger, over the one wanted."""
        each = self.seconds[degree] * state.slowdown
        newest = -(-load.queued // self.workers) * each
        return max(load.waited + each, newest) / self.slo
