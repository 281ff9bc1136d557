"""When requests come: made at random, by shapes of traffic, or as they were recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tocom_export.errors import InputError

Arrivals = npt.NDArray[np.float64]
"""Seconds, ascending, (N,)."""
_LARGEST = 100_000_000  # bytes of a file of arrivals

TRACES: dict[str, Callable[[Arrivals], Arrivals]] = {
    "steady": lambda t: np.full_like(t, 0.7),
    "burst": lambda t: np.where((t % 0.4) < 0.2, 0.5, 1.5),
    "ramp": lambda t: 0.2 + 1.5 * t,
    "diurnal": lambda t: 0.65 - 0.55 * np.cos(2 * np.pi * t),
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
    return draw_poisson(lambda t: capacity * TRACES[shape](t), seconds, seed)


def draw_poisson(rate: Callable[[Arrivals], Arrivals], seconds: float, seed: int = 0) -> Arrivals:
    """Arrivals at random, at a rate that changes.

    Args:
        rate: share of the trace (0 to 1) → requests a second.
        seconds: length of the trace.
    """
    rng = np.random.default_rng(seed)
    most = float(rate(np.linspace(0, 1, 1001)).max())
    candidates = np.sort(rng.uniform(0, seconds, rng.poisson(most * seconds)))
    keep = rng.uniform(0, most, len(candidates)) < rate(candidates / seconds)
    return np.asarray(candidates[keep], np.float64)


def draw_gamma(rate: float, cv: float, seconds: float, seed: int = 0) -> Arrivals:
    """Arrivals in clumps: the times between them are gamma distributed, independent of each other.

    Args:
        rate: requests a second, on average.
        cv: standard deviation of the time between two over its mean; 1 is Poisson, 8 what others
            call extremely bursty.
        seconds: length of the trace.
    """
    rng, shape = np.random.default_rng(seed), cv**-2
    gaps = rng.gamma(shape, 1 / (rate * shape), int(3 * rate * seconds) + 100)
    while gaps.sum() < seconds:
        gaps = np.append(gaps, rng.gamma(shape, 1 / (rate * shape), len(gaps)))
    times = np.cumsum(gaps)
    return np.asarray(times[times < seconds], np.float64)


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
