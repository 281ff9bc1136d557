"""Images are read for training as the engines read them, whatever opens them."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tocom_export.model.image_files import decode_image
from tocom_export.model.preprocess import Preprocess
from tocom_export.model.spec import VitSpec
from tocom_export.training.data.evaluation import EvalData
from tocom_export.training.data.images import LabelledImages, UnreadableImage
from tocom_export.training.data.opening import open_images

REASON = "its pixels are floats from 0 to 255; scale them to 0 to 1, or save 8 bits."


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A folder of what torchvision reads wrongly, or not at all, and one image of no use."""
    exif = Image.Exif()
    exif[274] = 6
    slope = np.tile(np.linspace(0, 65535, 24).astype(np.uint16), (18, 1))
    colours = np.random.default_rng(0).integers(0, 256, (18, 24, 3), np.uint8)
    for name in ("a", "b"):
        (tmp_path / "odd" / name).mkdir(parents=True)
    Image.fromarray(slope).save(tmp_path / "odd" / "a" / "0.png")
    Image.fromarray(slope / np.float32(65535)).save(tmp_path / "odd" / "a" / "1.tif")
    Image.fromarray(colours).save(tmp_path / "odd" / "a" / "2.jpg", exif=exif)
    Image.fromarray(colours).quantize(9).save(tmp_path / "odd" / "b" / "3.gif")
    Image.fromarray((slope >> 8).astype(np.float32)).save(tmp_path / "odd" / "b" / "4.tif")
    return tmp_path / "odd"


def pack(folder: Path) -> Path:
    """The same images as one shard."""
    shard = folder.parent / "odd.tar"
    with tarfile.open(shard, "w") as tar:
        for file in sorted(folder.glob("*/*")):
            for suffix, raw in (
                (file.suffix, file.read_bytes()),
                (".cls", b"0" if file.parent.name == "a" else b"1"),
            ):
                info = tarfile.TarInfo(f"{file.stem}{suffix}")
                info.size = len(raw)
                tar.addfile(info, BytesIO(raw))
    return shard


OPEN: dict[str, Callable[[Path], LabelledImages]] = {
    "folder": open_images,
    "shard": lambda folder: open_images(pack(folder)),
}


@pytest.mark.parametrize("how", OPEN)
def test_the_very_pixels(odd: Path, how: str):
    images = OPEN[how](odd)
    for index, file in enumerate(["a/0.png", "a/1.tif", "a/2.jpg", "b/3.gif"]):
        image, _ = images.read(index)
        assert image.mode == "RGB"
        assert np.array_equal(image, decode_image(odd / file))
    assert images.read(2)[0].size == (18, 24)
    middle = np.asarray(images.read(0)[0])[0, 12, 0]
    assert 120 < middle < 140
    with pytest.raises(UnreadableImage) as caught:
        images.read(4)
    assert str(caught.value) == f"{images.where(4)}: {REASON}"


def test_torchvision_s_own_folder(odd: Path):
    (odd / "b" / "5.png").write_bytes((odd / "a" / "0.png").read_bytes())  # it knows no GIF
    images = open_images("torch/image_folder", data_root=odd)
    names = [Path(images.where(index)) for index in range(len(images))]
    assert [file.name for file in names] == ["0.png", "1.tif", "2.jpg", "4.tif", "5.png"]
    for index in (0, 1, 2, 4):
        assert np.array_equal(images.read(index)[0], decode_image(names[index]))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_batches_are_those_of_the_engines(odd: Path, spec: VitSpec, workers: int):
    lines: list[str] = []
    data = EvalData(open_images(odd), spec, Preprocess(), 9, workers, lines.append)
    ((images, labels),) = data
    files = sorted(odd.glob("*/*"))[:-1]
    wanted = Preprocess().load_batch(files, spec.image_size)
    np.testing.assert_allclose(images.numpy(), wanted, rtol=0, atol=1e-5)
    assert labels.tolist() == [0, 0, 0, 1]
    assert lines == [f"{odd / 'b' / '4.tif'}: {REASON[:-1]}; skipped"]
