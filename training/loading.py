"""Batches from a set of images, made by worker processes, without the unreadable ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from tocom_export.errors import DataError
from tocom_export.spec import VitSpec
from tocom_export.training.unreadable import Unreadable

Item = tuple[Tensor | None, int, list[int]]
"""An image (C, H, W) or None, its label, and the indices that couldn't be read on the way."""


def load(
    items: Dataset[Item], batches: Iterable[list[int]], workers: int, unreadable: Unreadable
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (B, C, H, W) and labels (B,) of each batch of indices; shorter without a None.

    Raises:
        DataError: too many images are unreadable, or one can't be used at all.
    """
    loader: DataLoader[Any] = DataLoader(
        items,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
    )
    try:
        for images, labels, skipped in loader:
            unreadable.add(skipped)  # counted here, since each worker would count on its own
            if len(labels):
                yield images, labels
    except DataError as error:  # from a worker it comes back with the worker's traceback
        last = str(error).strip().splitlines()[-1]
        raise DataError(last.rpartition("DataError: ")[2]) from None


def input_size(spec: VitSpec) -> tuple[int, int, int]:
    """Channels, height and width.

    Raises:
        DataError: they aren't the three channels that images are read with.
    """
    if spec.channels != 3:
        raise DataError(f"{spec.model} takes {spec.channels} channels; images are read as RGB.")
    return spec.channels, *spec.image_size


def _collate(items: list[Item]) -> tuple[Tensor, Tensor, list[int]]:
    """Images (B, C, H, W), labels (B,), and the indices that couldn't be read."""
    skipped = [index for *_, indices in items for index in indices]
    pairs = [(image, label) for image, label, _ in items if image is not None]
    if not pairs:
        return torch.empty(0), torch.empty(0, dtype=torch.int64), skipped
    images, labels = default_collate(pairs)
    return images, labels, skipped
