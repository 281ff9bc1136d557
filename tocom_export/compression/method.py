"""How tokens are removed: the compression method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import InputError

LEAST_LENGTH = 1e-12
"""What a token's mean key is divided by at the least, float32: one of zeros is like no other."""


@dataclass(frozen=True)
class Method:
    """ToMe merges similar tokens; EViT prunes those the class token attends to least.

    ``proportional``: ToMe adds ``log(size)`` of each key's token to the attention logits,
    so that a merged token weighs as much as those it stands for. On for supervised models,
    off for MAE ones. Without meaning for EViT, where it is always off.
    """

    name: Literal["tome", "evit"]
    proportional: bool = True

    def __str__(self) -> str:
        plain = self.proportional or self.name == "evit"
        return self.name if plain else f"{self.name} without proportional attention"

    def __post_init__(self) -> None:
        if self.name not in ("tome", "evit"):
            raise InputError(f"unknown method {self.name!r}; tome and evit are known.")
        if self.name == "evit":
            object.__setattr__(self, "proportional", False)
