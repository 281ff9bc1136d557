"""How a model was served over the last minutes, in steps of some seconds."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

STEP = 5.0
"""Seconds."""
_STEPS = 60
_SAMPLE = 512
"""Latencies of a step that are kept, of more a random choice."""


@dataclass
class Step:
    """The requests that were answered within some seconds."""

    number: int
    """Steps of ``time.monotonic`` before it."""
    latencies: list[float] = field(default_factory=list)
    """Seconds from arrival to answer."""
    answered: Counter[str] = field(default_factory=Counter)
    """Variant → requests."""
    images: int = 0

    @property
    def end(self) -> float:
        """``time.monotonic``."""
        return (self.number + 1) * STEP

    @cached_property
    def latencies_ms(self) -> tuple[float, float] | None:
        """Median and 99 %, once it has ended; None where nothing was answered."""
        return find_quantiles_ms(self.latencies)


class History:
    """The last steps, none of which is left out. For one thread at a time."""

    def __init__(self, now: float) -> None:
        self._steps: deque[Step] = deque([Step(int(now // STEP))], maxlen=_STEPS + 1)
        self._dice = random.Random(0)

    def note(self, now: float, latency: float, variant: str, images: int) -> None:
        """A request was answered."""
        step = self._reach(now)
        step.answered[variant] += 1
        step.images += images
        if len(step.latencies) < _SAMPLE:
            step.latencies.append(latency)
        elif (place := self._dice.randrange(step.answered.total())) < _SAMPLE:
            step.latencies[place] = latency

    def read(self, now: float) -> Sequence[Step]:
        """Those that have ended; they don't change any more."""
        last = self._reach(now)
        return tuple(step for step in self._steps if step is not last)

    def _reach(self, now: float) -> Step:
        """The step that is under way."""
        number = int(now // STEP)
        for missing in range(max(self._steps[-1].number, number - _STEPS - 1) + 1, number + 1):
            self._steps.append(Step(missing))
        return self._steps[-1]


def find_quantiles_ms(latencies: Sequence[float]) -> tuple[float, float] | None:
    """Median and 99 % of seconds, in milliseconds; None of none."""
    if not latencies:
        return None
    middle, most = 1000 * np.quantile(latencies, (0.5, 0.99))
    return float(middle), float(most)


def average_accuracy(answered: Mapping[str, int], accuracy: Mapping[str, float]) -> float | None:
    """Of requests, by the variants that answered them; None of none, or where one isn't known."""
    if not answered or not answered.keys() <= accuracy.keys():
        return None
    return sum(accuracy[name] * n for name, n in answered.items()) / sum(answered.values())
