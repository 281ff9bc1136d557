"""Arrivals of requests, and what becomes of them at one degree or under steering."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tocom_export.errors import InputError

from .steering import Load, Steering

Arrivals = npt.NDArray[np.float64]
"""Seconds, ascending, (N,)."""
_LARGEST = 100_000_000  # bytes of a file of arrivals

_SHAPES: dict[str, Callable[[Arrivals], Arrivals]] = {
    "steady": lambda t: np.full_like(t, 0.7),
    "burst": lambda t: np.where((t % 0.4) < 0.2, 0.5, 1.5),
    "ramp": lambda t: 0.2 + 1.5 * t,
    "overload": lambda t: np.full_like(t, 2.5),
}
"""Arrivals over what the dense model can serve, along the trace (0 to 1)."""
TRACES = tuple(_SHAPES)


def synthetic(shape: str, capacity: float, seconds: float, seed: int = 0) -> Arrivals:
    """Arrivals at random (Poisson), at a rate that follows one of :data:`TRACES`.

    Args:
        capacity: requests a second that the dense model can serve.
        seconds: length of the trace.
    """
    rate = _SHAPES[shape]
    rng = np.random.default_rng(seed)
    most = capacity * float(rate(np.linspace(0, 1, 1001)).max())
    candidates = np.sort(rng.uniform(0, seconds, rng.poisson(most * seconds)))
    keep = rng.uniform(0, most, len(candidates)) < capacity * rate(candidates / seconds)
    return np.asarray(candidates[keep], np.float64)


def recorded(file: Path) -> Arrivals:
    """Arrivals from a text file: seconds of any clock, one a line.

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
    mean_degree: float
    p50_ms: float
    p99_ms: float
    switches: int

    def to_json(self) -> dict[str, Any]:
        """A JSON object of all fields."""
        return asdict(self)


def outcome(latencies: Sequence[float], degrees: Sequence[int], slo: float) -> Outcome:
    """A summary of each request's latency (seconds) and degree, in order of their start."""
    took = np.array(latencies)
    middle, most = (1000 * float(value) for value in np.quantile(took, (0.5, 0.99)))
    return Outcome(
        len(took),
        100 * float((took <= slo).mean()),
        float(np.mean(degrees)),
        middle,
        most,
        int((np.diff(degrees) != 0).sum()),
    )


def simulate(
    arrivals: Arrivals,
    steering: Steering,
    slowdown: Callable[[float], float] = lambda _: 1.0,
) -> Outcome:
    """Serve a trace one request after another, first come first served, on a pretended machine.

    A fixed degree is a steering whose floor and ceiling it is.

    Args:
        steering: also says what a request takes at each degree.
        slowdown: seconds of the trace → how much slower the machine is than it was measured.
    """
    state = steering.start()
    free = 0.0
    latencies, degrees = [], []
    times = arrivals.tolist()
    for number, arrived in enumerate(times):
        begin = max(arrived, free)
        queued = bisect_right(times, begin, number) - number
        state = steering.step(state, Load(begin, queued, begin - arrived))
        took = steering.seconds[state.degree] * slowdown(begin)
        state = steering.measured(state, state.degree, took)
        free = begin + took
        latencies.append(free - arrived)
        degrees.append(state.degree)
    return outcome(latencies, degrees, steering.slo)
