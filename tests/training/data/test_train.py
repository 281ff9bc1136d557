from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tocom_export.errors import DataError
from tocom_export.model.image_files import SUFFIXES
from tocom_export.model.preprocess import Preprocess
from tocom_export.model.spec import VitSpec
from tocom_export.training.data.evaluation import EvalData
from tocom_export.training.data.opening import open_images
from tocom_export.training.data.seeding import seed_all
from tocom_export.training.data.train import Share

pytestmark = [
    # timm leaves image files to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    # From Python 3.12 on, where a worker is forked beside torch's own threads.
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]


def test_batches(folder: Path, spec: VitSpec, train_data):
    data = train_data(folder, spec, batch=5)
    assert data.steps_per_epoch == 2
    batches = list(data.epoch(0))
    assert len(batches) == 2
    for images, labels in batches:
        assert images.shape == (5, 3, 16, 16)
        assert images.dtype == torch.float32
        assert labels.shape == (5,)


def test_each_image_once_an_epoch(folder: Path, spec: VitSpec, train_data):
    labels = torch.cat([labels for _, labels in train_data(folder, spec).epoch(0)])
    assert sorted(labels.tolist()) == [0] * 6 + [1] * 6


@pytest.mark.parametrize("epoch", [0, 3])
def test_workers_change_nothing(folder: Path, spec: VitSpec, epoch: int, train_data, equal):
    alone, helped = (train_data(folder, spec, workers=workers) for workers in (0, 1))
    torch.manual_seed(epoch)
    assert equal(list(alone.epoch(epoch)), list(helped.epoch(epoch)))


def test_an_image_sees_the_draws_that_seed_all_gives(
    folder: Path, spec: VitSpec, train_data, equal
):
    """The data set seeds the CPU alone, which is faster; a run from before must continue."""
    data = train_data(folder, spec, batch=1)
    first = int(np.random.default_rng((0, 3)).permutation(12)[0])
    image, _ = open_images(folder).read(first)
    seed_all(0, 3, first)
    expected = data._items.transform(image)
    assert torch.equal(next(data.epoch(3))[0][0], expected)


def test_seed_all():
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))

    seed_all(1, 2)
    first = draw()
    seed_all(1, 3)
    assert draw() != first
    seed_all(1, 2)
    assert draw() == first


def test_no_augmentation_draws_nothing(folder: Path, spec: VitSpec, train_data):
    def by_label(epoch: int) -> list[float]:
        data = train_data(folder, spec, augment="none", batch=12)
        return sorted(float(image.sum()) for image in next(data.epoch(epoch))[0])

    assert by_label(0) == by_label(1)


def test_images_are_mirrored_unless_told_not_to(tmp_path: Path, spec: VitSpec, train_data):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, 8:] = 255
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for n in range(8):
            Image.fromarray(pixels).save(tmp_path / name / f"{n}.png")

    def bright_on_the_left(**options: Any) -> int:
        data = train_data(
            tmp_path, spec, batch=16, augment="crop", crop_scale=1.0, erasing=0.0, **options
        )
        images, _ = next(data.epoch(0))
        return sum(bool(image[..., :4].mean() > image[..., -4:].mean()) for image in images)

    assert bright_on_the_left(flip=False) == 0
    assert 0 < bright_on_the_left() < 16


def test_an_augmentation_that_timm_cannot_read(folder: Path, spec: VitSpec, train_data):
    with pytest.raises(DataError, match=r"`augment` banana: expected rand-m9.* or none\."):
        train_data(folder, spec, augment="banana")


def test_the_identity_is_json_with_a_key_per_option(folder: Path, spec: VitSpec, train_data):
    def identity_of(**options: Any) -> dict[str, Any]:
        return json.loads(json.dumps(train_data(folder, spec, **options).identity))

    identity = identity_of()
    assert (identity["images"], identity["classes"]) == (12, ["a", "b"])
    options = {
        "augment": "crop", "flip": False, "crop_scale": 0.5, "erasing": 0.5, "mixup": 0.8,
        "cutmix": 1.0, "batch": 6, "seed": 1,
    }  # fmt: skip
    for option, value in options.items():
        other = identity_of(**{option: value})
        differ = {key for key in identity if other[key] != identity[key]}
        assert differ == {option.replace("_", "-")}


