from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tocom_export.errors import DataError
from tocom_export.training.data.images import UnreadableImage
from tocom_export.training.data.opening import open_images

# timm leaves image files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture
def folder(tmp_path: Path, image_folder: Callable[..., Path]) -> Path:
    return image_folder(tmp_path / "images", each=3)


def test_a_folder(folder: Path):
    images = open_images(folder)
    assert (len(images), images.classes, images.name) == (6, ("a", "b"), str(folder))
    image, label = images.read(4)
    assert (image.mode, label) == ("RGB", 1)
    assert np.array_equal(image, Image.open(folder / "b" / "1.png"))
    assert images.where(4) == str(folder / "b" / "1.png")


def test_a_folder_as_text(folder: Path):
    assert len(open_images(str(folder))) == 6


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_any_colour_mode(folder: Path, mode: str):
    Image.new(mode, (9, 7)).save(folder / "a" / "0.png")
    assert open_images(folder).read(0)[0].mode == "RGB"


@pytest.mark.parametrize("name", ["none", "a/0.png"])
def test_no_such_folder(folder: Path, name: str):
    with pytest.raises(DataError, match=name):
        open_images(folder / name)


def test_no_class_folders(tmp_path: Path):
    with pytest.raises(DataError, match="any class folder"):
        open_images(tmp_path)


def test_no_images(tmp_path: Path):
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match=r"not images as <folder>/<class>/<image> .*'cat' is empty"):
        open_images(tmp_path)


def test_an_empty_class_folder_is_told(tmp_path: Path, image_folder: Callable[..., Path]):
    folder = image_folder(tmp_path / "images", ("b", "c"), each=2)
    (folder / "a").mkdir()
    (folder / "0.txt").touch()
    with pytest.raises(DataError, match=r"its class 'a' is empty"):
        open_images(folder)
    (folder / "a" / "0.txt").touch()
    with pytest.raises(DataError, match=r"classes a\b"):
        open_images(folder)


@pytest.mark.parametrize("broken", [b"", b"no image", b"\x89PNG\r\n\x1a\n", None])
def test_an_image_that_cannot_be_read(folder: Path, broken: bytes | None):
    images = open_images(folder)
    file = folder / "a" / "1.png"
    if broken is None:
        file.unlink()
    else:
        file.write_bytes(broken)
    with pytest.raises(UnreadableImage, match=r"1\.png"):
        images.read(1)
