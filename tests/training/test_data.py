from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tocom_export.errors import DataError
from tocom_export.images import SUFFIXES, Preprocess
from tocom_export.spec import VitSpec
from tocom_export.training.data import TrainData, eval_loader

pytestmark = [
    # timm leaves image files to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    # From Python 3.12 on, where a worker is forked beside torch's own threads.
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]


@pytest.fixture
def spec(make_spec: Callable[..., VitSpec]) -> VitSpec:
    return make_spec(image_size=[16, 16])


@pytest.fixture
def folder(tmp_path: Path, image_folder: Callable[..., Path]) -> Path:
    return image_folder(tmp_path / "images", each=6)


def train_data(folder: Path, spec: VitSpec, **changes: Any) -> TrainData:
    options = {"augment": "rand-m9-mstd0.5-inc1", "erasing": 0.25, **changes}
    return TrainData(folder, spec, Preprocess(), options.pop("batch", 4), **options)


def equal(first: list[tuple[Tensor, Tensor]], second: list[tuple[Tensor, Tensor]]) -> bool:
    assert len(first) == len(second) > 0
    return all(
        torch.equal(a, b) for x, y in zip(first, second, strict=True)
        for a, b in zip(x, y, strict=True)
    )  # fmt: skip


def test_batches(folder: Path, spec: VitSpec):
    data = train_data(folder, spec, batch=5)
    assert data.steps_per_epoch == 2
    batches = list(data.epoch(0))
    assert len(batches) == 2
    for images, labels in batches:
        assert images.shape == (5, 3, 16, 16)
        assert images.dtype == torch.float32
        assert labels.shape == (5,)


def test_each_image_once_an_epoch(folder: Path, spec: VitSpec):
    labels = torch.cat([labels for _, labels in train_data(folder, spec).epoch(0)])
    assert sorted(labels.tolist()) == [0] * 6 + [1] * 6


@pytest.mark.parametrize("epoch", [0, 3])
def test_workers_change_nothing(folder: Path, spec: VitSpec, epoch: int):
    alone, helped = (train_data(folder, spec, workers=workers) for workers in (0, 1))
    torch.manual_seed(epoch)
    assert equal(list(alone.epoch(epoch)), list(helped.epoch(epoch)))


def test_the_global_generators_change_nothing(folder: Path, spec: VitSpec):
    data = train_data(folder, spec)
    torch.manual_seed(1)
    first = list(data.epoch(0))
    torch.manual_seed(2)
    assert equal(first, list(data.epoch(0)))


@pytest.mark.parametrize("step", [1, 2])
def test_an_epoch_from_its_middle(folder: Path, spec: VitSpec, step: int):
    whole = list(train_data(folder, spec).epoch(2))
    assert equal(whole[step:], list(train_data(folder, spec).epoch(2, step)))


def test_epochs_and_seeds_differ(folder: Path, spec: VitSpec):
    data = train_data(folder, spec)
    first = list(data.epoch(0))
    assert not equal(first, list(data.epoch(1)))
    assert not equal(first, list(train_data(folder, spec, seed=1).epoch(0)))


@pytest.mark.parametrize("name", ["none", "a/0.png"])
def test_no_such_folder(folder: Path, spec: VitSpec, name: str):
    with pytest.raises(DataError, match=name):
        train_data(folder / name, spec)
    with pytest.raises(DataError, match=name):
        eval_loader(folder / name, spec, Preprocess())


def test_no_class_folders(tmp_path: Path, spec: VitSpec):
    with pytest.raises(DataError, match="any class folder"):
        train_data(tmp_path, spec)


def test_no_images(tmp_path: Path, spec: VitSpec):
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError) as caught:
        train_data(tmp_path, spec)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(DataError):
        eval_loader(tmp_path, spec, Preprocess())


def test_fewer_images_than_a_batch(folder: Path, spec: VitSpec):
    with pytest.raises(DataError, match=r"12 images .* 13"):
        train_data(folder, spec, batch=13)


@pytest.mark.parametrize("names", [("2", "10", "1"), ("b10", "a", "b9"), ("B", "a", "C")])
def test_class_names_are_in_the_order_of_the_labels(
    tmp_path: Path, image_folder, spec: VitSpec, names: tuple[str, ...]
):
    folder = image_folder(tmp_path / "images", names, each=1)
    plain = Preprocess(mean=(0.0,) * 3, std=(1.0,) * 3)
    ((images, labels),) = eval_loader(folder, spec, plain)
    colours = images.mean(dim=(2, 3)).argmax(dim=1)  # image_folder gives the n-th class the n-th
    classes = train_data(folder, spec, batch=1).classes
    found = {classes[label]: int(c) for label, c in zip(labels, colours, strict=True)}
    assert found == {name: colour for colour, name in enumerate(names)}


def test_an_empty_class_folder_is_told(tmp_path: Path, image_folder, spec: VitSpec):
    folder = image_folder(tmp_path / "images", ("b", "c"), each=2)
    (folder / "a").mkdir()
    with pytest.raises(DataError, match=r"classes a\b"):
        train_data(folder, spec)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_kind_of_image(tmp_path: Path, spec: VitSpec, suffix: str):
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "cat" / f"0{suffix}")
    ((images, _),) = eval_loader(tmp_path, spec, Preprocess())
    assert images.shape == (1, 3, 16, 16)
    ((images, _),) = train_data(tmp_path, spec, batch=1).epoch(0)
    assert images.shape == (1, 3, 16, 16)


def test_eval_loader(folder: Path, spec: VitSpec):
    batches = list(eval_loader(folder, spec, Preprocess(), batch=5))
    assert [len(labels) for _, labels in batches] == [5, 5, 2]
    assert torch.cat([labels for _, labels in batches]).tolist() == [0] * 6 + [1] * 6
    assert batches[0][0].shape == (5, 3, 16, 16)
    again = list(eval_loader(folder, spec, Preprocess(), batch=5))
    assert equal(batches, again)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named(tmp_path: Path, image_folder, spec: VitSpec, workers: int):
    folder = image_folder(tmp_path / "images", each=2)
    (folder / "a" / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError) as caught:
        list(train_data(folder, spec, batch=4, workers=workers).epoch(0))
    message = str(caught.value)
    assert message.startswith(str(folder / "a" / "1.png"))
    assert "\n" not in message
