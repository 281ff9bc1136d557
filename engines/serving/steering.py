"""Which variant to serve, so that requests are answered in time and as well as that allows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from tocom_export.errors import InputError

from .policy import Ladder
from .policy import Load as Load
from .policy import State as State
from .service_times import HEADROOM, Seconds

_CHANCE = 3.0
"""Standard deviations by which more requests may come than expected."""
_WINDOW = 4.0
"""Over the latency wanted, how far back arrivals count: by then one weighs 1/e. For how unevenly
they come, twice that."""
_EVEN, _CLUMPS = 0.25, 4.0
"""Between these multiples of the rate is what is believed of its variance."""


@dataclass(frozen=True)
class Steering(Ladder):
    """Picks the variant and the batch of each run from the queue and the measured times.

    A pure function: all that changes is in the :class:`State`, which the caller keeps. Taken is the
    best variant with which

    - each request that waits is answered in time when all of them are served by it, and
    - one that comes the moment after is, too, when all that wait then, and as many as are likely to
      come on top, are served by the fastest variant: what is begun now can still be made up for.

    Of the batches that do it is the one by which those that wait are all answered soonest; none is
    waited for. Where no variant will do, it is the fastest, in the batch by which most of those
    that wait are in time.

    How many are likely to come follows from how many came of late, how unevenly, and from how a
    server's queue varies: with a probability of ``exp(-z²/2)`` it takes more than
    ``z² v c² / 4(1 - rate c)`` seconds to serve, ``c`` being what each takes and ``v`` the variance
    of how many come in a second (heavy traffic, even service; Kingman, 1961).

    Args:
        seconds: variant → how long one request takes, or batch → how long that takes, measured
            where it will be served. Of sizes in between it is interpolated.
        slo: latency wanted, seconds from arrival to answer.
        accuracy: variant → accuracy, such as :attr:`Bundle.accuracy`; a variant that is neither
            faster nor better than another is left out.
        variants: names to choose from, the best first where an accuracy isn't known, such as
            :attr:`EnginePool.variants`; default: all of ``seconds``, the slower the better.
        hold: seconds that a better variant must have done before it is taken again, for a
            variant that changes less often.
        workers: batches that are served at a time.
        max_batch: largest batch; default: the largest in ``seconds``.

    Raises:
        InputError: there is no variant to choose from, one of them has no time, or a number is
            not positive.
    """

    seconds: Seconds
    slo: float
    accuracy: Mapping[str, float] = dataclasses.field(default_factory=dict)
    variants: Sequence[str] | None = None
    hold: float = 0.0
    workers: int = 1
    max_batch: int | None = None

    def __post_init__(self) -> None:
        if not (self.slo > 0 and self.workers > 0 and self.hold >= 0):  # NaN isn't, either
            raise InputError("`slo` and `workers` are positive numbers, `hold` 0 or more.")
        _ = self.ladder

    def step(self, state: State, load: Load) -> State:
        """The state for the batch about to start: its ``variant`` and ``batch`` are to be run.

        Where nothing waits, for the next request to come.
        """
        if not load.queued:
            looked = self._count(state, load)
            return dataclasses.replace(self.step(looked, Load(load.now, 1, 0.0)), left=0)
        state, slowdown = self._count(state, load), state.slowdown
        reserves = self._list_reserves(state)
        now, since = self.ladder.index(state.variant), None
        for rung, variant in enumerate(self.ladder):
            batch = self._find_batch(variant, slowdown, load, reserves)
            if batch and rung < now and self.hold:
                since = load.now if state.calm_since is None else state.calm_since
                if load.now - since < self.hold:
                    continue
            if batch:
                break
        else:
            variant, batch = self._hurry(load, slowdown)
        return dataclasses.replace(
            state,
            variant=variant,
            batch=batch,
            calm_since=since if rung == now else None,
            left=load.queued - batch,
        )

    def _count(self, state: State, load: Load) -> State:
        """The state with what came since the last look counted in."""
        passed = 0.0 if state.seen is None else load.now - state.seen
        if passed <= 0:
            return dataclasses.replace(state, seen=load.now)
        came, expected = max(0, load.queued - state.left), state.rate * passed
        share = -math.expm1(-passed / (_WINDOW * self.slo))
        rate = state.rate + share * (came / passed - state.rate)
        # Deviations upwards alone, twice, so that more that come never make for a smaller variance.
        square = 2 * max(0.0, came - expected) ** 2
        share = -math.expm1(-passed / (2 * _WINDOW * self.slo))
        variance = state.variance + share * (square / passed - state.variance)
        return dataclasses.replace(state, rate=rate, variance=variance, seen=load.now)

    def _list_reserves(self, state: State) -> list[tuple[float, float]]:
        """What the fastest variant needs to serve those that wait, and one more.

        Returns:
            For each batch, seconds for each that waits, and seconds on top; none where more
            come than can be served.
        """
        took, found = self.times.took[self.ladder[-1]], []
        rate = state.rate
        chance = min(max(state.variance, _EVEN * rate), _CLUMPS * rate) * _CHANCE**2 / 4
        for size in self.times.sizes:
            batch = took[size] * state.slowdown
            each = batch / size / self.workers
            spare = 1 - rate * each
            if spare > 0:
                found.append((each, batch + chance * each**2 / spare))
        return found

    def _find_batch(
        self, variant: str, slowdown: float, load: Load, reserves: list[tuple[float, float]]
    ) -> int:
        """The batch with which a variant will do; 0 where it won't."""
        took, planned = self.times.took[variant], HEADROOM * self.slo
        for batch in self._order_batches(variant, load.queued):
            if variant != self.ladder[-1]:
                ours, left = took[batch] * slowdown / self.workers, load.queued - batch
                theirs = min((left * each + rest for each, rest in reserves), default=math.inf)
                if ours + theirs > planned:
                    continue
            if self._in_time(took, batch, slowdown, load):
                return batch
        return 0

    def _in_time(self, took: Sequence[float], batch: int, slowdown: float, load: Load) -> bool:
        """Whether all that wait are answered in time when they are served by batches of a size."""
        queued, margin = load.queued, (1 - HEADROOM) * self.slo
        batches = range(-(-queued // batch))
        numbers: Iterable[int] = batches
        if load.slacks is None:  # as even as the work: the first and the last two rounds say it all
            last = batches[-1] // self.workers
            numbers = {0, max(0, last - 1) * self.workers, last * self.workers}
        for number in numbers:
            first = number * batch
            size = min(batch, queued - first)
            done = (number // self.workers * took[batch] + took[size]) * slowdown
            if done > min(self._list_slacks(load, first, size)) - margin:
                return False
        return True

    def _list_slacks(self, load: Load, first: int, size: int) -> Sequence[float]:
        """Seconds that some of those that wait have left, in their order."""
        if load.slacks is not None:
            return load.slacks[first : first + size]
        each = load.waited / max(1, load.queued - 1)  # they came evenly
        return [self.slo - load.waited + each * (first + n) for n in range(size)]

    def _order_batches(self, variant: str, queued: int) -> list[int]:
        """Batches, the one first by which so many are all served soonest."""
        batches = self.times.list_batches(queued)
        return sorted(batches, key=lambda batch: self._drain(variant, batch, queued))

    def _drain(self, variant: str, batch: int, queued: int) -> float:
        """Seconds until so many are served by batches of a size."""
        took, count = self.times.took[variant], -(-queued // batch)
        rounds, others = divmod(count - 1, self.workers)
        return rounds * took[batch] + took[batch if others else queued - (count - 1) * batch]

    def _hurry(self, load: Load, slowdown: float) -> tuple[str, int]:
        """The variant and the batch by which most are answered in time, and all soonest."""
        fastest = {
            batch: min(self.ladder, key=partial(self.times.take, batch=batch))
            for batch in self.times.list_batches(load.queued)
        }
        most = self.slo if load.slacks is None else max(load.slacks)

        def rate(batch: int) -> tuple[int, float]:
            late = load.queued - self._count_in_time(fastest[batch], batch, load, slowdown, most)
            return late, self._drain(fastest[batch], batch, load.queued)

        batch = min(fastest, key=rate)
        return fastest[batch], batch

    def _count_in_time(
        self, variant: str, batch: int, load: Load, slowdown: float, most: float
    ) -> int:
        """Requests answered in time when all that wait are served by batches of a size.

        Args:
            most: seconds that any of them has left.
        """
        took, queued, count = self.times.took[variant], load.queued, 0
        for number, first in enumerate(range(0, queued, batch)):
            size = min(batch, queued - first)
            done = (number // self.workers * took[batch] + took[size]) * slowdown
            if done > most:
                break
            slacks = self._list_slacks(load, first, size)
            count += sum(done <= slack for slack in slacks)
        return count
