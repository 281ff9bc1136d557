"""The search: lists of degrees of one cost, by coordinate moves, then by evolution."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tocom_export.compression.method import Merge
from tocom_export.compression.schedule import Schedule
from tocom_export.model.spec import VitSpec

Degrees = tuple[int, ...]
"""What each layer removes."""
Weights = npt.NDArray[np.float64]
"""(layers,): what layers remove in proportion; a cost makes numbers of them."""
Cost = Callable[[Schedule], float]
Judge = Callable[[Degrees, float], float]
"""A list and the best loss so far → its loss."""
_FACTORS = (0.0, 0.5, 1.6)
_PARENTS = 6
_PATIENCE = 40
"""Candidates without a better one, after which the search ends."""


@dataclass(frozen=True)
class Candidate:
    """A schedule, and how far its outputs are off."""

    degrees: Degrees
    loss: float


@dataclass
class Search:
    """Looks for the list of least loss that costs no more than ``limit``.

    Every candidate is a direction, made as large as the cost asks for: as few tokens are removed
    as bring it down to the limit, so that all candidates cost the same. Deterministic: the same
    costs and losses give the same candidates in the same order.

    Args:
        cost: of a schedule; it must not rise when a layer removes more.
        judge: see :data:`Judge`.
        limit: what a schedule may cost.
        trials: candidates at the most.
        seed: of the dice.
        tell: called after each candidate with how many there were, and the best.
        merge: what merged tokens are spared.
    """

    spec: VitSpec
    cost: Cost
    judge: Judge
    limit: float
    trials: int
    seed: int = 0
    tell: Callable[[int, Candidate], None] = lambda count, best: None
    merge: Merge = "block"
    found: dict[Degrees, tuple[float, Weights]] = field(default_factory=dict)
    _best: float = np.inf

    def run(self) -> list[Candidate]:
        """All candidates, the best first; empty where nothing is as cheap."""
        for weights in list_starts(self.spec.depth):
            self._try(weights)
        if self.found:
            self._move()
            self._evolve()
        return self.ranked

    @property
    def ranked(self) -> list[Candidate]:
        """All candidates so far, the best first."""
        found = [Candidate(degrees, loss) for degrees, (loss, _) in self.found.items()]
        return sorted(found, key=lambda candidate: (candidate.loss, candidate.degrees))

    def _try(self, weights: Weights) -> bool:
        """Judge a direction; whether it is the best so far."""
        degrees = fit(self.spec, weights, self.cost, self.limit, self.merge)
        if degrees is None or degrees in self.found or len(self.found) >= self.trials:
            return False
        loss = self.judge(degrees, self._best)
        self.found[degrees] = (loss, weights)
        better = loss < self._best
        self._best = min(loss, self._best)
        self.tell(len(self.found), self.ranked[0])
        return better

    def _move(self) -> None:
        """Change one layer's share at a time, as long as that helps."""
        better = True
        while better and len(self.found) < self.trials:
            better = False
            for layer in range(self.spec.depth):
                weights = self.found[self.ranked[0].degrees][1]
                for factor in (*_FACTORS, None):
                    changed = weights.copy()
                    added = weights.mean() if factor is None else (factor - 1) * weights[layer]
                    changed[layer] += added
                    if changed.any() and self._try(changed):
                        better = True
                        break

    def _evolve(self) -> None:
        """Children of the best: their shares mixed and scattered."""
        dice, since = np.random.default_rng(self.seed), 0
        for _ in range(20 * self.trials):  # most children that are there already cost nothing
            if len(self.found) >= self.trials or since >= _PATIENCE:
                return
            parents = [self.found[c.degrees][1] for c in self.ranked[:_PARENTS]]
            one, other = (parents[dice.integers(len(parents))] for _ in range(2))
            depth = self.spec.depth
            child = np.where(dice.random(depth) < 0.3, other / other.sum(), one / one.sum())
            child = child * np.exp(0.4 * dice.standard_normal(depth))
            child[dice.random(depth) < 0.08] = 0
            child[dice.random(depth) < 0.08] += child.mean()
            before = len(self.found)
            if child.any() and self._try(child):
                since = 0
            else:
                since += len(self.found) - before


def fit(
    spec: VitSpec, weights: Weights, cost: Cost, limit: float, merge: Merge = "block"
) -> Degrees | None:
    """The smallest list in some proportions that costs no more than the limit; None for none.

    Returns:
        What each layer removes in fact, within ToMe's bound.
    """

    def make(size: int) -> Schedule:
        scaled = np.rint(weights * size / weights.max()).astype(int)
        return Schedule.of(spec, scaled.tolist(), merge)

    # A layer can't remove more than half of the patches; in proportion that takes the first size
    # at which the smallest share that isn't zero does.
    smallest = weights[weights > 0].min() / weights.max()
    most = int(np.ceil(spec.tokens / smallest)) if smallest > 0.01 else 100 * spec.tokens
    if cost(make(most)) > limit:
        return None
    size = bisect_left(range(most), -limit, key=lambda size: -cost(make(size)))
    return make(size).removed


def list_starts(depth: int) -> Iterator[Weights]:
    """Directions to begin with (depth,): constant, falling, rising, late, and few layers."""
    ramp = np.linspace(1, 0, depth)
    yield np.ones(depth)
    yield 0.3 + ramp
    yield 0.05 + ramp**2
    yield 0.3 + ramp[::-1]
    yield np.where(np.arange(depth) < depth // 4, 0.3, 1.0)  # DiffRate's: the first layers little
    for step in (2, 3, 4):
        for first in (0, 1):
            layers = np.arange(depth)
            yield ((layers % step == first) & (layers < max(depth - 1, 1))).astype(float)
    for share in (4, 2):
        single = np.zeros(depth)
        single[[depth // share - (depth > 3), min(depth - 1, 2 * depth // 3)]] = 1.0, 0.6
        yield single
