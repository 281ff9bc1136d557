"""Which variant to serve, so that requests are answered in time and as well as that allows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from tocom_export.errors import InputError

_HEADROOM = 0.8
"""Of the latency wanted, what is planned with: service times scatter."""
_CALM = 0.5
"""Of the latency wanted, what a slower variant must be good for before it is taken again."""
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

    variant: str
    """Name of the one to serve."""
    slowdown: float = 1.0
    """Of this machine at present: measured times over those that were expected."""
    calm_since: float | None = None
    """Since when the next slower variant would have done."""


@dataclass(frozen=True)
class Steering:
    """Picks the variant of each request from the queue and the measured times.

    A pure function: all that changes is in the :class:`State`, which the caller keeps. A faster
    variant is taken at once when the oldest or the newest request that waits would be late, as
    much faster as it takes; the next slower one only after it would have done for ``hold``
    seconds, so that the variant does not flutter.

    Args:
        seconds: variant → how long one request takes, measured where it will be served.
        slo: latency wanted, seconds from arrival to answer.
        accuracy: variant → accuracy, such as :attr:`Bundle.accuracy`; a variant that is neither
            faster nor better than another is left out.
        variants: names to choose from, the best first where an accuracy isn't known, such as
            :attr:`EnginePool.variants`; default: all of ``seconds``, the slower the better.
        hold: seconds.
        workers: requests that are served at a time.

    Raises:
        InputError: there is no variant to choose from, one of them has no time, or a number is
            not positive.
    """

    seconds: Mapping[str, float]
    slo: float
    accuracy: Mapping[str, float] = dataclasses.field(default_factory=dict)
    variants: Sequence[str] | None = None
    hold: float = 1.0
    workers: int = 1

    def __post_init__(self) -> None:
        if unknown := [name for name in self.variants or () if name not in self.seconds]:
            raise InputError(
                f"`variants` {', '.join(unknown)}: `seconds` doesn't say how long one takes; it "
                f"has {', '.join(self.seconds) or 'none'}."
            )
        if not self.seconds or (self.variants is not None and not self.variants):
            raise InputError("`variants`: steering needs at least one to choose from.")
        positive = (self.slo, self.workers, *self.seconds.values())
        if not (all(number > 0 for number in positive) and self.hold >= 0):  # NaN isn't, either
            raise InputError(
                "`seconds`, `slo` and `workers` are positive numbers, `hold` 0 or more."
            )

    @cached_property
    def ladder(self) -> tuple[str, ...]:
        """The variants worth using, the best first, each faster than those before it."""
        usable = list(self.variants or sorted(self.seconds, key=lambda n: -self.seconds[n]))
        if all(name in self.accuracy for name in usable):
            usable.sort(key=lambda n: (-self.accuracy[n], self.seconds[n]))
        rungs: list[str] = []
        for name in usable:
            if not rungs or self.seconds[name] < self.seconds[rungs[-1]]:
                rungs.append(name)
        return tuple(rungs)

    def start(self) -> State:
        """Before the first request: the best variant."""
        return State(self.ladder[0])

    def step(self, state: State, load: Load) -> State:
        """The state for the request about to start; its ``variant`` is the one to serve."""
        ladder = self.ladder
        now = ladder.index(state.variant)
        needed = next(
            (i for i, name in enumerate(ladder) if self._late(name, state, load) <= _HEADROOM),
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

    def observe(self, state: State, variant: str, seconds: float) -> State:
        """The state after a request to a variant took so many seconds, its wait not counted.

        Raises:
            InputError: the variant is not one of these, or the time no positive number.
        """
        if variant not in self.seconds or not 0 < seconds < math.inf:
            raise InputError(f"steering: variant {variant} can't have taken {seconds} s.")
        seen = seconds / self.seconds[variant]
        slowdown = (1 - _MEMORY) * state.slowdown + _MEMORY * seen
        return dataclasses.replace(state, slowdown=slowdown)

    def _late(self, variant: str, state: State, load: Load) -> float:
        """Latency of the oldest or newest request that waits, the larger, over the one wanted."""
        each = self.seconds[variant] * state.slowdown
        newest = -(-load.queued // self.workers) * each
        return max(load.waited + each, newest) / self.slo
