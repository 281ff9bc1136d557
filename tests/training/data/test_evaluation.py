from __future__ import annotations

from pathlib import Path

import pytest
import torch

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


def test_EvalData(folder: Path, spec: VitSpec, equal):
    batches = list(EvalData(open_images(folder), spec, Preprocess(), batch=5))
    assert [len(labels) for _, labels in batches] == [5, 5, 2]
    assert torch.cat([labels for _, labels in batches]).tolist() == [0] * 6 + [1] * 6
    assert batches[0][0].shape == (5, 3, 16, 16)
    again = list(EvalData(open_images(folder), spec, Preprocess(), batch=5))
    assert equal(batches, again)


@pytest.mark.parametrize("names", [("2", "10", "1"), ("b10", "a", "b9"), ("B", "a", "C")])
def test_class_names_are_in_the_order_of_the_labels(
    tmp_path: Path, image_folder, spec: VitSpec, names: tuple[str, ...], train_data
):
    folder = image_folder(tmp_path / "images", names, each=1)
    plain = Preprocess(mean=(0.0,) * 3, std=(1.0,) * 3)
    images = open_images(folder)
    ((pixels, labels),) = EvalData(images, spec, plain)
    colours = pixels.mean(dim=(2, 3)).argmax(dim=1)  # image_folder gives the n-th class the n-th
    classes = train_data(folder, spec, batch=1).classes
    assert classes == images.classes
    found = {classes[label]: int(c) for label, c in zip(labels, colours, strict=True)}
    assert found == {name: colour for colour, name in enumerate(names)}


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_test_images_are_left_out(
    folder: Path, spec: VitSpec, workers: int, equal, spoil
):
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
