"""Rotary positions: where each patch lies, and by how much that turns queries and keys.

In every kind the angle of a patch at channel pair ``j`` is linear in its coordinates::

    angle[n, j] = Σ_axis positions[n, axis] · frequencies[axis, j]

so prefix tokens, which aren't rotated, lie at the origin, and a merged token has a position, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from msgspec import Meta

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Rotary:
    """What timm's classes of rotary embeddings vary."""

    kind: Literal["cat", "dinov3", "mixed"]
    """Powers of the temperature at patch indices (EVA-02); periods over an image from -1 to 1
    (DINOv3); frequencies that are weights, of each layer and head, at patch indices."""
    temperature: Annotated[float, Meta(gt=0)] = 10000.0
    half: bool = False
    """Channel j is turned with j + D/2, not 2j with 2j + 1."""
    indexing: Literal["ij", "xy"] = "ij"
    """Whether the rows or the columns are the first axis."""
    offset: float = 0.0
    """Added to patch indices."""
    reference: tuple[int, int] | None = None
    """The grid that indices are scaled to (``cat``), rows and columns."""

    def positions(self, grid: tuple[int, int]) -> Array:
        """Coordinates (patches, 2) of a grid's patches, row by row."""
        axes: list[npt.NDArray[Any]] = []
        for place, count in enumerate(grid):
            if self.kind == "dinov3":
                axis: npt.NDArray[Any] = 2 * (np.arange(count) + 0.5 + self.offset) / count - 1
            else:
                axis = np.arange(count) + self.offset
            if self.reference and self.kind == "cat":
                axis = axis / count * self.reference[place]
            axes.append(axis)
        rows, columns = np.meshgrid(*axes, indexing="ij")
        order = (rows, columns) if self.indexing == "ij" else (columns, rows)
        return np.stack([axis.ravel() for axis in order], axis=1).astype(np.float32)

    def frequencies(self, head_width: int) -> Array:
        """Radians per unit of position (2, head_width / 2); of ``mixed`` they are weights."""
        assert self.kind != "mixed"
        bands = head_width // 4
        exponents = np.arange(bands) / bands
        each = self.temperature**-exponents
        if self.kind == "dinov3":
            each = 2 * math.pi * each
        zero = np.zeros(bands)
        axes = [np.concatenate([each, zero]), np.concatenate([zero, each])]
        return np.stack(axes).astype(np.float32)
