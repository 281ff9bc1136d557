"""Small sets of images, and the training data made of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tocom_export.model.preprocess import Preprocess
from tocom_export.model.spec import VitSpec
from tocom_export.training.data.opening import open_images
from tocom_export.training.data.train import TrainData

Batches = list[tuple[Tensor, Tensor]]


@pytest.fixture
def spec(make_spec: Callable[..., VitSpec]) -> VitSpec:
    return make_spec(image_size=[16, 16])


@pytest.fixture
def folder(tmp_path: Path, image_folder: Callable[..., Path]) -> Path:
    return image_folder(tmp_path / "images", each=6)


@pytest.fixture
def train_data() -> Callable[..., TrainData]:
    """Training data of a folder, with the paper's augmentation."""

    def call(folder: Path, spec: VitSpec, **changes: Any) -> TrainData:
        options = {"augment": "rand-m9-mstd0.5-inc1", "erasing": 0.25, **changes}
        images = open_images(folder)
        return TrainData(images, spec, Preprocess(), options.pop("batch", 4), **options)

    return call


@pytest.fixture
def equal() -> Callable[[Batches, Batches], bool]:
    """Whether batches are the same to the bit."""

    def call(first: Batches, second: Batches) -> bool:
        assert len(first) == len(second) > 0
        return all(
            torch.equal(a, b) for x, y in zip(first, second, strict=True)
            for a, b in zip(x, y, strict=True)
        )  # fmt: skip

    return call


@pytest.fixture
def spoil() -> Callable[..., None]:
    """Makes images of a folder unreadable."""

    def call(folder: Path, *names: str) -> None:
        for name in names:
            (folder / name).write_bytes(b"no image")

    return call
