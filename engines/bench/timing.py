"""How fast engines run, timed from Python."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Timing:
    """How fast one engine is at one batch; times in milliseconds."""

    batch: int
    runs: int
    median_ms: float
    min_ms: float
    low_ms: float
    """A tenth of the runs are faster."""
    high_ms: float
    """A tenth of the runs are slower."""
    p99_ms: float
    images_per_s: float

    def is_faster(self, other: Timing) -> bool:
        """Whether the difference is more than what the runs of either scatter (10 to 90 %)."""
        return self.high_ms < other.median_ms and self.median_ms < other.low_ms


def time_engines(
    runs: Mapping[Key, Callable[[], object]],
    batch: int,
    seconds: float,
    tell: Callable[[Key], None] = lambda name: None,
    at_most: float = math.inf,
) -> dict[Key, Timing]:
    """Time some engines, taking turns, so that a machine that drifts is fair to all.

    Times are from the call to its return, copies included; images a second are those of the
    median run.

    Args:
        runs: name → one run of a batch.
        seconds: for each engine, after three runs that aren't counted; ten runs at least.
        tell: called with a name when its warm-up begins.
        at_most: seconds for each engine's warm-up, and for its runs, after which fewer than three
            and than ten do.
    """
    for name, run in runs.items():
        tell(name)
        began = time.perf_counter()
        for _ in range(3):
            run()
            if time.perf_counter() - began > at_most:
                break
    took: dict[Key, list[float]] = {name: [] for name in runs}
    order, dice = list(runs.items()), random.Random(0)
    while any(
        sum(times) < seconds or (len(times) < 10 and sum(times) < at_most)
        for times in took.values()
    ):
        dice.shuffle(order)  # what ran before leaves caches and threads behind
        for name, run in order:
            start = time.perf_counter()
            run()
            took[name].append(time.perf_counter() - start)
    return {name: summarise_times(times, batch) for name, times in took.items()}


def summarise_times(times: Sequence[float] | npt.NDArray[np.float64], batch: int) -> Timing:
    """Seconds of each run → their median and spread in milliseconds."""
    least, low, median, high, p99 = map(float, 1000 * np.quantile(times, (0, 0.1, 0.5, 0.9, 0.99)))
    return Timing(batch, np.size(times), median, least, low, high, p99, 1000 * batch / median)
