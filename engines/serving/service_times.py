"""How long a batch of each variant takes, from times measured at some sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from tocom_export.errors import InputError

Seconds = Mapping[str, float | Mapping[int, float]]
"""Variant → seconds of one request; or of a batch of each size that was measured."""
LARGEST = 1024
"""Of the batches that are planned with."""
HEADROOM = 0.9
"""Of the latency wanted, what is planned with: service times scatter."""
_MEMORY = 0.1
"""How much one measurement counts against those before it."""


@dataclass(frozen=True)
class ServiceTimes:
    """How long a batch of each variant takes.

    Between sizes that were measured it is interpolated. Below the smallest a batch takes what that
    does; beyond the largest, more in proportion. None takes less than a smaller one.
    """

    took: Mapping[str, Sequence[float]]
    """Variant → seconds of a batch of 0 (none), 1, 2, ..."""
    sizes: tuple[int, ...]
    """Batches worth planning with: those that were measured, up to the largest, and 1."""

    @classmethod
    def of(cls, seconds: Seconds, largest: int | None = None) -> ServiceTimes:
        """Times of batches up to ``largest``, by default the largest that was measured.

        Raises:
            InputError: a time is not positive, or a size not a whole number of 1 to 1024.
        """
        measured = {
            name: dict(sorted(found.items())) if isinstance(found, Mapping) else {1: found}
            for name, found in seconds.items()
        }
        sizes = {size for found in measured.values() for size in found}
        times = [took for found in measured.values() for took in found.values()]
        if not all(measured.values()) or not all(0 < took < math.inf for took in times):
            raise InputError("`seconds`: times are positive numbers.")
        most = max(sizes, default=1) if largest is None else largest
        if not all(isinstance(size, int) and 1 <= size <= LARGEST for size in {*sizes, most}):
            raise InputError(f"`seconds`, `max_batch`: batches are whole numbers, 1 to {LARGEST}.")
        took = {
            name: [0.0, *accumulate((_interpolate(found, n) for n in range(1, most + 1)), max)]
            for name, found in measured.items()
        }
        return cls(took, tuple(sorted({1, most, *(size for size in sizes if size <= most)})))

    @property
    def largest(self) -> int:
        """The largest batch."""
        return self.sizes[-1]

    def list_batches(self, queued: int) -> list[int]:
        """Batches worth considering where so many wait: of a size in ``sizes``, and all of them."""
        most = min(queued, self.largest)
        return [*(size for size in self.sizes if size < most), most]

    def rank(
        self, variants: Sequence[str] | None, accuracy: Mapping[str, float]
    ) -> tuple[str, ...]:
        """The variants worth using, the best first, each faster than those before it.

        Args:
            variants: to choose from, the best first; None: all, the slower the better.
            accuracy: taken in place of that order where it is known of all of them.

        Raises:
            InputError: there is none to choose from, or no time of one.
        """
        if unknown := [name for name in variants or () if name not in self.took]:
            raise InputError(
                f"`variants` {', '.join(unknown)}: `seconds` doesn't say how long one takes; it "
                f"has {', '.join(self.took) or 'none'}."
            )
        pace = {name: took[-1] for name, took in self.took.items()}
        usable = sorted(self.took, key=lambda n: -pace[n]) if variants is None else list(variants)
        if not usable:
            raise InputError("`variants`: steering needs at least one to choose from.")
        if all(name in accuracy for name in usable):
            usable.sort(key=lambda n: (-accuracy[n], pace[n]))
        rungs: list[str] = []
        for name in usable:
            if not rungs or pace[name] < pace[rungs[-1]]:
                rungs.append(name)
        return tuple(rungs)

    def take(self, variant: str, batch: int) -> float:
        """Seconds that a batch of any size takes."""
        took = self.took[variant]
        return took[batch] if batch <= self.largest else took[-1] * batch / self.largest

    def learn(self, slowdown: float, variant: str, seconds: float, batch: int) -> float:
        """The machine's slowdown, after a batch that took so long.

        Raises:
            InputError: the variant is not one of these, or a number is not positive.
        """
        if variant not in self.took or not 0 < seconds < math.inf or batch < 1:
            raise InputError(f"steering: variant {variant} can't have taken {seconds} s.")
        return (1 - _MEMORY) * slowdown + _MEMORY * seconds / self.take(variant, batch)


def _interpolate(measured: Mapping[int, float], size: int) -> float:
    """Seconds of a batch; sizes ascend."""
    sizes = list(measured)
    if size <= sizes[0]:
        return measured[sizes[0]]
    for low, high in pairwise(sizes):
        if size <= high:
            share = (size - low) / (high - low)
            return measured[low] + share * (measured[high] - measured[low])
    return measured[sizes[-1]] * size / sizes[-1]
