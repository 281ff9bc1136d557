"""Positions for another grid of patches, held against timm's functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table

from tocom_export.model.resampling import resample_positions, resample_table

GRIDS = [(1, 1), (7, 7), (14, 14), (24, 24), (37, 37), (5, 9), (3, 40)]
OTHERS = [(14, 14), (24, 24), (7, 21), (1, 2), (16, 8), (37, 37), (64, 32), (13, 15)]


def draw(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(shape).standard_normal(shape, np.float32)


def differ(found: Any, wanted: Any) -> float:
    """The largest difference as a share of the largest value."""
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("old", GRIDS, ids=str)
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_positions_are_timm_s(old: tuple[int, int], prefix: int):
    positions = draw(1, prefix + old[0] * old[1], 16)
    for new in OTHERS:
        found = resample_positions(positions, prefix, old, new)
        wanted = resample_abs_pos_embed(torch.from_numpy(positions), [*new], [*old], prefix)
        assert found.dtype == np.float32
        assert differ(found, wanted.numpy()) <= 1e-6, new
        np.testing.assert_array_equal(found[:, :prefix], positions[:, :prefix])


@pytest.mark.parametrize("side", [14, 16, 24, 32, 37])
def test_positions_of_squares_are_timm_s(side: int):
    positions = draw(1, side * side, 8)
    for new in range(1, 64, 3):
        found = resample_positions(positions, 0, (side, side), (new, new))
        wanted = resample_abs_pos_embed(torch.from_numpy(positions), [new, new], [side, side], 0)
        assert differ(found, wanted.numpy()) <= 1e-6, new


# timm's interpolator, by torch's ways of indexing.
@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("old", GRIDS, ids=str)
@pytest.mark.parametrize("extra", [0, 3])
def test_tables_are_timm_s(old: tuple[int, int], extra: int):
    rows, columns = (2 * side - 1 for side in old)
    table = draw(rows * columns + extra, 3)
    for new in OTHERS:
        shape = ((2 * new[0] - 1) * (2 * new[1] - 1) + extra, 3)
        wanted = resize_rel_pos_bias_table(
            torch.from_numpy(table), new, shape, old_window_size=old
        ).numpy()
        found = resample_table(table, old, new)
        assert found.dtype == np.float32
        assert differ(found, wanted) <= 1e-6, new
        np.testing.assert_array_equal(found[len(found) - extra :], table[len(table) - extra :])


def test_positions_without_a_slope_stay_so():
    flat = np.full((1, 1 + 49, 3), 2.5, np.float32)
    np.testing.assert_allclose(resample_positions(flat, 1, (7, 7), (10, 4)), 2.5, rtol=1e-6)
    table = np.full((169, 2), -1.5, np.float32)
    np.testing.assert_allclose(resample_table(table, (7, 7), (10, 4)), -1.5, rtol=1e-6)


def test_the_same_grid_changes_nothing():
    positions, table = draw(1, 50, 4), draw(13 * 13 + 3, 2)
    same = resample_positions(positions, 1, (7, 7), (7, 7))
    np.testing.assert_allclose(same, positions, atol=1e-6)
    np.testing.assert_array_equal(resample_table(table, (7, 7), (7, 7)), table)
