"""timm's transforms, from an RGB image to what a model takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import RandAugment
from torch import Tensor

from tocom_export.errors import DataError
from tocom_export.model.preprocess import Preprocess
from tocom_export.model.spec import VitSpec

Transform = Callable[[Image.Image], Tensor]
"""An RGB image → tensor (C, H, W)."""


@dataclass(frozen=True)
class Augmentation:
    """How training images are changed at random."""

    augment: str = "crop"
    """timm's RandAugment string (``rand-m9-mstd0.5-inc1``); ``crop`` for random crops and flips
    alone; ``none`` to only resize, whatever flip, crop scale and erasing say."""
    flip: bool = True
    """Whether images are mirrored."""
    crop_scale: float = 0.08
    """Smallest share of the image's area that a crop keeps."""
    erasing: float = 0.0
    """Probability of random erasing."""
    mixup: float = 0.0
    """Alpha of mixup; 0 for none."""
    cutmix: float = 0.0


def eval_transform(spec: VitSpec, preprocess: Preprocess) -> Transform:
    """Resize, crop at the centre, normalise."""
    crop = {"crop_pct": preprocess.crop_pct, "crop_mode": preprocess.crop_mode}
    transform: Transform = _create(spec, preprocess, **crop)
    return transform


def train_transform(spec: VitSpec, preprocess: Preprocess, how: Augmentation) -> Transform:
    """What changes one image at random; raises DataError where ``augment`` can't be read."""
    if how.augment == "none":
        return eval_transform(spec, preprocess)
    try:
        transform: Any = _create(
            spec,
            preprocess,
            is_training=True,
            scale=(how.crop_scale, 1.0),
            hflip=0.5 if how.flip else 0.0,
            color_jitter=0.0,
            auto_augment=None if how.augment == "crop" else how.augment,
            re_prob=how.erasing,
            re_mode="pixel",
        )
    except (AssertionError, ValueError, KeyError, NotImplementedError):
        raise DataError(
            f"`augment` {how.augment}: expected rand-m9-mstd0.5-inc1 or the like, crop or none."
        ) from None
    for step in transform.transforms:
        for op in step.ops if isinstance(step, RandAugment) else ():
            # A magnitude drawn near its end asks to keep no bit at all, which Pillow refuses.
            if op.name.startswith("Posterize"):
                op.level_fn = partial(_keep_one_bit, op.level_fn)
    checked: Transform = transform
    return checked


def _create(spec: VitSpec, preprocess: Preprocess, **options: Any) -> Any:
    """timm's transform; raises DataError unless the model takes three channels."""
    if spec.channels != 3:
        raise DataError(f"{spec.model} takes {spec.channels} channels; images are read as RGB.")
    return create_transform(
        (spec.channels, *spec.image_size),
        interpolation=preprocess.interpolation,
        mean=preprocess.mean,
        std=preprocess.std,
        **options,
    )


def _keep_one_bit(level_of: Any, level: float, hparams: Any) -> tuple[int, ...]:
    """timm's number of bits for a magnitude, at least 1."""
    return tuple(max(1, bits) for bits in level_of(level, hparams))
