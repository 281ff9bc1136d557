from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tocom_export.errors import DataError
from tocom_export.model.preprocess import Preprocess
from tocom_export.model.spec import VitSpec
from tocom_export.training.data import timm_sets
from tocom_export.training.data.images import UnreadableImage
from tocom_export.training.data.opening import open_images
from tocom_export.training.data.train import TrainData

# timm leaves image files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.mark.parametrize("name", ["torch/image_folder", "torch/image_folder:train"])
def test_torchvision_by_name(tmp_path: Path, image_folder: Callable[..., Path], name: str):
    folder = image_folder(tmp_path / "root" / "train", each=3)
    image_folder(tmp_path / "root" / "test", each=1)
    split = "test" if ":" in name else "train"  # the name's own goes first
    images = open_images(name, data_root=tmp_path / "root", split=split)
    plain = open_images(folder)
    assert (len(images), images.classes) == (6, ("a", "b"))
    assert images.name == "torch/image_folder:train"
    for index in range(6):
        assert np.array_equal(images.read(index)[0], plain.read(index)[0])
        assert images.read(index)[1] == plain.read(index)[1]
    (folder / "a" / "2.png").write_bytes(b"")
    with pytest.raises(UnreadableImage, match=r"train/a/2\.png"):
        images.read(2)


@pytest.mark.parametrize(
    ("asked", "found", "name"),
    [
        ("torch/cifar10", {"train": True, "root": "data"}, "torch/cifar10:train"),
        ("torch/cifar10:test", {"train": False}, "torch/cifar10:test"),
        ("Torch/CIFAR10:val", {"train": False}, "torch/cifar10:test"),
        ("torch/imagenet:valid", {"split": "val", "root": "data/val"}, "torch/imagenet:val"),
        ("torch/inat", {"version": "2021_train"}, "torch/inat:2021_train"),
        ("torch/image_folder:test", {"root": "data/test"}, "torch/image_folder:test"),
        ("torch/image_folder:test", {"root": "data"}, "torch/image_folder"),
        ("hfds/x/Y", {"train": None}, "hfds/x/Y:train"),
        ("hfds/x/Y:test[:9%]", {}, "hfds/x/Y:test[:9%]"),
    ],
)
def test_a_name_says_the_split_that_was_opened(
    monkeypatch: pytest.MonkeyPatch, asked: str, found: dict[str, Any], name: str
):
    hugging_face(monkeypatch, SimpleNamespace(classes=("a", "b"), **found))
    assert open_images(asked, data_root=Path("data")).name == name


def test_training_on_torchvision(tmp_path: Path, image_folder: Callable[..., Path], spec: VitSpec):
    folder = image_folder(tmp_path / "images", each=3)
    images = open_images("torch/image_folder", data_root=folder)
    ((batch, labels),) = TrainData(images, spec, Preprocess(), 6, workers=0).epoch(0)
    assert batch.shape == (6, 3, 16, 16)
    assert sorted(labels.tolist()) == [0, 0, 0, 1, 1, 1]


def test_a_set_that_is_not_there(tmp_path: Path):
    with pytest.raises(DataError, match=r"torch/cifar10: split train .*`download` fetches it"):
        open_images("torch/cifar10", data_root=tmp_path)
    with pytest.raises(DataError, match=r"torch/banana: .*Unknown torchvision dataset banana"):
        open_images("torch/banana", data_root=tmp_path)
    with pytest.raises(DataError, match="with `data_root`"):
        open_images("torch/cifar10")


@pytest.mark.parametrize(
    ("name", "instead"),
    [("tfds/cifar10", "hfds/ name"), ("hfids/x/y", "hfds/ name"), ("wds/x", "shards' folder")],
)
def test_streams(name: str, instead: str):
    with pytest.raises(DataError, match=f"can't be resumed exactly; give .*{instead}"):
        open_images(name)


def test_hugging_face_without_its_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        open_images("hfds/x/y")


class _Reader:
    """What timm makes of a Hugging Face set: an open file and a label."""

    class_to_idx: dict[str, int] | None = {"dog": 1, "cat": 0}  # noqa: RUF012
    label: Any = 1

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[io.BytesIO, Any]:
        stream = io.BytesIO()
        if index < 2:
            Image.new("L", (4, 4), index).save(stream, "png")
        return io.BytesIO(stream.getvalue()), self.label


def hugging_face(monkeypatch: pytest.MonkeyPatch, found: Any) -> dict[str, Any]:
    """Stand in for timm's access to Hugging Face; what it was asked for."""
    asked: dict[str, Any] = {}

    def create(name: str, **options: Any) -> Any:
        asked.update(name=name, **options)
        return found

    monkeypatch.setitem(sys.modules, "datasets", ModuleType("datasets"))
    monkeypatch.setattr(timm_sets, "create_dataset", create)
    return asked


class _Set:
    """timm's data set around a reader."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        raise AssertionError("it replaces unreadable images without a word")


def test_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = hugging_face(monkeypatch, _Set(_Reader()))
    images = open_images("hfds/x/Y:train[:90%]", data_root=tmp_path)
    assert asked == {
        "name": "hfds/x/Y",
        "root": str(tmp_path),
        "split": "train[:90%]",
        "download": False,
    }
    assert (len(images), images.classes) == (3, ("cat", "dog"))
    image, label = images.read(1)
    assert (image.mode, image.getpixel((0, 0)), label) == ("RGB", (1, 1, 1), 1)
    with pytest.raises(UnreadableImage, match=r"hfds/x/Y.*: image 2"):
        images.read(2)


@pytest.mark.parametrize("label", [None, -1, 2, 0.5, "cat"])
def test_labels_that_are_none(monkeypatch: pytest.MonkeyPatch, label: Any):
    reader = _Reader()
    reader.label = label
    hugging_face(monkeypatch, _Set(reader))
    with pytest.raises(DataError, match=r"hfds/x:train: image 0 has label .* not one of 2 ") as e:
        open_images("hfds/x").read(0)
    assert not isinstance(e.value, UnreadableImage)


@pytest.mark.parametrize(
    ("found", "classes"),
    [
        (
            {"classes": [("tench", "Tinca tinca"), ("goldfish",)]},
            ("tench, Tinca tinca", "goldfish"),
        ),
        ({"all_categories": ["x", "y"]}, ("x", "y")),
        ({"class_to_idx": {"y": 1, "x": 0}}, ("x", "y")),
        ({"targets": [0, 2, 1]}, ("0", "1", "2")),
    ],
)
def test_class_names(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, Any], classes: tuple[str, ...]
):
    hugging_face(monkeypatch, SimpleNamespace(**found))
    assert open_images("hfds/x").classes == classes


def test_no_class_names(monkeypatch: pytest.MonkeyPatch):
    reader = _Reader()
    reader.class_to_idx = {}
    hugging_face(monkeypatch, _Set(reader))
    with pytest.raises(DataError, match="hfds/x:train: the set doesn't name its classes"):
        open_images("hfds/x")
