"""Image folders as deterministic training data, and as test data."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder

from tocom_export.errors import DataError, brief
from tocom_export.images import Preprocess
from tocom_export.spec import VitSpec


def open_folder(folder: Path, spec: VitSpec, transform: Any) -> ImageFolder:
    """An ImageFolder, ``<folder>/<class>/<image>``; classes in the order of their names.

    Raises:
        DataError: there is no such folder, or a class without images; or the model doesn't
            take the three channels that images are read with.
    """
    if spec.channels != 3:
        raise DataError(f"{spec.model} takes {spec.channels} channels; images are read as RGB.")
    try:
        return ImageFolder(str(folder), transform=transform, loader=_read)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder} is no folder of images as <folder>/<class>/<image> ({brief(error)})."
        ) from None


def _read(path: str) -> Image.Image:
    """One image, in colour."""
    try:
        with Image.open(path) as file:
            image: Image.Image = file.convert("RGB")
            return image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise DataError(f"{path} is not an image that can be read; remove it.") from None


def seed_all(*keys: int) -> None:
    """Seed Python's, NumPy's and torch's generators from a tuple of numbers."""
    seed = int(np.random.SeedSequence(keys).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class TrainData:
    """Augmented, shuffled batches of an ImageFolder that can be resumed at any step.

    Every random draw is a function of (seed, epoch, image), so neither the number of worker
    processes nor a restart changes what a step sees. ``identity`` says, as JSON, all that does.

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
        try:
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
        except (AssertionError, ValueError, KeyError, NotImplementedError):
            raise DataError(
                f"--augment {augment}: timm reads rand-m9-mstd0.5-inc1 and the like."
            ) from None
        images = open_folder(folder, spec, transform)
        self.classes: tuple[str, ...] = tuple(images.classes)
        self.identity = {
            "images": [len(images), *self.classes],
            "augment": [augment, crop_scale, erasing, seed, batch, preprocess.to_json()],
        }
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
        try:
            yield from loader
        except DataError as error:  # from a worker it comes back with the worker's traceback
            raise DataError(
                str(error).strip().splitlines()[-1].rpartition("DataError: ")[2]
            ) from None


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
    transform = create_transform(
        (spec.channels, *spec.image_size),
        interpolation=preprocess.interpolation,
        mean=preprocess.mean,
        std=preprocess.std,
        crop_pct=preprocess.crop_pct,
    )
    images = open_folder(folder, spec, transform)
    return DataLoader(images, batch_size=batch, num_workers=workers)
