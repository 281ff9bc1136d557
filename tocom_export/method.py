"""How tokens are removed: the compression method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Method:
    """ToMe merges similar tokens; EViT prunes those the class token attends to least.

    ``proportional``: ToMe adds ``log(size)`` of each key's token to the attention logits,
    so that a merged token weighs as much as those it stands for. On for supervised models,
    off for MAE ones. Without meaning for EViT, where it is always off.
    """

    name: Literal["tome", "evit"]
    proportional: bool = True

    def __post_init__(self) -> None:
        if self.name == "evit":
            object.__setattr__(self, "proportional", False)
