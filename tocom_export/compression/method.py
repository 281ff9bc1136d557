"""How tokens are removed: the compression method."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..errors import InputError
from ..io.json_codec import LATER

Merge = Literal["block", "ffn"]
"""What merged tokens are spared: ``block``, all that follows, in their layer and the next ones;
``ffn``, their layer's MLP alone, whose output is given back to all of them."""
Label = Literal["tome", "evit", "tome within the FFN"]
LEAST_LENGTH = 1e-12
"""What a token's mean key is divided by at the least, float32: one of zeros is like no other."""


@dataclass(frozen=True)
class Method:
    """ToMe merges similar tokens; EViT prunes those the class token attends to least.

    ``proportional``: ToMe adds ``log(size)`` of each key's token to the attention logits,
    so that a merged token weighs as much as those it stands for. On for supervised models,
    off for MAE ones. Without meaning for EViT, and where merging is for the MLP alone (no merged
    token reaches attention): there it is always off.
    """

    name: Literal["tome", "evit"]
    proportional: bool = True
    merge: Merge = field(default="block", metadata=LATER)

    @property
    def label(self) -> Label:
        """``tome``, ``evit``, or ``tome within the FFN``."""
        return self.name if self.merge == "block" else "tome within the FFN"

    def __str__(self) -> str:
        if self.merge == "ffn":
            return self.label
        plain = self.proportional or self.name == "evit"
        return self.name if plain else f"{self.name} without proportional attention"

    def __post_init__(self) -> None:
        if self.name not in ("tome", "evit"):
            raise InputError(f"unknown method {self.name!r}; tome and evit are known.")
        if self.merge not in ("block", "ffn"):
            raise InputError(f"`merge` {self.merge!r}: it is block or ffn.")
        if self.name == "evit" and self.merge == "ffn":
            raise InputError("`merge` ffn: evit drops tokens, and can't give them back; use tome.")
        if self.name == "evit" or self.merge == "ffn":
            object.__setattr__(self, "proportional", False)
