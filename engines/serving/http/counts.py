"""What became of a model's requests: sums for metrics, and the last of them for a page."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

_RECENT = 2048
"""Requests of which the latency is remembered."""
_CHANGES = 512
"""Changes of the variant in force that are remembered."""
_SPAN = 10.0
"""Seconds that a throughput is of."""


@dataclass
class Sums:
    """Of the requests to one variant, since the start."""

    success: int = 0
    failure: int = 0
    images: int = 0
    runs: int = 0
    queue: float = 0.0
    """Seconds that requests waited."""
    compute: float = 0.0
    """Seconds that their runs took, for each request."""
    request: float = 0.0
    """Seconds from arrival to answer."""
    last: float = 0.0
    """When one was last answered, seconds since 1970."""
    batches: dict[int, tuple[int, float]] = field(default_factory=dict)
    """Images in a run → how many runs, and seconds that they took."""


@dataclass(frozen=True)
class Done:
    """One request that was answered."""

    at: float
    """``time.monotonic``."""
    latency: float
    """Seconds from arrival to answer."""
    variant: str
    images: int


@dataclass(frozen=True)
class Record:
    """A copy of all counts at one moment."""

    sums: Mapping[str, Sums]
    switches: int
    refits: int
    misses: int
    """Requests that took longer than wanted, among them those that got no answer in time."""
    changes: Sequence[tuple[float, str]]
    """Seconds since 1970, and the variant in force from then on."""
    recent: Sequence[Done]

    @property
    def latencies_ms(self) -> tuple[float, float] | None:
        """Median and 99 % of the last requests."""
        if not self.recent:
            return None
        middle, most = 1000 * np.quantile([done.latency for done in self.recent], (0.5, 0.99))
        return float(middle), float(most)

    def lately(self, seconds: float = _SPAN) -> Record:
        """The same with the requests of the last seconds alone."""
        since = time.monotonic() - seconds
        return replace(self, recent=[done for done in self.recent if done.at > since])

    def throughput(self) -> float:
        """Images a second, over the last ten seconds."""
        return sum(done.images for done in self.lately().recent) / _SPAN

    def mean_accuracy(self, accuracy: Mapping[str, float]) -> float | None:
        """Of the last requests' variants; None where one isn't known."""
        if not self.recent or not {done.variant for done in self.recent} <= accuracy.keys():
            return None
        return sum(accuracy[done.variant] for done in self.recent) / len(self.recent)


class Counts:
    """Counts of one model. Safe to share among threads.

    Args:
        variants: names.
        slo: latency wanted, seconds; None where none was named.
    """

    def __init__(self, variants: Sequence[str], slo: float | None) -> None:
        self.slo = slo
        self._lock = threading.Lock()
        self._sums = {name: Sums() for name in variants}
        self._changes: deque[tuple[float, str]] = deque(maxlen=_CHANGES)
        self._recent: deque[Done] = deque(maxlen=_RECENT)
        self._switches = self._refits = self._misses = 0

    def note_variant(self, name: str) -> None:
        """The variant in force from now on."""
        with self._lock:
            if self._changes and self._changes[-1][1] == name:
                return
            self._switches += bool(self._changes)
            self._changes.append((time.time(), name))

    def note_refit(self) -> None:
        """Weights were exchanged."""
        with self._lock:
            self._refits += 1

    def note_failure(self, variant: str, *, late: bool = False) -> None:
        """A request that a model got no answer to.

        Args:
            late: its time was up.
        """
        with self._lock:
            self._sums[variant].failure += 1
            self._misses += late and self.slo is not None

    def note_run(
        self, variant: str, requests: Sequence[tuple[float, int]], start: float, end: float
    ) -> None:
        """A run and the requests that it answered.

        Args:
            requests: arrival and images of each.
            start: of the run; all times are of ``time.monotonic``.
        """
        took, images = end - start, sum(count for _, count in requests)
        with self._lock:
            sums = self._sums[variant]
            runs, seconds = sums.batches.get(images, (0, 0.0))
            sums.batches[images] = runs + 1, seconds + took
            sums.runs += 1
            sums.images += images
            sums.success += len(requests)
            sums.compute += took * len(requests)
            sums.last = time.time()
            for arrived, count in requests:
                sums.queue += start - arrived
                sums.request += end - arrived
                self._misses += self.slo is not None and end - arrived > self.slo
                self._recent.append(Done(end, end - arrived, variant, count))

    def read(self) -> Record:
        """All of it as it is now."""
        with self._lock:
            sums = {
                name: Sums(**{**vars(found), "batches": dict(found.batches)})
                for name, found in self._sums.items()
            }
            return Record(
                sums, self._switches, self._refits, self._misses,
                tuple(self._changes), tuple(self._recent),
            )  # fmt: skip
