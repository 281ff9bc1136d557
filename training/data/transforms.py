"""timm's transforms, from an RGB image to what a model takes."""

from __future__ import annotations

from collections.abc import Callable
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


def eval_transform(spec: VitSpec, preprocess: Preprocess) -> Transform:
    """Resize, crop at the centre, normalise.

    Raises:
        DataError: the model doesn't take the three channels that images are read with.
    """
    transform: Transform = create_transform(
        _input_size(spec),
        interpolation=preprocess.interpolation,
        mean=preprocess.mean,
        std=preprocess.std,
        crop_pct=preprocess.crop_pct,
    )
    return transform


def train_transform(
    spec: VitSpec,
    preprocess: Preprocess,
    *,
    augment: str,
    flip: bool,
    crop_scale: float,
    erasing: float,
) -> Transform:
    """As :class:`~tocom_export.training.data.train.TrainData` explains its arguments.

    Raises:
        DataError: ``augment`` can't be read, or the model doesn't take three channels.
    """
    if augment == "none":
        return eval_transform(spec, preprocess)
    try:
        transform: Any = create_transform(
            _input_size(spec),
            is_training=True,
            scale=(crop_scale, 1.0),
            hflip=0.5 if flip else 0.0,
            color_jitter=0.0,
            auto_augment=None if augment == "crop" else augment,
            interpolation=preprocess.interpolation,
            mean=preprocess.mean,
            std=preprocess.std,
            re_prob=erasing,
            re_mode="pixel",
        )
    except (AssertionError, ValueError, KeyError, NotImplementedError):
        raise DataError(
            f"--augment {augment}: rand-m9-mstd0.5-inc1 and the like, crop or none is expected."
        ) from None
    for step in transform.transforms:
        for op in step.ops if isinstance(step, RandAugment) else ():
            # A magnitude drawn near its end asks to keep no bit at all, which Pillow refuses.
            if op.name.startswith("Posterize"):
                op.level_fn = partial(_at_least_one, op.level_fn)
    checked: Transform = transform
    return checked


def _at_least_one(level_of: Any, level: float, hparams: Any) -> tuple[int, ...]:
    return tuple(max(1, bits) for bits in level_of(level, hparams))


def _input_size(spec: VitSpec) -> tuple[int, int, int]:
    if spec.channels != 3:
        raise DataError(f"{spec.model} takes {spec.channels} channels; images are read as RGB.")
    return spec.channels, *spec.image_size
