"""Which groups of a bank make up the gap between two degrees, and how much of each."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

from .schedule import MAX_DEGREE

Arithmetic = Literal["steps", "shared", "no-inversion"]
"""``steps`` is the paper's method: one group per pair of adjacent degrees, added on the way
from source up to target, subtracted on the way down (section 4.1). The other two are what its
ablation compares it with (section 5.4): ``shared``, one group for every pair of degrees; and
``no-inversion``, groups of their own for the way down."""

_GROUPS: dict[Arithmetic, int] = {
    "steps": MAX_DEGREE,
    "shared": 1,
    "no-inversion": 2 * MAX_DEGREE,
}


def groups_of(arithmetic: Arithmetic) -> int:
    """Number of groups, ``G``, for degrees 0..16."""
    return _GROUPS[arithmetic]


def coefficients(
    arithmetic: Arithmetic, source: int, target: float, groups: int | None = None
) -> npt.NDArray[np.float64]:
    """How often each group's product is added for ``source`` → ``target``, (G,): from -1 to 1.

    Between whole degrees the gap is interpolated: of a target of 8.25, three quarters are the
    gap to 8 and a quarter is that to 9.

    Args:
        groups: default: those of degrees 0..16.
    """
    low = math.floor(target)
    share = target - low
    found = _whole(arithmetic, source, low, groups or groups_of(arithmetic))
    if share:
        above = _whole(arithmetic, source, low + 1, len(found))
        found = (1 - share) * found + share * above
    return found


def _whole(
    arithmetic: Arithmetic, source: int, target: int, groups: int
) -> npt.NDArray[np.float64]:
    """The same between whole degrees."""
    found = np.zeros(groups)
    low, high = sorted((source, target))
    if low == high:
        return found
    if arithmetic == "shared":
        found[:] = 1
    elif arithmetic == "no-inversion":
        offset = 0 if target > source else MAX_DEGREE
        found[offset + low : offset + high] = 1
    else:
        found[low:high] = 1 if target > source else -1
    return found
