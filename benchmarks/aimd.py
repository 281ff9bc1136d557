"""One variant whose batches adapt: what Clipper does, to compare steering with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from tocom_export.engines.serving.policy import Load, State
from tocom_export.engines.serving.service_times import Seconds, ServiceTimes


@dataclass(frozen=True)
class AimdState(State):
    """The limit as it is, beside what others remember."""

    limit: float = 1.0


@dataclass(frozen=True)
class Aimd:
    """A variant chosen beforehand, in batches as large as the latency allows.

    After Clipper (Crankshaw and others, NSDI 2017, section 4.3): the largest batch grows by one
    with each full one that takes no longer than the latency wanted, and shrinks by a tenth with
    each that does. (Its choice of a model, a bandit's, needs to be told which answers are right.)
    """

    variant: str
    seconds: Seconds
    slo: float
    accuracy: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def start(self) -> AimdState:
        """Batches of one."""
        return AimdState(self.variant)

    def step(self, state: State, load: Load) -> State:
        """As many as wait, up to the limit."""
        assert isinstance(state, AimdState)
        most = min(int(state.limit), ServiceTimes.of(self.seconds).largest)
        return dataclasses.replace(state, batch=max(1, min(most, load.queued)))

    def observe(self, state: State, variant: str, seconds: float, batch: int = 1) -> State:
        """Additive increase, multiplicative decrease."""
        assert isinstance(state, AimdState)
        if seconds > self.slo:
            return dataclasses.replace(state, limit=max(1.0, 0.9 * state.limit))
        full = batch >= int(state.limit)
        return dataclasses.replace(state, limit=state.limit + full)
