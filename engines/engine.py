"""One engine with one set of weights, as a request sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tocom_export.errors import ImageError
from tocom_export.model.spec import VitSpec

Images = npt.NDArray[np.float32]
Logits = npt.NDArray[np.float32]


class Engine(Protocol):
    """What a pool needs of an engine, of whichever runtime."""

    spec: VitSpec
    target: int

    def run(self, images: Images) -> Logits:
        """Logits (B, classes) of normalised images (B, C, H, W), from several threads at once."""


@dataclass(frozen=True)
class Serving:
    """What a request runs on, from its begin to its end: one engine with one set of weights."""

    engine: Engine
    target: int
    source: int
    """Degree that the weights were trained at."""
    scale: float
    """Of the compensation that is in them."""
    bytes: int
    """What the engine holds for itself: weights, or a whole plan."""

    def run(self, images: Images) -> Logits:
        """Logits (B, classes) of normalised images (B, C, H, W), both float32.

        Raises:
            ImageError: the array has another shape or dtype, is empty, or holds a NaN or an
                infinite value.
        """
        logits = self.engine.run(images)
        # Whatever enters an image reaches its logits, so that these alone need to be looked at.
        if not np.isfinite(logits).all():
            bad = ~np.isfinite(images.reshape(len(images), -1)).all(axis=1)
            if not bad.any():
                raise ImageError("the logits are no numbers, though all pixels are finite; are the "
                                 "images normalised?")  # fmt: skip
            which = ", ".join(map(str, np.flatnonzero(bad)))
            raise ImageError(f"image {which} of the batch has pixels that are no finite numbers.")
        return logits
