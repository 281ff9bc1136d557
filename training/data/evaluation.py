"""Labelled images as test data, in order and without random draws."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from tocom_export.model.preprocess import Preprocess
from tocom_export.model.spec import VitSpec

from .images import LabelledImages
from .loader import Key, Loader, Warn
from .transforms import eval_transform


class EvalData(Loader):
    """Batches of all readable images, resized, cropped at the centre and normalised.

    Raises:
        DataError: the model doesn't take the three channels that images are read with.
    """

    def __init__(
        self,
        images: LabelledImages,
        spec: VitSpec,
        preprocess: Preprocess,
        batch: int = 256,
        workers: int = 0,
        warn: Warn | None = None,
    ) -> None:
        super().__init__(images, eval_transform(spec, preprocess), workers=workers, warn=warn)
        self._batch = batch

    def __len__(self) -> int:
        """Number of batches."""
        return math.ceil(len(self._images) / self._batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, C, H, W) float32 and labels (B,) int64; see :meth:`Loader.load`."""
        keys: list[Key] = [(index,) for index in range(len(self._images))]
        return self.load(keys[n : n + self._batch] for n in range(0, len(keys), self._batch))
