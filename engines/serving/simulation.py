"""Arrivals of requests, and what becomes of them with one variant or under steering."""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tocom_export.errors import InputError

from .steering import Load, Steering

Arrivals = npt.NDArray[np.float64]
"""Seconds, ascending, (N,)."""
_LARGEST = 100_000_000  # bytes of a file of arrivals

TRACES: dict[str, Callable[[Arrivals], Arrivals]] = {
    "steady": lambda t: np.full_like(t, 0.7),
    "burst": lambda t: np.where((t % 0.4) < 0.2, 0.5, 1.5),
    "ramp": lambda t: 0.2 + 1.5 * t,
    "overload": lambda t: np.full_like(t, 2.5),
}
"""Arrivals over what the slowest variant can serve, along the trace (0 to 1)."""
TRACE_SECONDS, TRACE_REQUESTS = 8, 2000
"""Least length of the traces that steering is shown on, in pretended seconds and in requests that
the slowest variant could serve."""


def draw_arrivals(shape: str, capacity: float, seconds: float, seed: int = 0) -> Arrivals:
    """Arrivals at random (Poisson), at a rate that follows one of :data:`TRACES`.

    Args:
        capacity: requests a second that the slowest variant can serve.
        seconds: length of the trace.
    """
    rate = TRACES[shape]
    rng = np.random.default_rng(seed)
    most = capacity * float(rate(np.linspace(0, 1, 1001)).max())
    candidates = np.sort(rng.uniform(0, seconds, rng.poisson(most * seconds)))
    keep = rng.uniform(0, most, len(candidates)) < capacity * rate(candidates / seconds)
    return np.asarray(candidates[keep], np.float64)


def draw_traces(seconds: Mapping[str, float]) -> dict[str, Arrivals]:
    """One of each of :data:`TRACES`, for variants whose requests take so long."""
    capacity = 1 / max(seconds.values())
    length = max(TRACE_SECONDS, TRACE_REQUESTS / capacity)
    return {shape: draw_arrivals(shape, capacity, length) for shape in TRACES}


def read_arrivals(file: Path) -> Arrivals:
    """Arrivals from a text file: seconds of any clock, one a line; the first is at 0.

    Raises:
        InputError: it can't be read, or holds something else.
    """
    try:
        if file.stat().st_size > _LARGEST:
            raise InputError(f"{file} is too large for a list of arrivals.")
        times = np.array(file.read_text("utf-8").split(), np.float64)
    except OSError as error:
        raise InputError(f"{file}: can't be read: {error.strerror}.") from None
    except ValueError:
        raise InputError(f"{file}: a number of seconds is expected on each line.") from None
    if not len(times):
        raise InputError(f"{file}: it is empty; arrivals are expected, seconds, one a line.")
    if not np.isfinite(times).all() or (np.diff(times) < 0).any():
        raise InputError(f"{file}: arrivals are finite numbers of seconds in ascending order.")
    return np.asarray(times - times[0], np.float64)


@dataclass(frozen=True)
class Outcome:
    """What became of a trace's requests."""

    requests: int
    met: float
    """Percent of them that were answered within the latency wanted."""
    shares: Mapping[str, float]
    """Variant → percent of the requests that it answered, the largest share first."""
    accuracy: float | None
    """Mean over the requests of their variants' accuracy; None where one of these isn't known."""
    p50_ms: float
    p99_ms: float
    switches: int


@dataclass(frozen=True)
class Comparison:
    """One trace served under steering, and by each variant alone."""

    steered: Outcome
    fixed: Mapping[str, Outcome]


def summarise_requests(
    latencies: Sequence[float],
    variants: Sequence[str],
    slo: float,
    accuracy: Mapping[str, float] | None = None,
) -> Outcome:
    """What became of requests, given in the order of their start.

    Args:
        latencies: seconds from arrival to answer.
        variants: which one answered.
        slo: latency wanted, seconds.
        accuracy: variant → accuracy, of those where it is known.
    """
    took, served, known = np.array(latencies), Counter(variants), accuracy or {}
    middle, most = (1000 * float(value) for value in np.quantile(took, (0.5, 0.99)))
    scores = [known[name] for name in variants] if served.keys() <= known.keys() else None
    return Outcome(
        requests=len(took),
        met=100 * float((took <= slo).mean()),
        shares={name: 100 * count / len(took) for name, count in served.most_common()},
        accuracy=None if scores is None else float(np.mean(scores)),
        p50_ms=middle,
        p99_ms=most,
        switches=sum(before != after for before, after in pairwise(variants)),
    )


def simulate(
    arrivals: Arrivals, steering: Steering, slowdown: Callable[[float], float] = lambda _: 1.0
) -> Outcome:
    """Serve a trace one request after another, first come first served, on a pretended machine.

    A fixed variant is a steering with that one to choose from.

    Args:
        steering: also says what a request to each variant takes.
        slowdown: seconds of the trace → how much slower the machine is than it was measured.
    """
    state = steering.start()
    free = 0.0
    latencies, variants = [], []
    times = arrivals.tolist()
    for number, arrived in enumerate(times):
        begin = max(arrived, free)
        queued = bisect_right(times, begin, number) - number
        state = steering.step(state, Load(begin, queued, begin - arrived))
        took = steering.seconds[state.variant] * slowdown(begin)
        state = steering.observe(state, state.variant, took)
        free = begin + took
        latencies.append(free - arrived)
        variants.append(state.variant)
    return summarise_requests(latencies, variants, steering.slo, steering.accuracy)


def compare_steering(steering: Steering, arrivals: Arrivals) -> Comparison:
    """A trace simulated under steering, and with each of its variants alone."""
    names = steering.seconds if steering.variants is None else steering.variants
    alone = {name: dataclasses.replace(steering, variants=(name,)) for name in names}
    fixed = {name: simulate(arrivals, one) for name, one in alone.items()}
    return Comparison(simulate(arrivals, steering), fixed)
