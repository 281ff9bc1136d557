"""Which variant is in force: a policy's choice, one that was named, or an administrator's."""

from __future__ import annotations

import dataclasses
import threading
import time

from ..policy import Load, Policy, State
from .line import Look


class Control:
    """Chooses a model's variant and batch. Safe to share among threads.

    Args:
        policy: chooses by load; None leaves it to ``fixed``.
        fixed: the variant where there is no policy.
        most: images in a batch.
    """

    def __init__(self, policy: Policy | None, fixed: str, most: int) -> None:
        self.fixed, self.most = fixed, most
        self.pinned: str | None = None
        """What an administrator has put in force, until it is None again."""
        self._lock = threading.Lock()
        self.renew(policy)

    def renew(self, policy: Policy | None) -> None:
        """Another policy from now on, which begins afresh."""
        with self._lock:
            self.policy = policy
            self._state = policy.start() if policy else State(self.fixed)

    @property
    def variant(self) -> str:
        """The one in force."""
        return self.pinned or self._state.variant

    def choose(self, look: Look) -> int:
        """Choose anew, for what waits; where nothing does, for a request that would come now.

        Returns:
            Images to run together at most.
        """
        with self._lock:
            if self.policy is None:
                return self.most
            slacks = look.slacks(self.policy.slo) if look.waits else None
            load = Load(time.monotonic(), len(look.waits), max(look.waits, default=0.0), slacks)
            self._state = self.policy.step(self._state, load)
            return self._state.batch

    def note_taken(self, look: Look, images: int) -> None:
        """So many images of those that were seen wait no more."""
        with self._lock:
            self._state = dataclasses.replace(self._state, left=max(0, len(look.waits) - images))

    def observe(self, variant: str, seconds: float, images: int) -> None:
        """A run took so long."""
        with self._lock:
            if self.policy is not None and seconds > 0:
                self._state = self.policy.observe(self._state, variant, seconds, images)
