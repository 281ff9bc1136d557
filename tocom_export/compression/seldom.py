"""Schedules that merge seldom, without a search: ``every:3`` does in every third layer only.

A merging step costs far more than its multiply-adds, so that a few large steps run faster than
many small ones of the same multiply-adds. The steps are of one size: larger ones first cost more
accuracy, and larger ones last gain none (benchmarks/RESULTS.md, "Merging seldom").
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass

from ..errors import DegreeError
from ..model.spec import VitSpec
from .schedule import MAX_DEGREE, Schedule

_RULE = re.compile(r"every:(\d{1,9})(?::(\d{1,9}))?", re.ASCII)


@dataclass(frozen=True)
class Every:
    """As many tokens in every K-th layer as bring the cost down to that of a constant degree.

    Tokens merged in layer 0 cost the most accuracy, so the first step is in layer 1, or in layer
    0 where the cost is out of reach otherwise. The last layer removes none: that would spare it
    its MLP alone.
    """

    step: int
    """``K``: layers from one step to the next, 1 or more."""
    degree: int = MAX_DEGREE
    """``R``: of the constant schedule that costs as much, 1 to 16."""

    @classmethod
    def parse(cls, text: str) -> Every:
        """The rule that a text names: ``every:K``, or ``every:K:R``.

        Raises:
            DegreeError: it is no such text.
        """
        match = _RULE.fullmatch(text)
        step, degree = (int(part or MAX_DEGREE) for part in match.groups()) if match else (0, 0)
        if step < 1 or not 1 <= degree <= MAX_DEGREE:
            raise DegreeError(
                f"{text!r} is not every:K or every:K:R; K is 1 or more, and R the constant degree "
                f"that costs as much, 1 to {MAX_DEGREE} (the default)."
            )
        return cls(step, degree)

    def __str__(self) -> str:
        return f"every:{self.step}:{self.degree}"

    def list_degrees(self, spec: VitSpec) -> tuple[int, ...]:
        """What each layer of a model removes, within ToMe's bound.

        The steps are of the smallest size with which the model has no more multiply-adds than
        at degree ``R`` in each layer; ToMe's bound may make the later ones smaller.

        Raises:
            DegreeError: not even the largest steps reach that; says what can be had.
        """
        found = self._find(spec)
        if found is None:
            raise DegreeError(self._explain(spec))
        return found.removed

    def _find(self, spec: VitSpec) -> Schedule | None:
        limit = Schedule.of(spec, self.degree).macs(spec)
        for first in (1, 0):
            if self._layers(spec, first):
                most = self._remove(spec, first, spec.tokens)
                if most.macs(spec) <= limit:
                    # A larger step never costs more, so the smallest that will do is bisected for.
                    size = bisect_left(
                        range(spec.tokens),
                        -limit,
                        key=lambda size: -self._remove(spec, first, size).macs(spec),
                    )
                    return self._remove(spec, first, size)
        return None

    def _layers(self, spec: VitSpec, first: int) -> range:
        """Those that remove tokens; a model's only layer is its last, and does."""
        return range(first, max(spec.depth - 1, 1), self.step)

    def _remove(self, spec: VitSpec, first: int, size: int) -> Schedule:
        layers = self._layers(spec, first)
        return Schedule.of(spec, [size * (layer in layers) for layer in range(spec.depth)])

    def _explain(self, spec: VitSpec) -> str:
        """Why there is no such schedule of a model, and what there is."""
        least = self._remove(spec, 0, spec.tokens).macs(spec)
        wanted = Schedule.of(spec, self.degree).macs(spec)
        others = (
            [Every(step, self.degree) for step in range(min(self.step, spec.depth) - 1, 0, -1)],
            [Every(self.step, degree) for degree in range(self.degree - 1, 0, -1)],
        )
        found = [next((str(rule) for rule in rules if rule._find(spec)), "") for rules in others]
        advice = " or ".join(filter(None, found)) or f"degree {self.degree} in `targets`"
        return (
            f"{self}: with tokens removed in {len(self._layers(spec, 0))} of its {spec.depth} "
            f"layers {spec.model} has {least / 1e6:.1f} M MACs at the least, and "
            f"{wanted / 1e6:.1f} M at degree {self.degree} in each; choose {advice}."
        )
