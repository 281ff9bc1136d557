"""Labelled images as test data, in order and without random draws."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from tocom_export.bundle.opening import Bundle
from tocom_export.model.preprocess import Preprocess
from tocom_export.model.spec import VitSpec
from tocom_export.study.subject import check_classes

from .images import LabelledImages
from .loader import Key, Loader, Warn
from .opening import open_images
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

    @property
    def total(self) -> int:
        """Number of images, those that can't be read included."""
        return len(self._images)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, C, H, W) float32 and labels (B,) int64; see :meth:`Loader.load`."""
        keys: list[Key] = [(index,) for index in range(len(self._images))]
        return self.load(keys[n : n + self._batch] for n in range(0, len(keys), self._batch))


def open_test_data(
    place: str,
    spec: VitSpec,
    preprocess: Preprocess,
    batch: int = 256,
    workers: int = 0,
    warn: Warn | None = None,
    split: str = "test",
    **places: Any,
) -> EvalData:
    """Labelled images by what names them (:func:`~.opening.open_images`), for a model.

    Args:
        split: which part of a set by name that doesn't say it.
        places: where a timm data set lies.

    Raises:
        DataError: there are none, or the model doesn't take them.
    """
    images = open_images(place, split=split, **places)
    return EvalData(images, spec, preprocess, batch, workers, warn)


def open_bundle_data(
    bundle: Bundle, place: str, batch: int, warn: Warn | None = None, **places: Any
) -> EvalData:
    """The same for a bundle, which must have logits, and whose classes they must have."""
    bundle.find_output("logits")
    data = open_test_data(place, bundle.spec, bundle.preprocess, batch, warn=warn, **places)
    check_classes(data.classes, f"`data` {place}", bundle.spec, bundle.classes, bundle.path)
    return data
