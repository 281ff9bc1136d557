"""Image folders as deterministic training data, and as test data."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import ImageDataset, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tocom_export.errors import DataError
from tocom_export.images import Preprocess
from tocom_export.spec import VitSpec


def class_names(folder: Path) -> tuple[str, ...]:
    """The classes of an ImageFolder: its sub-folders' names, sorted.

    Raises:
        DataError: there is no such folder, or it has no sub-folders.
    """
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; images are expected as <folder>/<class>/<image>."
        )
    names = tuple(sorted(p.name for p in folder.iterdir() if p.is_dir()))
    if not names:
        raise DataError(f"{folder}: no class folders in it (<folder>/<class>/<image>).")
    return names


def seed_all(*keys: int) -> None:
    """Seed Python's, NumPy's and torch's generators from a tuple of numbers."""
    seed = int(np.random.SeedSequence(keys).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class TrainData:
    """Augmented, shuffled batches of an ImageFolder that can be resumed at any step.

    Every random draw is a function of (seed, epoch, image), so neither the number of worker
    processes nor a restart changes what a step sees.

    Args:
        folder: an ImageFolder.
        augment: timm's RandAugment string (``rand-m9-mstd0.5-inc1``), or None.
        crop_scale: smallest share of the image's area that a random crop keeps.
        erasing: probability of random erasing.
    """

    def __init__(
        self,
        folder: Path,
        spec: VitSpec,
        preprocess: Preprocess,
        batch: int,
        *,
        augment: str | None = None,
        crop_scale: float = 0.08,
        erasing: float = 0.0,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        self.classes = class_names(folder)
        transform = create_transform(
            (spec.channels, *spec.image_size),
            is_training=True,
            scale=(crop_scale, 1.0),
            color_jitter=0.0,
            auto_augment=augment,
            interpolation=preprocess.interpolation,
            mean=preprocess.mean,
            std=preprocess.std,
            re_prob=erasing,
            re_mode="pixel",
        )
        images: Any = ImageDataset(str(folder), transform=transform)
        self._images = _Seeded(images, seed)
        self._batch, self._seed, self._workers = batch, seed, workers
        self.steps_per_epoch = len(images) // batch
        if not self.steps_per_epoch:
            raise DataError(f"{folder}: {len(images)} images are fewer than a batch of {batch}.")

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, C, H, W) and labels (B,) of one epoch, from ``first_step`` of it on."""
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self._images))
        self._images.epoch = epoch
        batches = [
            order[step * self._batch : (step + 1) * self._batch].tolist()
            for step in range(first_step, self.steps_per_epoch)
        ]
        loader: DataLoader[Any] = DataLoader(
            self._images, batch_sampler=batches, num_workers=self._workers
        )
        yield from loader


class _Seeded(Dataset[tuple[Tensor, int]]):
    """Seeds the generators before each image, so augmentation depends on nothing else."""

    def __init__(self, images: Any, seed: int) -> None:
        self.images, self.seed, self.epoch = images, seed, 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        seed_all(self.seed, self.epoch, index)
        image, label = self.images[index]
        return image, label


def eval_loader(
    folder: Path, spec: VitSpec, preprocess: Preprocess, batch: int = 256, workers: int = 0
) -> DataLoader[tuple[Tensor, Tensor]]:
    """All images of an ImageFolder in order: resized, cropped at the centre, normalised."""
    class_names(folder)
    transform = create_transform(
        (spec.channels, *spec.image_size),
        interpolation=preprocess.interpolation,
        mean=preprocess.mean,
        std=preprocess.std,
        crop_pct=preprocess.crop_pct,
    )
    images: Any = ImageDataset(str(folder), transform=transform)
    return DataLoader(images, batch_size=batch, num_workers=workers)
