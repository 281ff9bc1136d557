"""Relative positions: which of a table's rows is between two tokens, and how far that is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from .spec import VitSpec


def number_pairs(spec: VitSpec) -> npt.NDArray[np.int64]:
    """The row of a table for each pair of tokens (N, N), those of prefix tokens last.

    Between patches ``(Δrow + H - 1) · (2W - 1) + Δcolumn + W - 1``; then from a prefix token to
    a token, from a token to a prefix token, and between two of them (BEiT).
    """
    height, width = spec.grid
    rows, columns = (axis.ravel() for axis in np.indices((height, width)))
    down = rows[:, None] - rows[None, :] + height - 1
    right = columns[:, None] - columns[None, :] + width - 1
    count = (2 * height - 1) * (2 * width - 1)
    pairs = np.full((spec.tokens, spec.tokens), count, np.int64)
    pairs[:, : spec.prefix] = count + 1
    pairs[: spec.prefix, : spec.prefix] = count + 2
    pairs[spec.prefix :, spec.prefix :] = down * (2 * width - 1) + right
    return pairs


def log_distances(grid: tuple[int, int]) -> npt.NDArray[np.float32]:
    """``sign · log(1 + distance)`` along both axes of each row of such a table (pairs, 2)."""
    axes = [np.arange(1 - side, side, dtype=np.float32) for side in grid]
    steps = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
    found: npt.NDArray[np.float32] = np.sign(steps) * np.log1p(np.abs(steps))
    return found
