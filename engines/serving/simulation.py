"""What becomes of requests with one variant or under a policy, on a pretended machine."""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .arrivals import Arrivals
from .policy import Load, Policy
from .service_times import ServiceTimes
from .steering import Steering


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
    p95_ms: float
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
    middle, high, most = (1000 * float(x) for x in np.quantile(took, (0.5, 0.95, 0.99)))
    scores = [known[name] for name in variants] if served.keys() <= known.keys() else None
    return Outcome(
        requests=len(took),
        met=100 * float((took <= slo).mean()),
        shares={name: 100 * count / len(took) for name, count in served.most_common()},
        accuracy=None if scores is None else float(np.mean(scores)),
        p50_ms=middle,
        p95_ms=high,
        p99_ms=most,
        switches=sum(before != after for before, after in pairwise(variants)),
    )


def simulate(
    arrivals: Arrivals,
    policy: Policy,
    slowdown: Callable[[float], float] = lambda _: 1.0,
    *,
    scatter: float = 0.0,
    seed: int = 0,
) -> Outcome:
    """Serve a trace one batch after another, first come first served, on a pretended machine.

    A fixed variant is a steering with that one to choose from.

    Args:
        policy: also says what a batch of each variant takes.
        slowdown: seconds of the trace → how much slower the machine is than it was measured.
        scatter: of a batch's time, standard deviation over mean (log-normal).
    """
    took, rng, sigma = ServiceTimes.of(policy.seconds), np.random.default_rng(seed), scatter
    state, free, first = policy.start(), 0.0, 0
    latencies: list[float] = []
    variants: list[str] = []
    times = arrivals.tolist()
    while first < len(times):
        begin = max(times[first], free)
        queued = bisect_right(times, begin, first) - first
        state = policy.step(state, Load(begin, queued, begin - times[first]))
        batch = min(state.batch, queued)
        noise = float(np.exp(sigma * rng.standard_normal() - sigma**2 / 2)) if sigma else 1.0
        seconds = took.take(state.variant, batch) * slowdown(begin) * noise
        state = policy.observe(state, state.variant, seconds, batch)
        free = begin + seconds
        latencies += [free - arrived for arrived in times[first : first + batch]]
        variants += [state.variant] * batch
        first += batch
    return summarise_requests(latencies, variants, policy.slo, policy.accuracy)


def compare_steering(steering: Steering, arrivals: Arrivals) -> Comparison:
    """A trace simulated under steering, and with each of its variants alone."""
    names = steering.seconds if steering.variants is None else steering.variants
    alone = {name: dataclasses.replace(steering, variants=(name,)) for name in names}
    fixed = {name: simulate(arrivals, one) for name, one in alone.items()}
    return Comparison(simulate(arrivals, steering), fixed)
