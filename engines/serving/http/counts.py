"""What became of a model's requests: sums for metrics, and the last of them for a page."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from .history import History, Step, average_accuracy, find_quantiles_ms
from .refusals import Refusal

Reason = Literal["REJECTED", "CANCELED", "BACKEND", "OTHER"]
"""Why a request got no result, in Triton's words: there was no room or no time for it, who asked
left, the model couldn't be run, or something was wrong with it."""

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
    failures: dict[Reason, int] = field(default_factory=lambda: dict.fromkeys(get_args(Reason), 0))
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

    @property
    def failure(self) -> int:
        """Requests without a result."""
        return sum(self.failures.values())

    def copy(self) -> Sums:
        """As they are now."""
        return replace(self, batches=dict(self.batches), failures=dict(self.failures))


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
    history: Sequence[Step]
    """The last five minutes."""

    @property
    def failures(self) -> dict[Reason, int]:
        """Requests of all variants that got no result, by why."""
        return {
            reason: sum(sums.failures[reason] for sums in self.sums.values())
            for reason in get_args(Reason)
        }

    @property
    def latencies_ms(self) -> tuple[float, float] | None:
        """Median and 99 % of the last requests."""
        return find_quantiles_ms([done.latency for done in self.recent])

    def lately(self, seconds: float = _SPAN) -> Record:
        """The same with the requests of the last seconds alone."""
        since = time.monotonic() - seconds
        return replace(self, recent=[done for done in self.recent if done.at > since])

    def throughput(self) -> float:
        """Images a second, over the last ten seconds."""
        return sum(done.images for done in self.lately().recent) / _SPAN

    def mean_accuracy(self, accuracy: Mapping[str, float]) -> float | None:
        """Of the last requests' variants; None where one isn't known."""
        return average_accuracy(Counter(done.variant for done in self.recent), accuracy)


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
        self._history = History(time.monotonic())
        self._switches = self._refits = self._misses = 0

    def add_variants(self, names: Iterable[str]) -> None:
        """Count what becomes of requests to these, too."""
        with self._lock:
            for name in names:
                self._sums.setdefault(name, Sums())

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

    def note_failure(self, variant: str, reason: Reason, *, late: bool = False) -> None:
        """A request that a model got no answer to.

        Args:
            late: its time was up.
        """
        with self._lock:
            self._sums[variant].failures[reason] += 1
            self._misses += late and self.slo is not None

    def note_run(
        self, variant: str, requests: Sequence[tuple[float, int]], start: float, end: float
    ) -> None:
        """A run and the requests that it answered.

        Args:
            requests: arrival and images of each.
            start: of the run; all times are of ``time.monotonic``.
        """
        took, images, now = end - start, sum(count for _, count in requests), time.monotonic()
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
                self._history.note(now, end - arrived, variant, count)

    def read(self) -> Record:
        """All of it as it is now."""
        with self._lock:
            return Record(
                {name: found.copy() for name, found in self._sums.items()},
                self._switches, self._refits, self._misses, tuple(self._changes),
                tuple(self._recent), self._history.read(time.monotonic()),
            )  # fmt: skip


def name_reason(refusal: Refusal) -> Reason:
    """Why a refusal is one."""
    if refusal.status in (503, 504):
        return "REJECTED"
    return "BACKEND" if refusal.status >= 500 else "OTHER"
