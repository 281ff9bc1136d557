from __future__ import annotations

import multiprocessing
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from tocom_export.errors import DataError
from tocom_export.model.preprocess import Preprocess
from tocom_export.model.spec import VitSpec
from tocom_export.training.data.evaluation import EvalData
from tocom_export.training.data.opening import open_images

pytestmark = [
    # timm leaves image files to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    # From Python 3.12 on, where a worker is forked beside torch's own threads.
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="can't tell who sends a signal")
def test_workers_outlast_sigterm_unless_it_is_ours(folder: Path, spec: VitSpec, train_data, equal):
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


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_named_and_replaced(
    folder: Path, spec: VitSpec, workers: int, train_data, equal, spoil
):
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
def test_a_replacement_is_not_the_same_picture_twice(
    folder: Path, spec: VitSpec, workers: int, train_data, spoil
):
    spoil(folder, "a/0.png")
    (images, _) = next(train_data(folder, spec, batch=12, workers=workers).epoch(0))
    assert len({float(image.sum()) for image in images}) == 12


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_unreadable_images(
    tmp_path: Path,
    image_folder: Callable[..., Path],
    spec: VitSpec,
    workers: int,
    train_data,
    spoil,
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


def test_no_readable_image(folder: Path, spec: VitSpec, train_data, spoil):
    spoil(folder, *(f"{c}/{n}.png" for c in "ab" for n in range(1, 6)))
    (folder / "a/0.png").unlink()
    (folder / "b/0.png").unlink()
    with pytest.raises(DataError, match="too many unreadable images: 10 of 10"):
        list(train_data(folder, spec).epoch(0))


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
