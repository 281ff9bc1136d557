from __future__ import annotations

import json
import multiprocessing
import random
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tocom_export.errors import DataError
from tocom_export.model.preprocess import SUFFIXES, Preprocess
from tocom_export.model.spec import VitSpec
from tocom_export.training.data.evaluation import EvalData
from tocom_export.training.data.opening import open_images
from tocom_export.training.data.train import Share, TrainData, seed_all

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
    return TrainData(open_images(folder), spec, Preprocess(), options.pop("batch", 4), **options)


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


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="can't tell who sends a signal")
def test_workers_outlast_sigterm_unless_it_is_ours(folder: Path, spec: VitSpec):
    data = train_data(folder, spec, batch=1, workers=1)
    batches = data.epoch(0)
    first = next(batches)
    (worker,) = multiprocessing.active_children()
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    assert equal([first, *batches], list(train_data(folder, spec, batch=1).epoch(0)))

    batches = data.epoch(0)
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.terminate()  # as at the end of the main process
    worker.join(10)
    assert worker.exitcode == 0


@pytest.mark.parametrize("epoch", [0, 3])
def test_workers_change_nothing(folder: Path, spec: VitSpec, epoch: int):
    alone, helped = (train_data(folder, spec, workers=workers) for workers in (0, 1))
    torch.manual_seed(epoch)
    assert equal(list(alone.epoch(epoch)), list(helped.epoch(epoch)))


def test_an_image_sees_the_draws_that_seed_all_gives(folder: Path, spec: VitSpec):
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


def test_no_augmentation_draws_nothing(folder: Path, spec: VitSpec):
    def by_label(epoch: int) -> list[float]:
        data = train_data(folder, spec, augment="none", batch=12)
        return sorted(float(image.sum()) for image in next(data.epoch(epoch))[0])

    assert by_label(0) == by_label(1)


def test_images_are_mirrored_unless_told_not_to(tmp_path: Path, spec: VitSpec):
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


def test_an_augmentation_that_timm_cannot_read(folder: Path, spec: VitSpec):
    with pytest.raises(DataError, match=r"--augment banana: .* is expected"):
        train_data(folder, spec, augment="banana")


def test_the_identity_is_json_with_a_key_per_option(folder: Path, spec: VitSpec):
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


def parts(folder: Path, spec: VitSpec, first: int = 0, **share: int) -> list[tuple[Tensor, Tensor]]:
    return list(train_data(folder, spec).epoch(1, first, Share(**share)))


def test_accumulating_sees_the_parts_of_two_processes(folder: Path, spec: VitSpec):
    alone = parts(folder, spec, accumulate=2)
    ranks = [parts(folder, spec, rank=rank, world=2) for rank in (0, 1)]
    assert [len(labels) for _, labels in alone] == [2] * 6
    assert equal(alone[0::2], ranks[0])
    assert equal(alone[1::2], ranks[1])
    whole = parts(folder, spec)
    joined = [
        (torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]]))
        for a, b in zip(alone[0::2], alone[1::2], strict=True)
    ]
    assert equal(whole, joined)
    assert equal(alone[4:], parts(folder, spec, 2, accumulate=2))


def test_two_processes_that_accumulate(folder: Path, spec: VitSpec):
    alone = parts(folder, spec, accumulate=4)
    for rank in (0, 1):
        assert equal(alone[rank::2], parts(folder, spec, rank=rank, world=2, accumulate=2))


def test_a_batch_that_cannot_be_cut(folder: Path, spec: VitSpec):
    data = train_data(folder, spec, batch=6)
    with pytest.raises(DataError, match=r"--batch 6 .* 2 processes × --accumulate 2"):
        next(data.epoch(0, 0, Share(0, 2, 2)))
    assert data.check_share(Share(0, 3, 1)) == 2


def test_mixing(folder: Path, spec: VitSpec):
    data = train_data(folder, spec, mixup=0.8, cutmix=1.0)
    assert train_data(folder, spec).mix is None
    assert data.mix is not None
    images, labels = next(data.epoch(0))
    seed_all(0)
    mixed, targets = data.mix(images.clone(), labels)
    assert targets.shape == (4, 2)
    assert torch.allclose(targets.sum(dim=1), torch.ones(4))
    assert not torch.equal(mixed, images)


def test_pairs_are_mixed(folder: Path, spec: VitSpec):
    data = train_data(folder, spec, batch=6, cutmix=1.0)
    with pytest.raises(DataError, match=r"micro-batch has 3 images .*; make it even"):
        next(data.epoch(0, 0, Share(accumulate=2)))


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


def test_fewer_images_than_a_batch(folder: Path, spec: VitSpec):
    with pytest.raises(DataError, match=r"12 images .* 13; lower --batch"):
        train_data(folder, spec, batch=13)


def test_a_model_of_grey_images(folder: Path, make_spec: Callable[..., VitSpec]):
    grey = make_spec(channels=1)
    with pytest.raises(DataError, match="takes 1 channels"):
        train_data(folder, grey)
    with pytest.raises(DataError, match="takes 1 channels"):
        EvalData(open_images(folder), grey, Preprocess())


