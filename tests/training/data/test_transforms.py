from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from tocom_export.errors import DataError
from tocom_export.model.preprocess import Preprocess
from tocom_export.model.spec import VitSpec
from tocom_export.training.data.seeding import seed_all
from tocom_export.training.data.transforms import (
    Augmentation,
    eval_transform,
    train_transform,
)
from tocom_export.training.settings import DISTILL

PLAIN = {"flip": True, "crop_scale": 0.5, "erasing": 0.0}


@pytest.fixture
def image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 30, 3), np.uint8)
    return Image.fromarray(pixels)


def test_the_papers_augmentation_takes_every_magnitude(spec: VitSpec, image: Image.Image):
    """One draw in some hundreds asks for an image of no bits, which Pillow refuses."""
    transform = train_transform(spec, Preprocess(), Augmentation(DISTILL.augment, **PLAIN))
    for seed in range(3000):
        seed_all(seed)
        assert transform(image).shape == (3, 16, 16)


def test_no_augmentation_is_what_evaluation_sees(spec: VitSpec, image: Image.Image):
    preprocess = Preprocess(crop_pct=0.8)
    plain = train_transform(spec, preprocess, Augmentation("none", **PLAIN))
    assert torch.equal(plain(image), eval_transform(spec, preprocess)(image))


def test_crops_are_random(spec: VitSpec, image: Image.Image):
    transform = train_transform(spec, Preprocess(), Augmentation("crop", **PLAIN))
    seed_all(0)
    first = transform(image)
    assert not torch.equal(transform(image), first)
    seed_all(0)
    assert torch.equal(transform(image), first)


def test_what_timm_cannot_read(spec: VitSpec):
    with pytest.raises(DataError, match="`augment` nonsense: expected rand-m9"):
        train_transform(spec, Preprocess(), Augmentation("nonsense", **PLAIN))


def test_grey_models_are_refused(make_spec: Callable[..., VitSpec]):
    grey = make_spec(channels=1)
    for make in (
        lambda: eval_transform(grey, Preprocess()),
        lambda: train_transform(grey, Preprocess(), Augmentation("crop", **PLAIN)),
    ):
        with pytest.raises(DataError, match="1 channels"):
            make()
