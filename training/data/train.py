"""Labelled images as deterministic training data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from timm.data import Mixup
from torch import Tensor

from tocom_export.errors import DataError
from tocom_export.io.json_codec import encode
from tocom_export.model.preprocess import Preprocess
from tocom_export.model.spec import VitSpec

from .images import LabelledImages
from .loader import Loader, Warn
from .transforms import Augmentation, train_transform


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


class TrainData(Loader):
    """Augmented, shuffled batches of labelled images that can be resumed at any step.

    Every random draw is a function of (seed, epoch, image), so neither the number of worker
    processes nor a restart changes what a step sees. An image that can't be read is replaced by
    the next one. ``identity`` says, as JSON, all that decides the outcome; ``mix`` mixes a
    micro-batch, images (B, C, H, W) and labels (B,) → targets (B, classes), or is None.

    Args:
        batch: images per step, over all processes.
        augmentation: the fields of :class:`~tocom_export.training.data.transforms.Augmentation`.

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
        seed: int = 0,
        workers: int = 0,
        warn: Warn | None = None,
        **augmentation: Any,
    ) -> None:
        how = Augmentation(**augmentation)
        transform = train_transform(spec, preprocess, how)
        super().__init__(images, transform, replace=True, workers=workers, warn=warn)
        self.identity: dict[str, object] = {
            "images": len(images),
            "files": _hash_names(images),
            "classes": list(images.classes),
            **{name.replace("_", "-"): value for name, value in asdict(how).items()},
            "batch": batch,
            "seed": seed,
            "image-size": list(spec.image_size),
            "preprocess": encode(preprocess),
        }
        self.mix: Mixup | None = None
        if how.mixup or how.cutmix:
            classes = len(images.classes)
            self.mix = Mixup(how.mixup, how.cutmix, label_smoothing=0.0, num_classes=classes)
        self._batch, self._seed = batch, seed
        self.steps_per_epoch = len(images) // batch
        if not self.steps_per_epoch:
            few = f"{len(images)} images are fewer than a batch of {batch}"
            raise DataError(f"{self.name}: {few}; lower `batch`.")

    def check_share(self, share: Share) -> int:
        """The images of a micro-batch; raises DataError where it can't be cut so, or mixed."""
        size, rest = divmod(self._batch, share.world * share.accumulate)
        if rest:
            raise DataError(
                f"`batch` {self._batch} is no multiple of {share.world} processes × `accumulate` "
                f"{share.accumulate}; choose one that is."
            )
        if self.mix and size % 2:
            raise DataError(
                f"`mixup` and `cutmix` mix pairs, but a micro-batch has {size} images (`batch` "
                f"{self._batch}, {share.world} processes, `accumulate` {share.accumulate}); "
                "choose a `batch` that makes it even."
            )
        return size

    def epoch(
        self, epoch: int, first_step: int = 0, share: Share = Share()
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, C, H, W) float32 and labels (B,) int64 of an epoch, from ``first_step`` on.

        A micro-batch at a time, ``share.accumulate`` of them a step. See :meth:`check_share`.
        """
        size = self.check_share(share)
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self._images)).tolist()
        starts = (
            step * self._batch + part * size
            for step in range(first_step, self.steps_per_epoch)
            for part in range(share.rank, share.world * share.accumulate, share.world)
        )
        return self.load(
            [(self._seed, epoch, index) for index in order[start : start + size]]
            for start in starts
        )


def _hash_names(images: LabelledImages) -> str:
    """Tells apart sets of as many images: SHA-256 of what each of them is called."""
    sha = hashlib.sha256()
    for index in range(len(images)):
        sha.update(images.where(index).replace("\\", "/").rpartition("/")[2].encode() + b"\0")
    return sha.hexdigest()