@pytest.mark.parametrize("names", [("2", "10", "1"), ("b10", "a", "b9"), ("B", "a", "C")])
def test_class_names_are_in_the_order_of_the_labels(
    tmp_path: Path, image_folder, spec: VitSpec, names: tuple[str, ...]
):
    folder = image_folder(tmp_path / "images", names, each=1)
    plain = Preprocess(mean=(0.0,) * 3, std=(1.0,) * 3)
    ((images, labels),) = EvalData(open_images(folder), spec, plain)
    colours = images.mean(dim=(2, 3)).argmax(dim=1)  # image_folder gives the n-th class the n-th
    classes = train_data(folder, spec, batch=1).classes
    found = {classes[label]: int(c) for label, c in zip(labels, colours, strict=True)}
    assert found == {name: colour for colour, name in enumerate(names)}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_kind_of_image(tmp_path: Path, spec: VitSpec, suffix: str):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (20, 20)).save(tmp_path / name / f"0{suffix}")
    ((images, _),) = EvalData(open_images(tmp_path), spec, Preprocess())
    assert images.shape == (2, 3, 16, 16)
    ((images, _),) = train_data(tmp_path, spec, batch=2).epoch(0)
    assert images.shape == (2, 3, 16, 16)


def test_EvalData(folder: Path, spec: VitSpec):
    batches = list(EvalData(open_images(folder), spec, Preprocess(), batch=5))
    assert [len(labels) for _, labels in batches] == [5, 5, 2]
    assert torch.cat([labels for _, labels in batches]).tolist() == [0] * 6 + [1] * 6
    assert batches[0][0].shape == (5, 3, 16, 16)
    again = list(EvalData(open_images(folder), spec, Preprocess(), batch=5))
    assert equal(batches, again)


def spoil(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_bytes(b"no image")


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_named_and_replaced(folder: Path, spec: VitSpec, workers: int):
    spoil(folder, "a/5.png", "b/0.png")  # one after the other, so the next but one stands in
    lines: list[str] = []
    data = train_data(folder, spec, workers=workers, warn=lines.append)
    first = list(data.epoch(0))
    assert sorted(lines) == [
        f"{folder / name}: can't be read; skipped" for name in ("a/5.png", "b/0.png")
    ]
    assert data.unreadable == {5, 6}
    assert [len(labels) for _, labels in first] == [4, 4, 4]
    labels = torch.cat([labels for _, labels in first])
    assert sorted(labels.tolist()) == [0] * 5 + [1] * 7
    assert equal(first, list(train_data(folder, spec).epoch(0)))
    list(data.epoch(1))
    assert len(lines) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_replacement_is_not_the_same_picture_twice(folder: Path, spec: VitSpec, workers: int):
    spoil(folder, "a/0.png")
    (images, _) = next(train_data(folder, spec, batch=12, workers=workers).epoch(0))
    assert len({float(image.sum()) for image in images}) == 12


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_unreadable_images(
    tmp_path: Path, image_folder: Callable[..., Path], spec: VitSpec, workers: int
):
    folder = image_folder(tmp_path / "images", each=8)
    spoil(folder, *(f"a/{n}.png" for n in range(8)), "b/0.png", "b/1.png")
    assert len(list(train_data(folder, spec, workers=workers).epoch(0))) == 4
    batches = list(EvalData(open_images(folder), spec, Preprocess(), 4, workers))
    assert [len(labels) for _, labels in batches] == [2, 4]
    spoil(folder, "b/2.png")
    match = r"too many unreadable images: 11 of 16, .*0\.png for one; at most 10"
    with pytest.raises(DataError, match=match) as caught:
        list(train_data(folder, spec, batch=16, workers=workers).epoch(0))
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=match):
        list(EvalData(open_images(folder), spec, Preprocess(), 4, workers))


def test_no_readable_image(folder: Path, spec: VitSpec):
    spoil(folder, *(f"{c}/{n}.png" for c in "ab" for n in range(1, 6)))
    (folder / "a/0.png").unlink()
    (folder / "b/0.png").unlink()
    with pytest.raises(DataError, match="too many unreadable images: 10 of 10"):
        list(train_data(folder, spec).epoch(0))


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_test_images_are_left_out(folder: Path, spec: VitSpec, workers: int):
    whole = list(EvalData(open_images(folder), spec, Preprocess(), batch=4))
    spoil(folder, "a/5.png")
    lines: list[str] = []
    data = EvalData(open_images(folder), spec, Preprocess(), 4, workers, lines.append)
    for _ in range(2):
        batches = list(data)
        assert [len(labels) for _, labels in batches] == [4, 3, 4]
    assert equal([whole[0], whole[2]], [batches[0], batches[2]])
    assert torch.equal(batches[1][0], whole[1][0][[0, 2, 3]])
    assert lines == [f"{folder / 'a/5.png'}: can't be read; skipped"]
    assert data.unreadable == {5}
    assert (len(data), data.classes, data.name) == (3, ("a", "b"), str(folder))


class _Mislabelled:
    """Images whose labels can't be used."""

    classes, name = ("a", "b"), "mislabelled"

    def __len__(self) -> int:
        return 4

    def read(self, index: int) -> tuple[Image.Image, int]:
        raise DataError(f"image {index} has no label.")

    def where(self, index: int) -> str:
        return f"image {index}"


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_from_a_worker_is_one_line(spec: VitSpec, workers: int):
    with pytest.raises(DataError) as caught:
        list(EvalData(_Mislabelled(), spec, Preprocess(), 4, workers))
    assert str(caught.value) == "image 0 has no label."
