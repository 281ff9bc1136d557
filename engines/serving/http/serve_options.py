"""How models are served, as a user says it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tocom_export.errors import InputError


@dataclass(frozen=True)
class ServeOptions:
    """How models are served."""

    policy: Literal["steering", "slackfit", "fixed"] | None = None
    """None is steering, or fixed where a variant is named."""
    slo: float | None = None
    """Latency wanted, seconds, which a policy keeps to and misses are counted of; None is six times
    what the slowest variant takes, or none where the variant is fixed."""
    variant: str | None = None
    """The one to serve where it is fixed; None is the one of the most MACs."""
    max_batch: int = 8
    max_delay: float = 0.0
    """Seconds that a request waits for others to be run with."""
    queue: int = 128
    """Images that may wait."""

    def __post_init__(self) -> None:
        if self.variant is not None and self.policy not in (None, "fixed"):
            raise InputError(f"`variant` is for `policy` fixed; {self.policy} chooses by itself.")
        if self.slo is not None and not 0 < self.slo < math.inf:
            raise InputError(
                f"`slo_ms` {1000 * self.slo:g}: a latency of more than 0 ms is expected."
            )

    @property
    def steered(self) -> bool:
        """Whether load decides."""
        return (self.policy or ("fixed" if self.variant else "steering")) != "fixed"
