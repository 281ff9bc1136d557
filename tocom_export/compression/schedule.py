"""From degrees to the number of tokens in each layer (Token Compensator, section 3)."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated

from msgspec import Meta

from ..errors import DegreeError
from ..model.spec import VitSpec
from .method import Merge

MAX_DEGREE = 16
"""The highest degree that a ToCom bank spans: 16 groups, one per step g → g+1."""
Degree = Annotated[int, Meta(ge=0, le=MAX_DEGREE)]
MOST = 1_000_000
"""What a layer may be asked to remove, where a schedule has a degree for each."""


@dataclass(frozen=True)
class Schedule:
    """How many tokens each layer removes between its attention and its MLP.

    With ``N`` tokens in a layer, ``P`` of them protected, degree ``r`` removes
    ``min(r, (N - P) // 2)`` tokens: ToMe's bound, since a merge pairs two tokens. Where merging is
    for the MLP alone (:data:`~tocom_export.compression.method.Merge`), each layer begins with all
    tokens anew.
    """

    tokens: int
    """Tokens that enter the first layer."""
    prefix: int
    """Protected tokens, ``P``."""
    degrees: tuple[int, ...]
    """The degree of each layer."""
    merge: Merge = "block"

    @classmethod
    def of(cls, spec: VitSpec, degree: int | Sequence[int], merge: Merge = "block") -> Schedule:
        """The schedule of one degree for all layers, or of one degree per layer.

        Raises:
            DegreeError: a degree is out of range, or the list of another length than the model's
                depth.
        """
        try:
            listed = degree if isinstance(degree, Sequence) else (degree,) * spec.depth
            degrees = tuple(map(operator.index, listed))
        except TypeError:
            raise DegreeError(f"{degree!r} is no degree, nor a list of one per layer.") from None
        if len(degrees) != spec.depth:
            raise DegreeError(
                f"{spec.model} has {spec.depth} layers; a degree is needed for each, not "
                f"{len(degrees)}."
            )
        if wrong := [number for number in degrees if not 0 <= number <= MOST]:
            raise DegreeError(f"degree {wrong[0]}: 0 to {MOST} is expected.")
        return cls(spec.tokens, spec.prefix, degrees, merge)

    @property
    def removed(self) -> tuple[int, ...]:
        """Tokens that each layer removes."""
        return tuple(
            before - after for before, after in zip(self.tokens_in, self.tokens_out, strict=True)
        )

    @property
    def tokens_in(self) -> tuple[int, ...]:
        """Tokens in each layer's attention."""
        if self.merge == "ffn":
            return (self.tokens,) * len(self.degrees)
        return (self.tokens, *self.tokens_out[:-1])

    @property
    def left(self) -> int:
        """Tokens after the last layer."""
        return self.tokens if self.merge == "ffn" else self.tokens_out[-1]

    @property
    def tokens_out(self) -> tuple[int, ...]:
        """Tokens in each layer's MLP."""

        def leave(tokens: int, degree: int) -> int:
            return tokens - min(degree, (tokens - self.prefix) // 2)

        if self.merge == "ffn":
            return tuple(leave(self.tokens, degree) for degree in self.degrees)
        return tuple(accumulate(self.degrees, leave, initial=self.tokens))[1:]

    @property
    def targets(self) -> tuple[float, ...]:
        """The real degree that each layer is compensated for: as many tokens reach it there.

        A layer must be compensated for the tokens that reach it, not for what it removes
        itself. Layer ``l ≥ 1`` takes the degree at which a constant schedule would bring it as
        many, piecewise linear between whole degrees and the smallest where several do; 16 where
        even 16 brings more. Layer 0, which all tokens reach, takes what layer 1 takes. A
        constant list of a degree up to 16 takes that degree, whatever bounds it.

        Where merging is for the MLP alone, all tokens reach every layer, some of them less exact.
        Layer ``l ≥ 1`` then takes the degree at which a constant schedule would have merged as
        many before it: their mean over the layers before, 16 at the most.
        """
        first = self.degrees[0]
        if len(set(self.degrees)) == 1:
            return (float(min(first, MAX_DEGREE)),) * len(self.degrees)
        if self.merge == "ffn":
            sums = accumulate(self.removed[:-1])
            means = [min(total / layer, MAX_DEGREE) for layer, total in enumerate(sums, 1)]
            return (float(means[0]), *map(float, means))
        constant = [
            Schedule(self.tokens, self.prefix, (degree,) * len(self.degrees)).tokens_in
            for degree in range(MAX_DEGREE + 1)
        ]
        found = [
            _interpolate([counts[layer] for counts in constant], tokens)
            for layer, tokens in enumerate(self.tokens_in)
        ]
        return (found[1], *found[1:])

    def macs(self, spec: VitSpec) -> int:
        """Multiply-adds per image: linear layers, attention products, patch embedding, head.

        Matching and merging are left out, so a ratio of two counts bounds the speed-up.
        """
        c = spec.width
        total = spec.patches * c * spec.channels * spec.patch_size[0] * spec.patch_size[1]
        for tokens, left in zip(self.tokens_in, self.tokens_out, strict=True):
            total += 4 * tokens * c * c + 2 * tokens * tokens * c
            layers = 2 if spec.mlp == "plain" else 3  # gate and value are made from the same input
            total += left * c * (layers * spec.mlp_width + 2 * spec.adapter_width)
        if spec.pool == "map":
            pooled = self.left - spec.pooled_from
            total += 2 * pooled * c * c + 2 * pooled * c + 2 * c * (c + spec.pool_mlp_width)
        rows = spec.classes or spec.projection
        return total + spec.features * rows * (1 + int(spec.distilled))


def _interpolate(counts: Sequence[int], tokens: int) -> float:
    """The smallest real degree at which falling counts, one a whole degree, reach ``tokens``."""
    degree = next((d for d, count in enumerate(counts) if count <= tokens), None)
    if degree is None:
        return float(MAX_DEGREE)
    if degree == 0:
        return 0.0
    above, below = counts[degree - 1], counts[degree]
    return degree - 1 + (above - tokens) / (above - below)
