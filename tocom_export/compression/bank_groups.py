"""Which groups of a bank make up the gap between two degrees."""

from __future__ import annotations

from typing import Literal, get_args

from .schedule import MAX_DEGREE

Arithmetic = Literal["steps", "shared", "no-inversion"]
"""``steps`` is the paper's method: one group per pair of adjacent degrees, added on the way
from source up to target, subtracted on the way down (section 4.1). The other two are what its
ablation compares it with (section 5.4): ``shared``, one group for every pair of degrees; and
``no-inversion``, groups of their own for the way down."""

ARITHMETICS: tuple[Arithmetic, ...] = get_args(Arithmetic)
_GROUPS: dict[Arithmetic, int] = {
    "steps": MAX_DEGREE,
    "shared": 1,
    "no-inversion": 2 * MAX_DEGREE,
}


def groups_of(arithmetic: Arithmetic) -> int:
    """Number of groups, ``G``, for degrees 0..16."""
    return _GROUPS[arithmetic]


def terms(arithmetic: Arithmetic, source: int, target: int) -> tuple[slice, int]:
    """The groups whose products are summed for ``source`` → ``target``, and their sign.

    An empty slice where the two are equal.
    """
    low, high = sorted((source, target))
    if low == high:
        return slice(0, 0), 1
    if arithmetic == "shared":
        return slice(0, 1), 1
    if arithmetic == "no-inversion":
        offset = 0 if target > source else MAX_DEGREE
        return slice(offset + low, offset + high), 1
    return slice(low, high), 1 if target > source else -1
