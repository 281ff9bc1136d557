"""Schedules that leave a share of the patches, at one rate: ``keep:0.5`` ends with half of them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ..errors import DegreeError
from ..model.spec import VitSpec
from .schedule import Schedule

_RULE = re.compile(r"keep:(0?\.\d{1,9})", re.ASCII)


@dataclass(frozen=True)
class Keep:
    """The same share of the patches goes in each layer, so that a given one is left at the end.

    With ``L`` layers each keeps ``share ** (1 / L)`` of the patches that reach it. Counts are
    rounded where they stand, not layer by layer, so that rounding doesn't add up.
    """

    share: float
    """Of the patches, what is left after the last layer: between 0 and 1."""

    @classmethod
    def parse(cls, text: str) -> Keep:
        """The rule that a text names: ``keep:SHARE``.

        Raises:
            DegreeError: it is no such text.
        """
        match = _RULE.fullmatch(text)
        if not match or not float(match[1]):
            raise DegreeError(
                f"{text!r} is not keep:SHARE; the share of the patches that is left after the last "
                "layer is more than 0 and less than 1, such as 0.5."
            )
        return cls(float(match[1]))

    def __str__(self) -> str:
        return f"keep:{self.share:.9f}".rstrip("0")

    @property
    def name(self) -> str:
        """A variant's name for it: ``keep50`` of a half, ``keep12_5`` of an eighth."""
        return "keep" + f"{100 * self.share:.7f}".rstrip("0").rstrip(".").replace(".", "_")

    def list_degrees(self, spec: VitSpec) -> tuple[int, ...]:
        """What each layer of a model removes, within ToMe's bound of half.

        Raises:
            DegreeError: half in each layer would leave more; says what can be had.
        """
        left, degrees = spec.patches, []
        for layer in range(spec.depth):
            wanted = round(spec.patches * self.share ** ((layer + 1) / spec.depth))
            degrees.append(max(0, min(left - wanted, left // 2)))
            left -= degrees[-1]
        if left - self.share * spec.patches > 1:
            most = Schedule.of(spec, spec.tokens)
            least = most.tokens_out[-1] - spec.prefix
            near = Keep(math.ceil(10_000 * least / spec.patches) / 10_000)
            raise DegreeError(
                f"{self}: at most half of the patches go in a layer, so that the {spec.depth} of "
                f"{spec.model} leave {least} of {spec.patches} at the least; choose {near}."
            )
        return tuple(degrees)