@pytest.fixture
def parts(folder: Path, spec: VitSpec, train_data) -> Callable[..., list[tuple[Tensor, Tensor]]]:
    """What a process sees of an epoch."""
    return lambda first=0, **share: list(train_data(folder, spec).epoch(1, first, Share(**share)))


def test_accumulating_sees_the_parts_of_two_processes(parts, equal):
    alone = parts(accumulate=2)
    ranks = [parts(rank=rank, world=2) for rank in (0, 1)]
    assert [len(labels) for _, labels in alone] == [2] * 6
    assert equal(alone[0::2], ranks[0])
    assert equal(alone[1::2], ranks[1])
    whole = parts()
    joined = [
        (torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]]))
        for a, b in zip(alone[0::2], alone[1::2], strict=True)
    ]
    assert equal(whole, joined)
    assert equal(alone[4:], parts(2, accumulate=2))


def test_two_processes_that_accumulate(parts, equal):
    alone = parts(accumulate=4)
    for rank in (0, 1):
        assert equal(alone[rank::2], parts(rank=rank, world=2, accumulate=2))


def test_a_batch_that_cannot_be_cut(folder: Path, spec: VitSpec, train_data):
    data = train_data(folder, spec, batch=6)
    with pytest.raises(DataError, match=r"^`batch` 6 .* 2 processes × `accumulate` 2; choose"):
        next(data.epoch(0, 0, Share(0, 2, 2)))
    assert data.check_share(Share(0, 3, 1)) == 2


def test_mixing(folder: Path, spec: VitSpec, train_data, equal):
    data = train_data(folder, spec, mixup=0.8, cutmix=1.0)
    assert train_data(folder, spec).mix is None
    assert data.mix is not None
    images, labels = next(data.epoch(0))
    seed_all(0)
    mixed, targets = data.mix(images.clone(), labels)
    assert targets.shape == (4, 2)
    assert torch.allclose(targets.sum(dim=1), torch.ones(4))
    assert not torch.equal(mixed, images)


def test_pairs_are_mixed(folder: Path, spec: VitSpec, train_data):
    data = train_data(folder, spec, batch=6, cutmix=1.0)
    with pytest.raises(DataError, match=r"micro-batch has 3 images .*; choose a `batch` that"):
        next(data.epoch(0, 0, Share(accumulate=2)))


def test_the_global_generators_change_nothing(folder: Path, spec: VitSpec, train_data, equal):
    data = train_data(folder, spec)
    torch.manual_seed(1)
    first = list(data.epoch(0))
    torch.manual_seed(2)
    assert equal(first, list(data.epoch(0)))


@pytest.mark.parametrize("step", [1, 2])
def test_an_epoch_from_its_middle(folder: Path, spec: VitSpec, step: int, train_data, equal):
    whole = list(train_data(folder, spec).epoch(2))
    assert equal(whole[step:], list(train_data(folder, spec).epoch(2, step)))


def test_epochs_and_seeds_differ(folder: Path, spec: VitSpec, train_data, equal):
    data = train_data(folder, spec)
    first = list(data.epoch(0))
    assert not equal(first, list(data.epoch(1)))
    assert not equal(first, list(train_data(folder, spec, seed=1).epoch(0)))


def test_fewer_images_than_a_batch(folder: Path, spec: VitSpec, train_data):
    with pytest.raises(DataError, match=r"12 images .* 13; lower `batch`"):
        train_data(folder, spec, batch=13)


def test_a_model_of_grey_images(folder: Path, make_spec: Callable[..., VitSpec], train_data):
    grey = make_spec(channels=1)
    with pytest.raises(DataError, match="takes 1 channels"):
        train_data(folder, grey)
    with pytest.raises(DataError, match="takes 1 channels"):
        EvalData(open_images(folder), grey, Preprocess())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_kind_of_image(tmp_path: Path, spec: VitSpec, suffix: str, train_data):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (20, 20)).save(tmp_path / name / f"0{suffix}")
    ((images, _),) = EvalData(open_images(tmp_path), spec, Preprocess())
    assert images.shape == (2, 3, 16, 16)
    ((images, _),) = train_data(tmp_path, spec, batch=2).epoch(0)
    assert images.shape == (2, 3, 16, 16)
