"""From degrees to the number of tokens in each layer (Token Compensator, section 3)."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import DegreeError
from ..model.spec import VitSpec

MAX_DEGREE = 16
"""The highest degree that a ToCom bank spans: 16 groups, one per step g → g+1."""


@dataclass(frozen=True)
class TokenSchedule:
    """How many tokens each layer removes between its attention and its MLP.

    With ``N`` tokens in a layer, ``P`` of them protected, degree ``r`` removes
    ``min(r, (N - P) // 2)`` tokens: ToMe's bound, since a merge pairs two tokens.
    """

    tokens: int
    """Tokens that enter the first layer."""
    prefix: int
    """Protected tokens, ``P``."""
    degrees: tuple[int, ...]
    """The degree of each layer."""

    @classmethod
    def of(cls, spec: VitSpec, degree: int | Sequence[int]) -> TokenSchedule:
        """The schedule of one degree for all layers, or of one degree per layer.

        Raises:
            DegreeError: a negative degree, or a list of another length than the model's depth.
        """
        try:
            listed = degree if isinstance(degree, Sequence) else (degree,) * spec.depth
            degrees = tuple(map(operator.index, listed))
        except TypeError:
            raise DegreeError(f"{degree!r} is no degree, nor a list of one per layer.") from None
        if len(degrees) != spec.depth:
            raise DegreeError(
                f"a schedule of {len(degrees)} degrees for the {spec.depth} layers of {spec.model}."
            )
        if min(degrees) < 0:
            raise DegreeError(f"degree {min(degrees)} is negative.")
        return cls(spec.tokens, spec.prefix, degrees)

    @property
    def removed(self) -> tuple[int, ...]:
        """Tokens that each layer removes."""
        removed = []
        tokens = self.tokens
        for degree in self.degrees:
            removed.append(min(degree, (tokens - self.prefix) // 2))
            tokens -= removed[-1]
        return tuple(removed)

    @property
    def tokens_in(self) -> tuple[int, ...]:
        """Tokens in each layer's attention."""
        return (self.tokens, *self.tokens_out[:-1])

    @property
    def tokens_out(self) -> tuple[int, ...]:
        """Tokens in each layer's MLP."""
        counts = []
        tokens = self.tokens
        for removed in self.removed:
            tokens -= removed
            counts.append(tokens)
        return tuple(counts)

    def multiply_adds(self, spec: VitSpec) -> int:
        """Multiply-adds per image: linear layers, attention products, patch embedding, head.

        Matching and merging are left out, so a ratio of two counts bounds the speed-up.
        """
        c = spec.width
        total = spec.patches * c * spec.channels * spec.patch_size[0] * spec.patch_size[1]
        for tokens, left in zip(self.tokens_in, self.tokens_out, strict=True):
            total += 4 * tokens * c * c + 2 * tokens * tokens * c
            total += 2 * left * c * (spec.mlp_width + spec.adapter_width)
        return total + c * spec.classes * (1 + int(spec.distilled))


def parse_degrees(text: str) -> list[int]:
    """Degrees from ``4,8,12,16``, ``0-16`` or ``0,4-16:4``, sorted, each once.

    Raises:
        DegreeError: not of that form, or a degree outside 0..16.
    """
    degrees: set[int] = set()
    for part in text.split(","):
        span, colon, step = part.strip().partition(":")
        first, dash, last = span.partition("-")
        try:
            low = int(first)
            high = int(last) if dash else low
            stride = int(step) if colon else 1
        except ValueError:
            raise DegreeError(
                f"{text!r} is no list of degrees; write 4,8,12,16 or 0-16 or 0,4-16:4."
            ) from None
        if max(low, high) > MAX_DEGREE:
            raise DegreeError(f"{part.strip()!r} is outside the degrees 0..{MAX_DEGREE}.")
        if not (low <= high and stride > 0):
            raise DegreeError(
                f"{part.strip()!r} is no rising span; write first-last or first-last:step."
            )
        degrees.update(range(low, high + 1, stride))
    return sorted(degrees)
