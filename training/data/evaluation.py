"""Labelled images as test data, in order and without any draw."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from tocom_export.model.preprocess import Preprocess
from tocom_export.model.spec import VitSpec

from .images import Unreadable, UnreadableImage
from .loader import Item, load
from .opening import LabelledImages
from .transforms import eval_transform


class EvalData:
    """Batches of all images, each time it is iterated; those that can't be read are left out.

    Images are resized, cropped at the centre and normalised. ``classes`` and ``name`` are those
    of the images.

    Args:
        warn: called once for each image that can't be read.

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
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self.classes, self.name = images.classes, images.name
        self._unreadable = Unreadable(images, warn)
        self._items = _Plain(images, eval_transform(spec, preprocess))
        self._batch, self._workers = batch, workers

    @property
    def unreadable(self) -> set[int]:
        """The images that couldn't be read so far."""
        return self._unreadable.indices

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self._items) // self._batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, C, H, W) and labels (B,).

        Raises:
            DataError: too many images can't be read.
        """
        count = len(self._items)
        starts = range(0, count, self._batch)
        batches = [list(range(start, min(start + self._batch, count))) for start in starts]
        return load(self._items, batches, self._workers, self._unreadable)


class _Plain(Dataset[Item]):
    """Each image, transformed."""

    def __init__(self, images: LabelledImages, transform: Any) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Item:
        try:
            image, label = self.images.read(index)
        except UnreadableImage:
            return None, -1, [index]
        return self.transform(image), label, []
