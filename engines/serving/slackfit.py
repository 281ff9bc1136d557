"""SlackFit, another policy: the variant and the batch that just fit the time left."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from tocom_export.errors import InputError

from .policy import Ladder, Load, State
from .service_times import HEADROOM, Seconds

_BUCKETS = 16
"""Into which times are put, from the shortest to the latency wanted."""


@dataclass(frozen=True)
class SlackFit(Ladder):
    """Picks the variant and the batch by the time that the most urgent request has left.

    After SuperServe (Khare and others, NSDI 2025), which calls it so; what its description leaves
    open is chosen as served best here. All pairs of a variant and a batch are put into buckets by
    how long they take, evenly wide. Of the last bucket that holds one that is ready within the
    time left and that as many wait for as it serves, taken is the largest batch, and of these the
    best variant. When many wait, little time is left, and what fits is of fast variants; arrivals
    aren't estimated. Where nothing fits, it is the fastest variant, for as many as wait.

    Args:
        seconds: variant → how long one request takes, or batch → how long that takes.
        slo: latency wanted, seconds from arrival to answer.
        accuracy: variant → accuracy; one that is neither faster nor better than another is left
            out.
        variants: names to choose from, the best first where an accuracy isn't known; default: all
            of ``seconds``, the slower the better.
        max_batch: largest batch; default: the largest in ``seconds``.

    Raises:
        InputError: there is no variant to choose from, one of them has no time, or a number is
            not positive.
    """

    seconds: Seconds
    slo: float
    accuracy: Mapping[str, float] = dataclasses.field(default_factory=dict)
    variants: Sequence[str] | None = None
    max_batch: int | None = None

    def __post_init__(self) -> None:
        if not self.slo > 0:  # NaN isn't, either
            raise InputError("`slo` is a positive number.")
        _ = self.ladder

    @cached_property
    def _pairs(self) -> list[tuple[int, int, int, float]]:
        """Bucket, batch, minus the rung, and seconds of each pair; what is preferred comes last."""
        took = self.times.took
        first = min(took[name][1] for name in self.ladder)
        width = max(self.slo - first, first) / _BUCKETS
        return sorted(
            (int((took[name][size] - first) / width), size, -rung, took[name][size])
            for rung, name in enumerate(self.ladder)
            for size in range(1, self.times.largest + 1)
        )

    def step(self, state: State, load: Load) -> State:
        """The state for the batch about to start: its ``variant`` and ``batch`` are to be run."""
        slack = min(load.slacks) if load.slacks else self.slo - load.waited
        left = slack - (1 - HEADROOM) * self.slo
        queued = max(1, load.queued)
        fits = [pair for pair in self._pairs if pair[1] <= queued]
        if ready := [pair for pair in fits if pair[3] * state.slowdown <= left]:
            _, batch, minus_rung, _ = ready[-1]
        else:
            batch, minus_rung = min(queued, self.times.largest), 1 - len(self.ladder)
        return dataclasses.replace(state, variant=self.ladder[-minus_rung], batch=batch)
