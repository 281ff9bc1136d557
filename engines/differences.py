"""How far an output of an engine is from what it should be, image by image."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tocom_export.graph.precision import Precision
from tocom_export.model.outputs import DENSE

Array = npt.NDArray[Any]


def measure(name: str, got: Array, wanted: Array, precision: Precision) -> Array:
    """Of each image the largest |Δ| of a value of an output (B, ...): (B,).

    Of outputs that have something of each patch, in less than float32, that of the patch in the
    middle. Of a thousand tokens some are then always equally similar to within rounding: others are
    merged, and their patches have other features, however right the engine is. A wrong weight
    shows on all. Of a map it is whether that patch is with others than it should be, 0 or 1: one
    merge more moves the numbers of all behind it.
    """
    if name not in DENSE or precision == "fp32":
        difference: Array = np.abs(got - wanted).reshape(len(got), -1).max(axis=1)
        return difference
    if name == "map":
        return np.asarray(np.median(find_firsts(got) != find_firsts(wanted), axis=1))
    return np.asarray(np.median(np.abs(got - wanted).max(axis=2), axis=1))


def find_firsts(places: Array) -> Array:
    """A map (B, patches) → the first patch that went where each one did (B, patches), int64.

    Patches that went nowhere count as together.
    """
    return np.stack([first[whose] for first, whose in map(_find_unique, places)])


def _find_unique(places: Array) -> tuple[Array, Array]:
    _, first, whose = np.unique(places, return_index=True, return_inverse=True)
    return first, whose
