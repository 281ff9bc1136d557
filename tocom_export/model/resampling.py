"""Positions for another grid of patches, resampled as timm does it, in NumPy.

Both kinds are resampled along one axis after the other, each time by a small matrix. Worked out
in float64 and rounded once, so that they differ from timm's by the rounding of float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Grid = tuple[int, int]
"""Patches per column and per row."""


def resample_positions(positions: Array, prefix: int, old: Grid, new: Grid) -> Array:
    """An embedding of absolute positions by bicubic interpolation (``resample_abs_pos_embed``).

    The filter is as wide as a step between new patches where that is the wider one (antialias).

    Args:
        positions: (1, prefix + H·W, C) of the old grid; those of the prefix are kept.

    Returns:
        float32 (1, prefix + H·W, C) of the new grid.
    """
    kept = positions[:, :prefix].astype(np.float32)
    patches = positions[0, prefix:].astype(np.float64).reshape(*old, -1)
    made = _apply(patches, [_weigh_cubic(*sides) for sides in zip(old, new, strict=True)])
    return np.concatenate([kept, made.reshape(1, new[0] * new[1], -1)], axis=1)


def resample_table(table: Array, old: Grid, new: Grid) -> Array:
    """A table of biases by relative position (``resize_rel_pos_bias_table``, from BEiT).

    Distances that two grids have in common mean the same in both, near ones above all: the old
    distances are spread over the new ones in steps that grow geometrically, and biases between
    them are linear.

    Args:
        table: (pairs, heads): of the old grid's distances, row by row, then those of prefix tokens,
            which are kept.

    Returns:
        float32 (pairs, heads) of the new grid.
    """
    if old == new:
        return table.astype(np.float32)
    before, after = (tuple(2 * side - 1 for side in grid) for grid in (old, new))
    count = before[0] * before[1]
    biases = table[:count].astype(np.float64).reshape(*before, -1)
    made = _apply(biases, [_weigh_distances(*sides) for sides in zip(before, after, strict=True)])
    kept = table[count:].astype(np.float32)
    return np.concatenate([made.reshape(after[0] * after[1], -1), kept])


def _apply(values: Array, weights: list[Array]) -> npt.NDArray[np.float32]:
    """Rows, then columns of values (H, W, C) by weights (new, old) of each axis."""
    rows, columns = weights
    made = np.tensordot(rows, values, axes=1)  # (new H, W, C)
    made = columns @ made  # (new H, new W, C)
    return np.asarray(made, np.float32)


def _weigh_cubic(old: int, new: int) -> Array:
    """How much each old place counts for each new one, (new, old): Keys' kernel, a = -0.5.

    Places are rounded to float32 as torch rounds them, which shows in the result of large grids.
    """
    step = np.float32(old / new)
    centres = (step * (np.arange(new) + 0.5)).astype(np.float32)
    offsets = np.arange(old, dtype=np.float32) - centres[:, None] + np.float32(0.5)
    x = np.abs(offsets * np.float32(1 / max(step, 1))).astype(np.float64)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def _weigh_distances(old: int, new: int) -> Array:
    """The same for distances from -old // 2 to old // 2, spread over those of the new axis."""
    most, ratio = old // 2, 1.5
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio**most) / (1 - ratio) > new // 2:
            high = ratio
        else:
            low = ratio
    steps = np.cumsum([ratio**power for power in range(most)])
    places = np.concatenate([-steps[::-1], [0.0], steps]).astype(np.float32)
    wanted = np.arange(new) - new // 2
    return np.stack([np.interp(wanted, places, column) for column in np.eye(old)], axis=1)
