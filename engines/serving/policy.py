"""What every policy of serving is told, what it remembers, and what it answers with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from .service_times import Seconds, ServiceTimes


@dataclass(frozen=True)
class Load:
    """What a server sees when it is about to start a batch of requests."""

    now: float
    """Seconds of any clock that doesn't go back."""
    queued: int
    """Requests that wait, those about to start among them; 0 for a look between two batches."""
    waited: float
    """Seconds that the oldest of them has waited."""
    slacks: Sequence[float] | None = None
    """Seconds that each of those that wait has left, in the order in which they are started; below
    zero where it is late already. None: what follows from ``waited`` and the one latency wanted,
    by requests that came evenly."""


@dataclass(frozen=True)
class State:
    """What a policy remembers between two batches, and what it has picked for the next one."""

    variant: str
    """Name of the one to serve."""
    slowdown: float = 1.0
    """Of this machine at present: measured times over those that were expected."""
    calm_since: float | None = None
    """Since when a better variant would have done."""
    batch: int = 1
    """Requests to start together, the oldest first; fewer where not as many wait."""
    rate: float = 0.0
    """Requests that come in a second, by those of late."""
    variance: float = 0.0
    """Of how many come in a second: as large as the rate where they come at random, larger where
    they come in clumps, 0 by the clock."""
    seen: float | None = None
    """When the last batch was begun."""
    left: int = 0
    """Requests that went on waiting then."""


class Policy(Protocol):
    """Picks a variant and a batch whenever a server is about to start one; pure functions.

    What is remembered is in the :class:`State`, which the caller keeps and gives back::

        state = policy.start()
        while ...:
            state = policy.step(state, load)
            ...  # run the state.batch oldest requests on state.variant
            state = policy.observe(state, state.variant, took, batch)
    """

    @property
    def seconds(self) -> Seconds:
        """How long each variant takes, as it was given."""
        ...

    @property
    def slo(self) -> float:
        """Latency wanted, seconds from arrival to answer."""
        ...

    @property
    def accuracy(self) -> Mapping[str, float]:
        """Variant → accuracy, of those where it is known."""
        ...

    def start(self) -> State:
        """Before the first request."""
        ...

    def step(self, state: State, load: Load) -> State:
        """The state for the batch about to start: its ``variant`` and ``batch`` are to be run."""
        ...

    def observe(self, state: State, variant: str, seconds: float, batch: int = 1) -> State:
        """The state after a batch took so many seconds, its requests' wait not counted."""
        ...


class Ladder:
    """What policies have in common that choose from a ladder of variants by measured times.

    Its fields are those of the dataclasses that are made of it.
    """

    seconds: Seconds
    accuracy: Mapping[str, float]
    variants: Sequence[str] | None
    max_batch: int | None

    @cached_property
    def times(self) -> ServiceTimes:
        """Of batches up to the largest."""
        return ServiceTimes.of(self.seconds, self.max_batch)

    @cached_property
    def ladder(self) -> tuple[str, ...]:
        """The variants worth using, the best first, each faster than those before it."""
        return self.times.rank(self.variants, self.accuracy)

    def start(self) -> State:
        """Before the first request: the best variant."""
        return State(self.ladder[0])

    def observe(self, state: State, variant: str, seconds: float, batch: int = 1) -> State:
        """The state after a batch took so many seconds, its requests' wait not counted.

        Raises:
            InputError: the variant is not one of these, or a number is not positive.
        """
        slowdown = self.times.learn(state.slowdown, variant, seconds, batch)
        return dataclasses.replace(state, slowdown=slowdown)
