from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tocom_export.errors import ImageError, InputError
from tocom_export.io.json_codec import decode, encode
from tocom_export.model.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess, find_images
from tocom_export.model.spec import VitSpec

GOOD = {"mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 0.9, "interpolation": "bilinear"}


def save(file: Path, pixels: Any) -> Path:
    Image.fromarray(np.asarray(pixels, np.uint8)).save(file)
    return file


def test_an_image_of_the_models_size_is_only_normalised(tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3))
    loaded = Preprocess().load(save(tmp_path / "a.png", pixels), (8, 12))
    expected = (pixels / 255 - IMAGENET_MEAN) / IMAGENET_STD
    assert loaded.dtype == np.float32
    assert loaded.flags.c_contiguous
    np.testing.assert_allclose(loaded, expected.transpose(2, 0, 1), rtol=0, atol=1e-5)


def test_the_centre_is_kept(tmp_path: Path):
    pixels = np.zeros((8, 24, 3))
    pixels[:, 8:16] = 255
    plain = Preprocess(mean=(0.0,) * 3, std=(1.0,) * 3)
    assert (plain.load(save(tmp_path / "a.png", pixels), (8, 8)) == 1).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_any_colour_mode(tmp_path: Path, mode: str):
    file = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new(mode, (9, 7)).save(file)
    assert Preprocess().load(file, (4, 4)).shape == (3, 4, 4)


@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize("crop", [1.0, 0.9, 0.875])
@pytest.mark.parametrize("size", [(64, 64), (80, 61), (61, 80), (33, 47), (100, 57)])
def test_the_same_pixels_as_timm(
    tmp_path: Path,
    make_spec: Callable[..., VitSpec],
    crop: float,
    mode: Any,
    size: tuple[int, int],
):
    from tocom_export.training.data.transforms import eval_transform

    coarse = np.random.default_rng(1).integers(0, 256, (5, 6, 3), np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    file = tmp_path / "a.png"
    image.save(file)
    preprocess = Preprocess(crop_pct=crop, crop_mode=mode)
    loaded = preprocess.load(file, (56, 56))
    wanted = eval_transform(make_spec(), preprocess)(image)
    np.testing.assert_allclose(loaded, wanted.numpy(), rtol=0, atol=1e-5)


def test_batch(tmp_path: Path):
    files = [save(tmp_path / f"{n}.png", np.full((8, 8, 3), n)) for n in (10, 20, 30)]
    batch = Preprocess().load_batch(files, (8, 8))
    assert batch.shape == (3, 3, 8, 8)
    assert (np.diff(batch[:, 0, 0, 0]) > 0).all()


def test_missing_image(tmp_path: Path):
    with pytest.raises(ImageError, match=r"none\.png: no such file"):
        Preprocess().load(tmp_path / "none.png", (8, 8))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
def test_broken_image(tmp_path: Path, share: float):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3))
    file = save(tmp_path / "a.png", pixels)
    raw = file.read_bytes()
    file.write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(ImageError, match=r"a\.png"):
        Preprocess().load(file, (8, 8))


def test_a_folder_is_not_an_image(tmp_path: Path):
    with pytest.raises(ImageError) as caught:
        Preprocess().load(tmp_path, (8, 8))
    assert str(tmp_path) in str(caught.value)


def test_find_images_sorts_and_leaves_out_the_rest(tmp_path: Path):
    for name in ("b/1.PNG", "a/2.webp", "a/1.jpg", "a/notes.txt", "c.jpeg", "d.TIF", "e.gif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [p.relative_to(tmp_path).as_posix() for p in find_images(tmp_path)]
    assert found == ["a/1.jpg", "a/2.webp", "b/1.PNG", "c.jpeg", "d.TIF", "e.gif"]


@pytest.mark.parametrize("name", [".", "none"])
def test_no_images(tmp_path: Path, name: str):
    with pytest.raises(ImageError) as caught:
        find_images(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_json_comes_back():
    read = decode(Preprocess, GOOD)
    assert read == Preprocess((0.5,) * 3, (0.25,) * 3, 0.9, "bilinear")
    assert encode(read) == GOOD
    assert decode(Preprocess, encode(read)) == read
    assert encode(Preprocess(), defaults=False) == {}
    assert encode(Preprocess()).keys() == {"mean", "std", "crop_pct", "interpolation"}


def test_a_crop_that_files_before_it_do_not_name():
    """Files that need it not stay the same to the byte, and are read as they were."""
    assert decode(Preprocess, GOOD).crop_mode == "center"
    squash = Preprocess(crop_mode="squash")
    assert encode(squash) == {**encode(Preprocess()), "crop_mode": "squash"}
    assert decode(Preprocess, encode(squash)) == squash
    assert decode(Preprocess, {**GOOD, "crop_mode": "center"}) == decode(Preprocess, GOOD)


@pytest.mark.parametrize(
    "changes",
    [
        {"mean": None},
        {"mean": 0.5},
        {"mean": ["x"] * 3},
        {"mean": [0.5] * 2},
        {"mean": [float("nan")] * 3},
        {"std": [0.5] * 2},
        {"std": [0.5, 0.5, 0]},
        {"std": [-0.5] * 3},
        {"crop_pct": 0},
        {"crop_pct": 1.5},
        {"crop_pct": "0.9"},
        {"crop_pct": None},
        {"crop_pct": float("nan")},
        {"interpolation": "nearest"},
        {"interpolation": ["bicubic"]},
        {"crop_mode": "border"},
        {"crop_mode": None},
        {"size": 224},
    ],
)
def test_bad_json(changes: dict):
    with pytest.raises(InputError):
        decode(Preprocess, {**GOOD, **changes})
