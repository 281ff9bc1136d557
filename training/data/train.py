"""Labelled images as deterministic training data."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from torch import Tensor
from torch.utils.data import Dataset

from tocom_export.errors import DataError
from tocom_export.model.preprocess import Preprocess
from tocom_export.model.spec import VitSpec

from .images import Unreadable, UnreadableImage
from .loader import Item, load
from .opening import LabelledImages
from .transforms import train_transform

Warn = Callable[[str], None]
"""Called with a line about something that training goes on without."""


@dataclass(frozen=True)
class Share:
    """Which part of each step's batch this process handles.

    A batch is cut into ``world`` · ``accumulate`` equal micro-batches, and process ``rank`` takes
    parts rank, rank + world, ... So one process that accumulates two micro-batches computes what
    two processes of one each do::

        batch                     │ part 0 │ part 1 │ part 2 │ part 3 │
        world 2, accumulate 2     │ rank 0 │ rank 1 │ rank 0 │ rank 1 │
    """

    rank: int = 0
    world: int = 1
    accumulate: int = 1


def seed_all(*keys: int) -> None:
    """Seed Python's, NumPy's and torch's generators, on all devices, from a tuple of numbers."""
    torch.manual_seed(_seed_cpu(*keys))


def _seed_cpu(*keys: int) -> int:
    """What :func:`seed_all` does on the CPU, at a tenth of the time: it's done for each image."""
    seed = int(np.random.SeedSequence(keys).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    return seed


class TrainData:
    """Augmented, shuffled batches of labelled images that can be resumed at any step.

    Every random draw is a function of (seed, epoch, image), so neither the number of worker
    processes nor a restart changes what a step sees. An image that can't be read is replaced by
    the next one. ``identity`` says, as JSON, all that decides the outcome; ``mix`` mixes a
    micro-batch, images (B, C, H, W) and labels (B,) → targets (B, classes), or is None.

    Args:
        batch: images per step, over all processes.
        augment: timm's RandAugment string (``rand-m9-mstd0.5-inc1``); ``crop`` for random crops
            and flips alone; ``none`` to only resize, whatever the other arguments say.
        flip: whether images are mirrored at random.
        crop_scale: smallest share of the image's area that a random crop keeps.
        erasing: probability of random erasing.
        mixup: alpha of mixup; 0 for none.
        cutmix: alpha of CutMix; 0 for none.
        warn: called once for each image that can't be read.

    Raises:
        DataError: there are fewer images than a batch, ``augment`` can't be read, or the model
            doesn't take the three channels that images are read with.
    """

    def __init__(
        self,
        images: LabelledImages,
        spec: VitSpec,
        preprocess: Preprocess,
        batch: int,
        *,
        augment: str = "crop",
        flip: bool = True,
        crop_scale: float = 0.08,
        erasing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        seed: int = 0,
        workers: int = 0,
        warn: Warn | None = None,
    ) -> None:
        transform = train_transform(
            spec, preprocess, augment=augment, flip=flip, crop_scale=crop_scale, erasing=erasing
        )
        self.classes = images.classes
        self.identity: dict[str, object] = {
            "images": len(images),
            "files": _digest(images),
            "classes": list(images.classes),
            "augment": augment,
            "flip": flip,
            "crop-scale": crop_scale,
            "erasing": erasing,
            "mixup": mixup,
            "cutmix": cutmix,
            "batch": batch,
            "seed": seed,
            "image-size": list(spec.image_size),
            "preprocess": preprocess.to_json(),
        }
        self.mix: Mixup | None = None
        if mixup or cutmix:
            self.mix = Mixup(mixup, cutmix, label_smoothing=0.0, num_classes=len(images.classes))
        self._unreadable = Unreadable(images, warn)
        self._items = _Seeded(images, transform, seed, self._unreadable.limit)
        self._batch, self._seed, self._workers = batch, seed, workers
        self.steps_per_epoch = len(images) // batch
        if not self.steps_per_epoch:
            raise DataError(
                f"{images.name}: {len(images)} images are fewer than a batch of {batch}; "
                "lower --batch."
            )

    @property
    def unreadable(self) -> set[int]:
        """The images that couldn't be read so far."""
        return self._unreadable.indices

    def check_share(self, share: Share) -> int:
        """The number of images in a micro-batch.

        Raises:
            DataError: the batch can't be cut into equal ones, or these can't be mixed.
        """
        size, rest = divmod(self._batch, share.world * share.accumulate)
        if rest:
            raise DataError(
                f"--batch {self._batch} is no multiple of {share.world} processes × --accumulate "
                f"{share.accumulate}; choose one that is."
            )
        if self.mix and size % 2:
            raise DataError(
                f"--mixup and --cutmix mix pairs, but a micro-batch has {size} images (--batch "
                f"{self._batch}, {share.world} processes, --accumulate {share.accumulate}); "
                "make it even."
            )
        return size

    def epoch(
        self, epoch: int, first_step: int = 0, share: Share = Share()
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, C, H, W) and labels (B,) of one epoch, from ``first_step`` of it on.

        A micro-batch at a time, ``share.accumulate`` of them a step.

        Raises:
            DataError: as :meth:`check_share` does; or too many images can't be read.
        """
        size = self.check_share(share)
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self._items))
        self._items.epoch = epoch
        parts = range(share.rank, share.world * share.accumulate, share.world)
        starts = (
            step * self._batch + part * size
            for step in range(first_step, self.steps_per_epoch)
            for part in parts
        )
        batches = [order[start : start + size].tolist() for start in starts]
        yield from load(self._items, batches, self._workers, self._unreadable)


def _digest(images: LabelledImages) -> str:
    """Tells apart sets of as many images: SHA-256 of what each of them is called."""
    sha = hashlib.sha256()
    for index in range(len(images)):
        sha.update(images.where(index).replace("\\", "/").rpartition("/")[2].encode() + b"\0")
    return sha.hexdigest()


class _Seeded(Dataset[Item]):
    """Seeds the generators before each image, so augmentation depends on nothing else."""

    def __init__(self, images: LabelledImages, transform: Any, seed: int, limit: int) -> None:
        self.images, self.transform, self.seed, self.limit = images, transform, seed, limit
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Item:
        skipped: list[int] = []
        while len(skipped) <= self.limit:
            found = (index + len(skipped)) % len(self.images)
            try:
                image, label = self.images.read(found)
            except UnreadableImage:
                skipped.append(found)
                continue
            # By the image that is missing: its replacement is drawn a second time in this epoch.
            _seed_cpu(self.seed, self.epoch, index)
            return self.transform(image), label, skipped
        return None, -1, skipped
